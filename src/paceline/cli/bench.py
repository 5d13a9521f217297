"""`paceline bench`: how fast this machine is, and a model on it, beside the machine's own limit."""

from __future__ import annotations

import json
import os
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paceline.cli.options import ThreadsOption
from paceline.errors import SettingsError

if TYPE_CHECKING:
    from paceline.backends.cpu.backend import CpuBackend
    from paceline.bench.runs import Bench
    from paceline.config import TargetConfig

bench = typer.Typer(
    help="Measure kernels, decoding and prompts. Ends in one JSON line on stdout.", no_args_is_help=True
)

SHAPES = ("e2b", "e4b", "12b", "26b", "31b")
ModelOption = Annotated[str | None, typer.Option("--model", "-m", help="A model with its drafter.", metavar="MODEL")]
ShapeOption = Annotated[
    str | None, typer.Option(help="Random weights in an official shape.", metavar="|".join(SHAPES), show_default=False)
]
QuantOption = Annotated[str, typer.Option(help="Weight format.", metavar="f32|bf16|q8|q4")]
ContextOption = Annotated[int, typer.Option(help="Tokens in the cache before each measurement.", min=16)]
DraftOption = Annotated[int, typer.Option(help="Tokens drafted a round.", min=1, max=15)]
RepeatsOption = Annotated[int, typer.Option(help="Runs of each measurement; medians are shown.", min=1)]
AcceptanceOption = Annotated[
    str | None,
    typer.Option(
        help="Simulate acceptance: shares of rounds in which the draft at depth 1, 2, ... is accepted, such as "
        "0.8,0.65,0.5. Random weights accept nothing by themselves.",
        metavar="SHARES",
    ),
]
PROMPT = 512  # tokens of the prompt that is measured
CHUNK = 256  # prompt rows read in one pass


@bench.command()
def kernels(threads: ThreadsOption = None, repeats: RepeatsOption = 7) -> None:
    """Matrix kernels of every weight format, in bytes of weights a second, for 1 to 16 rows."""
    from paceline import _cpu
    from paceline.backends.cpu.backend import default_threads
    from paceline.bench.machine import ReadBandwidth, peak_memory
    from paceline.bench.report import console, kernel_table
    from paceline.bench.runs import kernel_gb_per_s
    from paceline.quant.blocks import FORMATS

    count = threads or default_threads()
    isa = _isa()
    bandwidth = ReadBandwidth(count)
    speeds = {fmt: kernel_gb_per_s(fmt, count, isa, repeats, bandwidth) for fmt in FORMATS}
    report: dict[str, Any] = {
        "benchmark": "kernels",
        "read_bandwidth_gb_s": bandwidth.median,
        "kernel_gb_s": {fmt: {str(rows): speed for rows, speed in by_rows.items()} for fmt, by_rows in speeds.items()},
        "isa": isa or _cpu.usable_isas()[0],
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
    quant: QuantOption = "q4",
    threads: ThreadsOption = None,
    context: ContextOption = 512,
    draft_tokens: DraftOption = 3,
    acceptance: AcceptanceOption = None,
    repeats: RepeatsOption = 7,
    tokens: Annotated[int, typer.Option(help="Tokens of each decoding run.", min=1)] = 48,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the cost curve into this PNG file.", show_default=False)
    ] = None,
) -> None:
    """Passes of 1 to 16 rows, draft steps, a prompt, and decoding with and without MTP.

    \b
    Examples:
      paceline bench decode -m tiny-python --quant bf16
      paceline bench decode --shape e2b --acceptance 0.8,0.65,0.5 --plot costs.png
    """
    from paceline.bench.report import console, plot_costs, print_decode

    _check_choice(model, shape)
    shares = _shares(acceptance, draft_tokens, shape)
    loaded = _load(model, shape, quant, threads, context, room=max(context + 2 * tokens, PROMPT) + 64)
    run = loaded.bench
    forward = run.forward_ms(repeats)
    step = run.draft_step_ms(repeats) if run.backend.can_draft else None
    costs = run.costs() if run.backend.can_draft else None
    modes: dict[str, tuple[int | None, tuple[float, ...] | None]] = {
        "plain": (0, None),
        "mtp": (draft_tokens, shares),
        "auto": (None, shares),
        "auto_useless": (None, ()),
    }
    speeds: dict[str, list[float]] = {mode: [] for mode in modes}
    for _ in range(3):  # in turn, so that a change of the machine's speed meets all
        for mode, (depth, accepted) in modes.items():
            speeds[mode].append(run.decode_tokens_per_s(tokens, depth, accepted, costs))

    def speedup(mode: str) -> float:
        return statistics.median(b / a for a, b in zip(speeds["plain"], speeds[mode], strict=True))

    report = loaded.report("decode") | {
        "forward_ms": {str(rows): ms for rows, ms in forward.items()},
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
    quant: QuantOption = "q4",
    threads: ThreadsOption = None,
    length: Annotated[int, typer.Option(help="Tokens of the prompt.", min=16)] = PROMPT,
    repeats: RepeatsOption = 5,
) -> None:
    """How fast a prompt is read."""
    from paceline.bench.report import console, print_prompt

    _check_choice(model, shape)
    loaded = _load(model, shape, quant, threads, context=16, room=length + 64)
    figures = loaded.prompt(repeats, length)
    loaded.bench.bandwidth.measure()
    report = loaded.report("prompt") | figures
    print_prompt(console(), report)
    print(json.dumps(report))


