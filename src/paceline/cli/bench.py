"""`paceline bench`: speed of kernels, decoding and prefill, compared with the memory bandwidth."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paceline.cli.options import DeviceOption, ThreadsOption
from paceline.errors import SettingsError
from paceline.quant.formats import FORMATS
from paceline.quant.recipes import DEFAULT, METAVAR

if TYPE_CHECKING:
    from paceline.bench.runs import KernelSpeed

bench = typer.Typer(
    help="Measure kernels, decoding and prefill. The last line on stdout is JSON.", no_args_is_help=True
)

ModelOption = Annotated[str | None, typer.Option("--model", "-m", help="A model with its drafter.", metavar="MODEL")]
ShapeOption = Annotated[
    str | None,
    typer.Option(help="Random weights in an official shape.", metavar="e2b|e4b|12b|26b|31b", show_default=False),
]
QuantOption = Annotated[
    str,
    typer.Option(
        help=f"Weight format; auto: as the model is used, and {DEFAULT} for a shape.", metavar=f"auto|{METAVAR}"
    ),
]
ContextOption = Annotated[int, typer.Option(help="Tokens in the KV cache before each measurement.", min=16)]
DraftOption = Annotated[int, typer.Option(help="Draft length.", min=1, max=15)]
RepeatsOption = Annotated[int, typer.Option(help="Runs of each measurement; medians are shown.", min=1)]
AcceptanceOption = Annotated[
    str | None,
    typer.Option(
        help="Simulate acceptance: rates by depth 1, 2, ..., such as 0.8,0.65,0.5. With random weights no draft is "
        "accepted otherwise.",
        metavar="SHARES",
    ),
]
PROMPT = 512  # tokens of the prompt that is measured


@bench.command()
def kernels(threads: ThreadsOption = None, repeats: RepeatsOption = 7) -> None:
    """Matrix kernels of all weight formats for 1 to 16 rows, in bytes of weights per second."""
    from paceline import _cpu
    from paceline.backends.cpu.processors import default_threads
    from paceline.bench.machine import ReadBandwidth, peak_memory, processor
    from paceline.bench.report import console, kernel_table
    from paceline.bench.runs import kernel_speed

    count = threads or default_threads()
    isa = os.environ.get("PACELINE_ISA", "")
    bandwidth = ReadBandwidth(count)
    speeds = {fmt: kernel_speed(fmt, count, isa, repeats, bandwidth) for fmt in FORMATS}

    def by_format(figures: Callable[[KernelSpeed], dict[int, float]]) -> dict[str, dict[str, float]]:
        return {fmt: {str(rows): value for rows, value in figures(speed).items()} for fmt, speed in speeds.items()}

    report: dict[str, Any] = {
        "benchmark": "kernels",
        "read_bandwidth_gb_s": bandwidth.median,
        "kernel_gb_s": by_format(lambda speed: speed.gb_s),
        "kernel_bandwidth_fraction": by_format(lambda speed: speed.fractions),
        "isa": isa or _cpu.usable_isas()[0],
        "processor": processor(),
        "threads": count,
        "peak_memory_bytes": peak_memory(),
    }
    console().print(kernel_table(report))
    console().print(f"reading memory: {bandwidth.median:.1f} GB/s")
    print(json.dumps(report))


@bench.command()
def decode(
    model: ModelOption = None,
    shape: ShapeOption = None,
    quant: QuantOption = "auto",
    threads: ThreadsOption = None,
    device: DeviceOption = "cpu",
    context: ContextOption = 512,
    draft_tokens: DraftOption = 3,
    acceptance: AcceptanceOption = None,
    repeats: RepeatsOption = 7,
    tokens: Annotated[int, typer.Option(help="Tokens of each decoding run.", min=1)] = 48,
    plot: Annotated[
        Path | None, typer.Option(help="Write a plot of the cost curve to this PNG file.", show_default=False)
    ] = None,
) -> None:
    """Passes of 1 to 16 rows, draft steps, prefill, and decoding with and without MTP.

    \b
    Examples:
      paceline bench decode -m tiny-python
      paceline bench decode -m gemma-4-E2B-it-Q4_K_M.gguf
      paceline bench decode --shape e2b --acceptance 0.8,0.65,0.5 --plot costs.png
    """
    from paceline.bench.loading import open_pair
    from paceline.bench.report import console, plot_costs, print_decode

    _check_choice(model, shape)
    shares = _shares(acceptance, draft_tokens, shape)
    loaded = open_pair(model, shape, quant, threads, device, context, room=max(context + 2 * tokens, PROMPT) + 64)
    run = loaded.bench
    forward = run.forward_ms(repeats)
    exact = run.same_bits()
    step = run.draft_step_ms(repeats) if run.backend.info.has_drafter else None
    costs = run.costs() if run.backend.info.has_drafter else None
    modes: dict[str, tuple[int | None, tuple[float, ...] | None]] = {
        "plain": (0, None),
        "mtp": (draft_tokens, shares),
        "auto": (None, shares),
        "auto_useless": (None, ()),
    }
    speeds: dict[str, list[float]] = {mode: [] for mode in modes}
    for _ in range(3 if device == "cpu" else 4):  # alternating, so that changes of the machine's speed affect all modes
        for mode, (depth, accepted) in modes.items():
            speeds[mode].append(run.decode_tokens_per_s(tokens, depth, accepted, costs))

    for seen in speeds.values():  # the first round on a device records what it runs
        del seen[:-3]

    def speedup(mode: str) -> float:
        return statistics.median(b / a for a, b in zip(speeds["plain"], speeds[mode], strict=True))

    report = loaded.report("decode") | {
        "forward_ms": {str(rows): ms for rows, ms in forward.items()},
        "forward_of_one_row": {str(rows): ms / forward[1] for rows, ms in forward.items()},
        "same_bits": exact,
        "bandwidth_fraction": loaded.pass_bytes / forward[1] / 1e6 / run.bandwidth.median,
        "draft_step_ms": step,
        "draft_tokens": draft_tokens,
        "simulated_acceptance": shares,
        "round_ms": list(costs.rounds) if costs else None,
        "plain_tokens_per_s": statistics.median(speeds["plain"]),
        "mtp_tokens_per_s": statistics.median(speeds["mtp"]),
        "speedup": speedup("mtp"),
        "auto_speedup": speedup("auto"),
        "auto_useless_speedup": speedup("auto_useless"),
        **loaded.prompt(3, PROMPT),
    }
    print_decode(console(), report)
    if plot:
        plot_costs(report, plot)
    print(json.dumps(report))


@bench.command()
def prompt(
    model: ModelOption = None,
    shape: ShapeOption = None,
    quant: QuantOption = "auto",
    threads: ThreadsOption = None,
    device: DeviceOption = "cpu",
    length: Annotated[int, typer.Option(help="Tokens of the prompt.", min=16)] = PROMPT,
    repeats: RepeatsOption = 5,
) -> None:
    """Speed of prefill."""
    from paceline.bench.loading import open_pair
    from paceline.bench.report import console, print_prompt

    _check_choice(model, shape)
    loaded = open_pair(model, shape, quant, threads, device, context=16, room=length + 64)
    figures = loaded.prompt(repeats, length)
    loaded.bench.bandwidth.measure()
    report = loaded.report("prompt") | figures
    print_prompt(console(), report)
    print(json.dumps(report))


def _check_choice(model: str | None, shape: str | None) -> None:
    from paceline.bench.shapes import TARGETS

    if (model is None) == (shape is None):
        raise SettingsError("give either --model or --shape")
    if shape is not None and shape not in TARGETS:
        raise SettingsError(f"unknown shape {shape!r}; use one of {', '.join(TARGETS)}")


def _shares(acceptance: str | None, draft_tokens: int, shape: str | None) -> tuple[float, ...] | None:
    if acceptance is None:
        if shape is not None:
            raise SettingsError("no drafts of random weights are accepted; simulate it with --acceptance 0.8,0.65,0.5")
        return None
    try:
        shares = tuple(float(part) for part in acceptance.split(","))
    except ValueError:
        shares = ()
    if not shares or sorted(shares, reverse=True) != list(shares) or not 0 <= shares[-1] <= shares[0] <= 1:
        raise SettingsError(f"--acceptance is {acceptance!r}; give rates from 1 down to 0, such as 0.8,0.65,0.5")
    if len(shares) != draft_tokens:
        raise SettingsError(f"--acceptance has {len(shares)} rates for draft length {draft_tokens}; give one for each")
    return shares
