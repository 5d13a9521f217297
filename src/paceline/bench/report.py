"""Reports: what a run measured, as a table for people, one JSON line for programs, and a picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from paceline.errors import SettingsError

LEAST_KL = 1e-7  # nats: what plots show of the same distributions


LIMIT_COLUMNS = ("GB/s", "memory", "GMAC/s", "peak", "bound", "of it")


def limit_cells(found: Mapping[str, Any]) -> tuple[str, ...]:
    """What `demand.compared` found, for a table with `LIMIT_COLUMNS`."""
    peak = found["peak_fraction"]
    return (
        f"{found['gb_s']:.1f}",
        f"{found['bandwidth_fraction']:.0%}",
        "-" if peak is None else f"{found['multiply_adds_per_s'] / 1e9:.0f}",
        "-" if peak is None else f"{peak:.0%}",
        str(found["bound"]),
        f"{found['bound_fraction']:.0%}",
    )


def new_table(title: str, *columns: str, left: tuple[str, ...] = ("bound",)) -> Table:
    """A table whose columns are aligned right but for those named."""
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right")
    return table


def place(report: Mapping[str, Any]) -> str:
    """The instruction set, or the device."""
    return str(report.get("isa") or report["device"])


def decode_table(report: Mapping[str, Any]) -> Table:
    """Milliseconds of a forward pass beside both limits, by rows."""
    table = new_table(f"One pass of the target ({place(report)})", "rows", "ms", "x one", *LIMIT_COLUMNS)
    one = report["forward_ms"]["1"]
    for rows, found in report["passes"].items():
        table.add_row(rows, f"{found['ms']:.1f}", f"{found['ms'] / one:.2f}", *limit_cells(found))
    if "prompt" in report:
        table.add_row("prompt", f"{report['prompt']['ms']:.0f}", "", *limit_cells(report["prompt"]))
    return table


def print_decode(out: Console, report: Mapping[str, Any]) -> None:
    """Everything `bench decode` measured."""
    out.print(decode_table(report))
    same = "the same bits as" if report["same_bits"] else "OTHER BITS THAN"
    out.print(f"16 rows in one pass: {same} one by one")
    print_prompt(out, report)
    if report["draft_step_ms"] is None:
        out.print("no drafter")
        return
    shares = report["simulated_acceptance"]
    how = (
        f"SIMULATED acceptance {', '.join(map(str, shares))}" if shares else "the pair's own acceptance, random prompt"
    )
    out.print(
        f"one draft step: {report['draft_step_ms']:.2f} ms\n"
        f"decoding: {report['plain_tokens_per_s']:.1f} tokens/s plain, {report['mtp_tokens_per_s']:.1f} with "
        f"{report['draft_tokens']} drafts ({how}): {report['speedup']:.2f} times\n"
        f"draft length left to the engine: {report['auto_speedup']:.2f} times plain decoding; "
        f"with a drafter that is never right (SIMULATED): {report['auto_useless_speedup']:.3f} times"
    )


def print_prompt(out: Console, report: Mapping[str, Any]) -> None:
    """The speed of a prompt and the machine's limits."""
    work = report["prompt_multiply_accumulates_per_s"] / 1e9
    print_limits(out, report)
    out.print(
        f"peak memory: {report['peak_memory_bytes'] / 1e9:.2f} GB\n"
        f"prompt of {report['prompt_tokens']} tokens: {report['prompt_tokens_per_s']:.0f} tokens/s, "
        f"{work:.0f} billion multiply-accumulates/s with weights"
    )


def print_limits(out: Console, *reports: Mapping[str, Any]) -> None:
    """The machine's limits of one run, by instruction set where there are several, and how experts were chosen."""
    report = reports[0]
    out.print(f"reading memory: {report['read_bandwidth_gb_s']:.1f} GB/s")
    for one in reports:
        if one["dot_peaks"]:
            peaks = ", ".join(f"{fmt} {peak / 1e9:.0f}" for fmt, peak in one["dot_peaks"].items())
            out.print(f"peak of the dot products ({one['isa']}), GMAC/s: {peaks}")
    if report.get("expert_overlap") is not None:
        out.print(
            f"experts are SIMULATED: neighbouring rows share {report['expert_overlap']:.0%} of theirs, or as many as "
            "by chance (--expert-overlap)"
        )


def print_isas(out: Console, reports: Mapping[str, Mapping[str, Any]]) -> None:
    """Instruction sets one below the other."""
    passes = {isa: report["passes"] | {"prompt": report["prompt"]} for isa, report in reports.items()}
    out.print(_isas_table("One pass of the target", passes))
    print_limits(out, *reports.values())


