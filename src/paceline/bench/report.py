"""Reports: what a run measured, as a table for people, one JSON line for programs, and a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from paceline.errors import SettingsError

LEAST_KL = 1e-7  # nats: what plots show of the same distributions


def decode_table(report: Mapping[str, Any]) -> Table:
    """Milliseconds and bandwidth of a forward pass, by rows."""
    table = Table(title="One pass of the target")
    for column in ("rows", "ms", "of one row", "GB/s", "of the machine's"):
        table.add_column(column, justify="right")
    one = report["forward_ms"]["1"]
    for rows, ms in report["forward_ms"].items():
        speed = report["pass_bytes"] / ms / 1e6
        table.add_row(
            rows, f"{ms:.2f}", f"{ms / one:.2f}", f"{speed:.1f}", f"{speed / report['read_bandwidth_gb_s']:.0%}"
        )
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
    """The speed of a prompt and the machine's limit."""
    work = report["prompt_multiply_accumulates_per_s"] / 1e9
    out.print(
        f"reading memory: {report['read_bandwidth_gb_s']:.1f} GB/s\n"
        f"peak memory: {report['peak_memory_bytes'] / 1e9:.2f} GB\n"
        f"prompt of {report['prompt_tokens']} tokens: {report['prompt_tokens_per_s']:.0f} tokens/s, "
        f"{work:.0f} billion multiply-accumulates/s"
    )


def kernel_table(report: Mapping[str, Any]) -> Table:
    """Weight bandwidth of the matrix kernels as a share of what memory gives, by format and rows."""
    table = Table(title=f"Matrix kernels: weights a second, as a share of reading memory ({report['isa']})")
    heights = list(next(iter(report["kernel_gb_s"].values())))
    for title in ("format", "GB/s", *(f"{rows} row" if rows == "1" else rows for rows in heights)):
        table.add_column(title, justify="left" if title == "format" else "right")
    for fmt, speeds in report["kernel_gb_s"].items():
        shares = report["kernel_bandwidth_fraction"][fmt]
        table.add_row(fmt, f"{speeds[heights[0]]:.1f}", *(f"{shares[rows]:.0%}" for rows in heights))
    return table


def plot_costs(report: Mapping[str, Any], path: Path) -> None:
    """Draw the cost curve: milliseconds of a pass against its rows, with the time that reading the weights would take.

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
    limit = report["pass_bytes"] / report["read_bandwidth_gb_s"] / 1e6
    axes.axhline(limit, color="#b0552f", linestyle="--", label=f"reading the weights: {limit:.1f} ms")
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