@dataclass(frozen=True)
class _Loaded:
    """A pair ready to be measured, and what reports say of it."""

    bench: Bench
    config: TargetConfig
    weight_bytes: int  # of the target
    about: dict[str, Any]

    @property
    def pass_bytes(self) -> int:
        """Bytes of weights that a pass of one row reads: all but the experts it is not sent to."""
        from paceline.checkpoint.sizes import count_parameters

        parameters = count_parameters(self.config)
        return self.weight_bytes * parameters.active // parameters.effective

    def prompt(self, repeats: int, length: int) -> dict[str, Any]:
        from paceline.bench.shapes import prompt_multiply_accumulates

        speed = self.bench.prompt_tokens_per_s(repeats, length)
        work = prompt_multiply_accumulates(self.config)
        return {
            "prompt_tokens": length,
            "prompt_tokens_per_s": speed,
            "prompt_multiply_accumulates_per_s": speed * work,
        }

    def report(self, benchmark: str) -> dict[str, Any]:
        from paceline.bench.machine import peak_memory

        return {
            "benchmark": benchmark,
            **self.about,
            "context": self.bench.context,
            "read_bandwidth_gb_s": self.bench.bandwidth.median,
            "weight_bytes": self.weight_bytes,
            "pass_bytes": self.pass_bytes,
            "peak_memory_bytes": peak_memory(),
        }


def _load(model: str | None, shape: str | None, quant: str, threads: int | None, context: int, room: int) -> _Loaded:
    from paceline.backends.cpu.backend import CpuBackend, default_threads
    from paceline.bench.machine import ReadBandwidth
    from paceline.bench.runs import Bench

    count = threads or default_threads()
    if shape is not None:
        backend, config, weight_bytes = _random_pair(shape, quant, count, room)
    else:
        import paceline

        assert model is not None
        engine = paceline.load(model, quant=quant, threads=count, context=room, prompt_chunk=CHUNK)
        assert isinstance(engine.backend, CpuBackend)
        backend, config, weight_bytes = engine.backend, engine.target_config, engine.weight_bytes
    if room > backend.context:
        raise SettingsError(f"this takes {room} positions and the model has {backend.context}; measure fewer")
    about = {"model": model or shape, "random_weights": model is None, "quant": quant, "threads": count}
    run = Bench(backend, context, CHUNK, ReadBandwidth(count))
    return _Loaded(run, config, weight_bytes, {**about, "isa": backend.isa})


def _random_pair(shape: str, quant: str, threads: int, room: int) -> tuple[CpuBackend, TargetConfig, int]:
    from paceline.backends.cpu.backend import CpuBackend
    from paceline.backends.formats import DRAFTER_FORMAT
    from paceline.bench.random_weights import RandomWeights
    from paceline.bench.shapes import official_drafter, official_target

    if shape not in SHAPES:
        raise SettingsError(f"unknown shape {shape!r}; use one of {', '.join(SHAPES)}")
    if quant not in DRAFTER_FORMAT:
        raise SettingsError(f"unknown quantisation {quant!r}; use one of {', '.join(DRAFTER_FORMAT)}")
    config, drafter = official_target(shape), official_drafter(shape)
    weights = RandomWeights(config, quant)
    backend = CpuBackend(
        (config, weights),
        (drafter, RandomWeights(drafter, DRAFTER_FORMAT[quant])),
        threads=threads,
        context=room,
        max_rows=CHUNK,
        isa=_isa(),
    )
    return backend, config, weights.nbytes


def _check_choice(model: str | None, shape: str | None) -> None:
    if (model is None) == (shape is None):
        raise SettingsError("give either --model or --shape")


def _shares(acceptance: str | None, draft_tokens: int, shape: str | None) -> tuple[float, ...] | None:
    if acceptance is None:
        if shape is not None:
            raise SettingsError("random weights accept no drafts; simulate them with --acceptance 0.8,0.65,0.5")
        return None
    try:
        shares = tuple(float(part) for part in acceptance.split(","))
    except ValueError:
        shares = ()
    if not shares or sorted(shares, reverse=True) != list(shares) or not 0 <= shares[-1] <= shares[0] <= 1:
        raise SettingsError(f"--acceptance is {acceptance!r}; give shares from 1 down to 0, such as 0.8,0.65,0.5")
    if len(shares) != draft_tokens:
        raise SettingsError(
            f"--acceptance has {len(shares)} shares for {draft_tokens} drafted tokens; give one for each"
        )
    return shares


def _isa() -> str:
    return os.environ.get("PACELINE_ISA", "")
