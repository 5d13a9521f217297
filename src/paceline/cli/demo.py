"""`paceline demo`: the same text without and with drafts, and the speed-up."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Annotated

import typer

from paceline.cli import options as opt
from paceline.errors import SettingsError
from paceline.sampling_params import GREEDY

if TYPE_CHECKING:
    from rich.console import Console

    from paceline import Engine
    from paceline.engine.engine import DraftTokens
    from paceline.types import Generation

PROMPT = '''\
import socket
import threading


class Server:
    """Serve requests over a socket."""

    def handle(self, request):
        """Handle one request."""
        try:
            data = request.recv(1024)
'''
MIN_RUNS, MAX_RUNS, MAX_SECONDS = 3, 9, 5.0  # of timing
COLOURS = ("green", "cyan", "blue", "magenta", "yellow")  # of drafted tokens by depth; deeper ones keep the last

Output = tuple[str, tuple[int, ...]]  # text and tokens


@dataclass(frozen=True)
class Comparison:
    """Plain decoding against decoding with drafts."""

    plain: float  # tokens/s, median
    drafted: float  # tokens/s, median
    acceptance_length: float
    speed_up: float  # median over pairs of adjacent runs
    runs: int
    same_text: bool


def demo(
    model: opt.ModelOption = opt.DEFAULT_MODEL,
    drafter: opt.DrafterOption = "auto",
    quant: opt.QuantOption = "auto",
    threads: opt.ThreadsOption = None,
    draft_tokens: opt.DraftTokensOption = "auto",
    max_tokens: Annotated[int, typer.Option(help="Maximum number of generated tokens.", min=2)] = 200,
) -> None:
    """Compare a model with and without drafting.

    The same Python code is continued twice; in the second text, colours show
    which tokens were drafted and accepted. Both are then timed alternately, and
    the table gives the medians. The exit code is 1 if the texts differ, which
    would be a defect.

    \b
    Examples:
      paceline demo
      paceline demo --draft-tokens 2 --threads 1
      paceline demo --model google/gemma-4-E2B-it --quant q4 --max-tokens 64
    """
    from rich.console import Console
    from rich.markup import escape

    drafts = opt.draft_tokens_of(draft_tokens)
    engine = opt.load(model, drafter=drafter, quant=quant, threads=threads, draft_tokens=draft_tokens)
    if engine.drafter_config is None:
        raise SettingsError(f"{model}: has no drafter to compare with; give --drafter")
    console = Console(highlight=False)
    quant, threads = engine.backend.info.quant, engine.backend.threads
    console.print(f"[dim]{escape(model)}, {quant}, {threads} threads; the prompt is Python code:[/]\n")
    console.print(PROMPT, markup=False, soft_wrap=True, style="dim")
    shown = []
    many = "adaptive draft length" if drafts == "auto" else f"draft length {drafts}"
    modes: tuple[tuple[DraftTokens, str], ...] = ((0, "Plain decoding"), (drafts, f"With drafts, {many}"))
    for depth, title in modes:
        console.print(f"\n[bold]{title}[/]{_legend(depth)}\n", soft_wrap=True)
        shown.append(_show(console, engine, depth, max_tokens))
    if min(len(tokens) for _, tokens in shown) < 2:
        raise SettingsError(
            f"{model}: stopped after fewer than two tokens, so there is no speed to compare; try another model"
        )
    console.print("\n[dim]timing both alternately ...[/]")  # no spinner: its thread would disturb timings
    plain: list[Generation] = []
    drafted: list[Generation] = []
    started = perf_counter()
    while len(plain) < MIN_RUNS or (len(plain) < MAX_RUNS and perf_counter() - started < MAX_SECONDS):
        for depth, runs in ((0, plain), (drafts, drafted)):
            runs.append(engine.generate(PROMPT, raw=True, sampling=GREEDY, max_tokens=max_tokens, draft_tokens=depth))
    comparison = compare(plain, drafted, shown)
    _print_table(console, comparison)
    if not comparison.same_text:
        raise typer.Exit(1)


def compare(plain: list[Generation], drafted: list[Generation], shown: list[Output]) -> Comparison:
    """Medians of the timed runs, and whether all runs gave the same text."""
    texts = {(generation.text, generation.tokens) for generation in plain + drafted} | set(shown)
    return Comparison(
        plain=median(generation.statistics.tokens_per_second for generation in plain),
        drafted=median(generation.statistics.tokens_per_second for generation in drafted),
        acceptance_length=median(generation.statistics.acceptance_length for generation in drafted),
        speed_up=median(
            after.statistics.tokens_per_second / before.statistics.tokens_per_second
            for before, after in zip(plain, drafted, strict=True)
        ),
        runs=len(plain),
        same_text=len(texts) == 1,
    )


def _show(console: Console, engine: Engine, draft_tokens: DraftTokens, max_tokens: int) -> Output:
    from rich.text import Text

    written = ""
    tokens: list[int] = []
    for event in engine.stream(PROMPT, raw=True, sampling=GREEDY, max_tokens=max_tokens, draft_tokens=draft_tokens):
        written += event.text
        tokens += (delta.token for delta in event.deltas)
        text = Text.assemble(*((delta.text, _colour(delta.depth)) for delta in event.deltas), event.rest)
        console.print(text, end="", soft_wrap=True)
    console.print()
    return written, tuple(tokens)


def _colour(depth: int) -> str:
    return COLOURS[min(depth, len(COLOURS)) - 1] if depth else ""


def _legend(draft_tokens: DraftTokens) -> str:
    if not draft_tokens:
        return ""
    deepest = len(COLOURS) if draft_tokens == "auto" else draft_tokens
    marks = " ".join(f"[{_colour(depth)}]{depth}[/]" for depth in range(1, deepest + 1))
    return f" [dim](accepted draft tokens by depth:[/] {marks}[dim]; uncoloured: sampled by the target)[/]"


def _print_table(console: Console, comparison: Comparison) -> None:
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("plain", f"{comparison.plain:.1f} tokens/s")
    table.add_row("with drafts", f"{comparison.drafted:.1f} tokens/s")
    table.add_row("speed-up", f"{comparison.speed_up:.2f}")
    table.add_row("acceptance length", f"{comparison.acceptance_length:.2f} tokens per round")
    table.add_row("same text", "[green]yes[/]" if comparison.same_text else "[bold red]NO[/]")
    console.print()
    console.print(table)
    console.print(f"[dim]speeds: medians of {comparison.runs} alternating runs each, without prefill[/]")