def _isas_table(title: str, isas: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Table:
    """Times, and how near they are to the limit that binds: {instruction set: {rows: found}}."""
    rows = list(next(iter(isas.values())))
    names = (n if n == "prompt" else f"{n} row{'s' * (n != '1')}" for n in rows)
    table = new_table(f"{title}: ms, of the limit that binds", "instructions", *names, left=("instructions",))
    for isa, found in isas.items():
        table.add_row(isa, *(f"{found[n]['ms']:.1f}\n{found[n]['bound_fraction']:.0%}" for n in rows))
    return table


def print_contexts(out: Console, report: Mapping[str, Any]) -> None:
    """Passes after contexts of several lengths."""
    rows = list(next(iter(report["contexts"].values())))
    table = new_table(
        f"Passes after longer and longer contexts ({place(report)})",
        *("tokens", "1 row, ms", *(f"{n} rows" for n in rows[1:]), "GB/s", "bound", "of it"),
    )
    for context, found in report["contexts"].items():
        one = found["1"]
        times = (f"{found[n]['ms'] / one['ms']:.2f} x" for n in rows[1:])
        cells = limit_cells(one)
        table.add_row(context, f"{one['ms']:.1f}", *times, cells[0], *cells[-2:])
    out.print(table)
    print_limits(out, report)


def kernel_table(report: Mapping[str, Any], isa: str) -> Table:
    """The matrix kernels beside both limits, by format and rows."""
    table = new_table(f"Matrix kernels ({isa})", "format", "rows", "ms", *LIMIT_COLUMNS, left=("format", "bound"))
    for fmt, by_rows in report["kernels"][isa].items():
        for rows, found in by_rows.items():
            table.add_row(fmt if rows == "1" else "", rows, f"{found['ms']:.1f}", *limit_cells(found))
        table.add_section()
    return table


def kernel_isas_tables(report: Mapping[str, Any]) -> Iterator[Table]:
    """Of each format the instruction sets one below the other."""
    isas = report["kernels"]
    for fmt in next(iter(isas.values())):
        yield _isas_table(fmt, {isa: isas[isa][fmt] for isa in isas})


def plot_costs(report: Mapping[str, Any], path: Path) -> None:
    """Draw the cost curve: milliseconds of a pass against its rows, beside the machine's limits.

    Raises:
        SettingsError: matplotlib is not installed, or the file cannot be written.
    """
    new_figure = _figure_class()
    place = report.get("device") or f"{report['threads']} threads"
    rows = [int(key) for key in report["forward_ms"]]
    times = list(report["forward_ms"].values())
    figure = new_figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(rows, times, marker="o", color="#2f6f9f", label="measured")
    limits = [found["bound_ms"] for found in report["passes"].values()]
    axes.plot(rows, limits, color="#b0552f", linestyle="--", label="what memory or arithmetic takes at least")
    axes.set(xlabel="rows checked in one pass", ylabel="ms", ylim=(0, None), xticks=rows)
    axes.set_title(f"{report['model']} {report['quant']}, {report['context']} tokens of context, {place}")
    axes.legend(loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def plot_losses(report: Mapping[str, Any], path: Path) -> None:
    """Draw KL divergence from the reference against bits a weight, and against the speed of decoding.

    Raises:
        SettingsError: matplotlib is not installed, or the file cannot be written.
    """
    figure = _figure_class()(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    formats = report["formats"]
    losses = [max(row["kl_mean"], LEAST_KL) for row in formats]
    for axes, key, label in ((left, "bits_per_weight", "bits a weight"), (right, "tokens_per_s", "tokens/s, decoding")):
        values = [row[key] for row in formats]
        axes.plot(values, losses, marker="o", linestyle="", color="#2f6f9f")
        for row, value, loss in zip(formats, values, losses, strict=True):
            axes.annotate(row["quant"], (value, loss), textcoords="offset points", xytext=(6, 4))
        axes.set(xlabel=label, yscale="log", xlim=(0, 1.15 * max(values)))
        axes.grid(axis="y", color="#dddddd")
        axes.spines[["top", "right"]].set_visible(False)
    left.set_ylabel(f"KL divergence from {report['reference']['quant']}, nats")
    figure.suptitle(f"{report['model']}, {report['positions']} positions")
    _save(figure, path)


def plot_training(report: Mapping[str, Any], path: Path) -> None:
    """Draw the loss of a training, and how likely a draft at each depth is accepted, against its time.

    Raises:
        SettingsError: matplotlib is not installed, or the file cannot be written.
    """
    figure = _figure_class()(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    history = report["history"]
    minutes = [point["seconds"] / 60 for point in history]
    left.plot(minutes, [point["loss"] for point in history], color="#2f6f9f")
    left.set(xlabel="minutes of training", ylabel="loss, nats a step")
    for depth, shares in enumerate(zip(*(point["agreement"] for point in history), strict=True), start=1):
        right.plot(minutes, shares, color="#2f6f9f", alpha=1 - 0.2 * (depth - 1))
        right.annotate(str(depth), (minutes[-1], shares[-1]), textcoords="offset points", xytext=(4, -3))
    right.set(xlabel="minutes of training", ylabel="acceptance at depth 1, 2, ...", ylim=(0, 1))
    for axes in (left, right):
        axes.grid(axis="y", color="#dddddd")
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"drafter of {report['settings']['target']}")
    _save(figure, path)


def check_plot(path: Path) -> None:
    """Find out before minutes of measuring whether a plot can be drawn.

    Raises:
        SettingsError: matplotlib is not installed, or there is no such folder.
    """
    _figure_class()
    if not path.parent.is_dir():
        raise SettingsError(f"{path}: cannot be written (no such folder); make it first")


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SettingsError("--plot needs matplotlib; install it with pip install 'paceline[plot]'") from error
    return Figure


def _save(figure: Any, path: Path) -> None:
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path}: cannot be written ({error})") from error


def console() -> Console:
    """Tables go to stderr, so that stdout holds the JSON line alone."""
    return Console(stderr=True, highlight=False)
