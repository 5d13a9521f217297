"""`paceline bench`: speed of kernels, decoding and prefill, compared with the memory bandwidth."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from paceline.cli.options import DeviceOption, KvOption, ThreadsOption
from paceline.errors import SettingsError
from paceline.quant.formats import FORMATS
from paceline.quant.recipes import DEFAULT, METAVAR

bench = typer.Typer(
    help="Measure kernels, decoding and prefill. The last line on stdout is JSON.", no_args_is_help=True
)

LEAST_CONTEXT = 16

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
ContextOption = Annotated[int, typer.Option(help="Tokens in the KV cache before each measurement.", min=LEAST_CONTEXT)]
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
OverlapOption = Annotated[
    float | None,
    typer.Option(
        help="SIMULATE a mixture's choice of experts: the share that neighbouring rows have in common; 0 for as many "
        "as by chance. Without it 0.3 for a shape, and a model's own choice.",
        min=0,
        max=0.9,
        show_default=False,
    ),
]
IsaOption = Annotated[
    str | None,
    typer.Option(
        help="Instruction set, or all that this processor has, in turns. Without it the best one, or PACELINE_ISA.",
        metavar="NAME|all",
        show_default=False,
    ),
]
PROMPT = 512  # tokens of the prompt that is measured
SOME_ROWS = (1, 2, 4, 8, 16)  # of passes where much else varies


@bench.command()
def kernels(
    threads: ThreadsOption = None,
    repeats: RepeatsOption = 7,
    isa: IsaOption = None,
    formats: Annotated[
        str | None, typer.Option(help="Weight formats, such as q4_0,q6_k; all without it.", show_default=False)
    ] = None,
) -> None:
    """Matrix kernels of the weight formats for 1 to 64 rows, beside the limits of memory and of arithmetic."""
    from paceline.backends.cpu.processors import default_threads
    from paceline.bench.kernels import KernelBench
    from paceline.bench.machine import peak_memory, processor
    from paceline.bench.report import console, kernel_isas_tables, kernel_table

    names = formats.split(",") if formats else list(FORMATS)
    if unknown := set(names) - set(FORMATS):
        raise SettingsError(f"unknown in --formats: {', '.join(sorted(unknown))}; use {', '.join(FORMATS)}")
    count, isas = threads or default_threads(), _isas(isa)
    measured = KernelBench(isas, count, repeats)
    found = {fmt: measured.run(fmt) for fmt in names}
    report: dict[str, Any] = {
        "benchmark": "kernels",
        "read_bandwidth_gb_s": measured.bandwidth.median,
        "kernels": {name: {fmt: by_isa[name] for fmt, by_isa in found.items()} for name in isas},
        "processor": processor(),
        "threads": count,
        "peak_memory_bytes": peak_memory(),
    }
    out = console()
    for name in isas:
        out.print(kernel_table(report, name))
    if len(isas) > 1:
        for table in kernel_isas_tables(report):
            out.print(table)
    out.print(f"reading memory: {measured.bandwidth.median:.1f} GB/s")
    print(json.dumps(report))


@bench.command()
def decode(
    model: ModelOption = None,
    shape: ShapeOption = None,
    quant: QuantOption = "auto",
    kv: KvOption = "auto",
    threads: ThreadsOption = None,
    device: DeviceOption = "cpu",
    context: ContextOption = 512,
    contexts: Annotated[
        str | None,
        typer.Option(
            help="Only passes, after contexts of several lengths, such as 512,4096,16384.",
            metavar="LENGTHS",
            show_default=False,
        ),
    ] = None,
    draft_tokens: DraftOption = 3,
    acceptance: AcceptanceOption = None,
    expert_overlap: OverlapOption = None,
    isa: IsaOption = None,
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
      paceline bench decode --shape e2b --isa all
      paceline bench decode --shape e2b --contexts 512,4096,16384
    """
    from paceline.bench.decoding import by_context, by_isa, whole
    from paceline.bench.loading import open_pairs
    from paceline.bench.report import console, plot_costs, print_contexts, print_decode, print_isas

    _check_choice(model, shape)
    lengths = _contexts(contexts)
    names = _isas(isa) if isa else [""]
    passes_only = bool(lengths) or len(names) > 1
    shares = None if passes_only else _shares(acceptance, draft_tokens, shape)
    first, longest = (lengths[0], lengths[-1]) if lengths else (context, context)
    room = max(longest + 2 * tokens, PROMPT) + 64
    pairs = open_pairs(model, shape, quant, threads, device, first, room, expert_overlap, kv, names)
    if lengths:
        report = by_context(pairs[0], repeats, SOME_ROWS, lengths)
        print_contexts(console(), report)
    elif len(names) > 1:
        report = by_isa(pairs, repeats, SOME_ROWS, PROMPT)
        print_isas(console(), report["isas"])
    else:
        report = whole(pairs[0], repeats, draft_tokens, shares, tokens, PROMPT)
        print_decode(console(), report)
        if plot:
            plot_costs(report, plot)
    print(json.dumps(report))


@bench.command()
def prompt(
    model: ModelOption = None,
    shape: ShapeOption = None,
    quant: QuantOption = "auto",
    kv: KvOption = "auto",
    threads: ThreadsOption = None,
    device: DeviceOption = "cpu",
    length: Annotated[int, typer.Option(help="Tokens of the prompt.", min=16)] = PROMPT,
    repeats: RepeatsOption = 5,
) -> None:
    """Speed of prefill."""
    from paceline.bench.loading import open_pairs
    from paceline.bench.report import console, print_prompt

    _check_choice(model, shape)
    [loaded] = open_pairs(model, shape, quant, threads, device, context=16, room=length + 64, kv=kv)
    loaded.bench.probe()
    figures = loaded.prompt(repeats, length)
    report = loaded.report("prompt") | figures
    print_prompt(console(), report)
    print(json.dumps(report))


def _check_choice(model: str | None, shape: str | None) -> None:
    from paceline.bench.shapes import TARGETS

    if (model is None) == (shape is None):
        raise SettingsError("give either --model or --shape")
    if shape is not None and shape not in TARGETS:
        raise SettingsError(f"unknown shape {shape!r}; use one of {', '.join(TARGETS)}")


def _isas(isa: str | None) -> list[str]:
    """The instruction sets to measure."""
    from paceline import _cpu

    usable: list[str] = _cpu.usable_isas()
    if isa == "all":
        return usable
    chosen = isa or os.environ.get("PACELINE_ISA") or usable[0]
    if chosen not in usable:
        raise SettingsError(f"no {chosen} kernels on this processor; use {', '.join(usable)} or all")
    return [chosen]


def _contexts(lengths: str | None) -> list[int]:
    if lengths is None:
        return []
    found = [int(part) if part.isdecimal() else 0 for part in lengths.split(",")]
    if found != sorted(set(found)) or found[0] < LEAST_CONTEXT:
        raise SettingsError(f"--contexts is {lengths!r}; give ascending lengths from {LEAST_CONTEXT}, such as 512,4096")
    return found


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
