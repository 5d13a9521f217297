"""`paceline demo`: the same texts without and with drafts, and what it saves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paceline.cli import options as opt
from paceline.errors import CheckpointError, SettingsError
from paceline.sampling_params import or_official

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from paceline import Engine
    from paceline.types import Event, Generation

LINES = 4  # shown of each text, so that all fits a small terminal
MIN_RUNS, MAX_RUNS, MAX_SECONDS = 3, 9, 3.0  # of timing, for each text
COLOURS = ("green", "cyan", "blue", "magenta", "yellow")  # of drafted tokens by depth; deeper ones keep the last

Output = tuple[str, tuple[int, ...]]  # text and tokens


@dataclass(frozen=True)
class Task:
    """What is written. No drafter was trained on it; the seed is one whose text is worth reading."""

    title: str
    seed: int
    beginning: str  # for models without a chat template
    question: str = ""  # for others


TASKS = (
    Task("prose", 3, "The lighthouse keeper had seen many storms, but", "Write a short story about a stormy night."),
    Task("code", 1, "def count_words(text):\n", "Write a Python function that counts the words of a text."),
    Task("a list", 1, "Packing list for a week in the mountains:\n\n1.", "What do I pack for a week in the mountains?"),
)
CODE = (  # for a model that writes nothing else
    Task("a class", 1, "class Stack:\n    def push(self"),
    Task("a function", 3, 'def read_config(path):\n    """'),
    Task("a test", 4, "class TestParser(unittest.TestCase):\n    def test_"),
)


@dataclass(frozen=True)
class Comparison:
    """Plain decoding against decoding with drafts, of one text, after its first token, which the prompt gives."""

    plain_passes: int  # a token each
    passes: float  # with drafts, median
    plain_seconds: float  # median
    seconds: float  # with drafts, median
    same_text: bool

    def __str__(self) -> str:
        speeds = [self.plain_passes / seconds if seconds else 0.0 for seconds in (self.plain_seconds, self.seconds)]
        return f"{gain([self])} ({speeds[0]:.0f} -> {speeds[1]:.0f} tokens/s)"


def gain(found: Sequence[Comparison]) -> str:
    """What drafting saves over all texts."""
    passes, plain_passes = sum(one.passes for one in found), sum(one.plain_passes for one in found)
    seconds, plain_seconds = sum(one.seconds for one in found), sum(one.plain_seconds for one in found)
    speed_up = plain_seconds / seconds if seconds else 1.0
    return f"{passes:.0f} passes instead of {plain_passes}, {speed_up:.2f} times as fast"


def demo(
    model: opt.ModelOption = "",
    drafter: opt.DrafterOption = "auto",
    quant: opt.QuantOption = "auto",
    threads: opt.ThreadsOption = None,
    draft_tokens: opt.DraftTokensOption = "auto",
    max_tokens: Annotated[int, typer.Option(help="Maximum number of tokens of each text.", min=2)] = 128,
) -> None:
    """Compare a model with and without drafting.

    Three texts are sampled, at the model's own settings or those of Gemma 4,
    plain and with drafts; colours show which tokens were drafted and accepted.
    Both ways are then timed alternately. The last line sums it up. The exit
    code is 1 if the texts differ, which would be a defect.

    Without --model it is Gemma 3 270M, if it is installed (the extra `demo`),
    else the bundled tiny-python.

    \b
    Examples:
      paceline demo
      paceline demo --draft-tokens 2 --threads 1
      paceline demo --model google/gemma-4-E2B-it --max-tokens 64
    """
    from rich.console import Console

    if drafter == "none":
        raise SettingsError("--drafter none leaves nothing to compare; leave it out")
    model = model or _preferred()
    engine = opt.load(model, drafter=drafter, quant=quant, threads=threads, draft_tokens=draft_tokens)
    if engine.drafter_config is None:
        raise SettingsError(f"{model}: has no drafter to compare with; give --drafter")
    console = Console(highlight=False)
    _print_header(console, engine, model)
    found = []
    for task in CODE if model == opt.DEFAULT_MODEL else TASKS:
        shown = [_show(console, engine, task, depth, max_tokens) for depth in (0, None)]
        if shown[0] == shown[1] and len(shown[0][1]) < 2:
            console.print(f"[bold]{task.title}[/]: the model stopped at once\n")
            continue
        if console.is_terminal:
            console.print("[dim]timing both ways ...[/]", end="\r")  # no spinner: its thread would disturb timings
        found.append(compare(*_timed(engine, task, max_tokens), shown))
        console.print(f"[bold]{task.title}[/]: {found[-1]}\n", soft_wrap=True)
    if not found:
        raise SettingsError(f"{model}: stopped at once, so there is no speed to compare; try another model")
    same = all(one.same_text for one in found)
    console.print(
        f"[bold]{gain(found)}[/]; same text: {'[green]yes[/]' if same else '[bold red]NO[/]'}", soft_wrap=True
    )
    if not same:
        raise typer.Exit(1)


def _preferred() -> str:
    """The real model; the bundled one where that is not installed."""
    from paceline.checkpoint import demo_model, locate

    try:
        locate(demo_model.NAME, opt.note)
    except CheckpointError as error:
        opt.note(f"{error}; using {opt.DEFAULT_MODEL} instead")
        return opt.DEFAULT_MODEL
    return demo_model.NAME


def _print_header(console: Console, engine: Engine, model: str) -> None:
    from rich.markup import escape

    own, backend = or_official(engine.sampling), engine.backend
    how = f"temperature {own.temperature:g}, top-k {own.top_k}, top-p {own.top_p:g}"
    depths = " ".join(f"[{colour}]{depth}[/]" for depth, colour in enumerate(COLOURS, 1))
    console.print(
        f"[bold]{escape(model)}[/], weights: {backend.info.quant}, {backend.threads} threads, {how}", soft_wrap=True
    )
    console.print(f"[dim]accepted drafts by depth:[/] {depths}[dim]; speeds: medians, without the prompt[/]\n")


def compare(plain: Sequence[Generation], drafted: Sequence[Generation], shown: Sequence[Output]) -> Comparison:
    """Medians of the timed runs, and whether all runs gave the same text."""
    texts = {(generation.text, generation.tokens) for generation in (*plain, *drafted)} | set(shown)
    return Comparison(
        plain_passes=plain[0].statistics.rounds,
        passes=median(generation.statistics.rounds for generation in drafted),
        plain_seconds=median(generation.statistics.seconds for generation in plain),
        seconds=median(generation.statistics.seconds for generation in drafted),
        same_text=len(texts) == 1,
    )


def _timed(engine: Engine, task: Task, max_tokens: int) -> tuple[list[Generation], list[Generation]]:
    """Plain runs, and as many with drafts, in turns."""
    plain: list[Generation] = []
    drafted: list[Generation] = []
    started = perf_counter()
    while len(plain) < MIN_RUNS or (len(plain) < MAX_RUNS and perf_counter() - started < MAX_SECONDS):
        for depth, runs in ((0, plain), (None, drafted)):
            runs.append(engine.generate(**_request(engine, task, depth, max_tokens)))
    return plain, drafted


def _request(engine: Engine, task: Task, depth: int | None, max_tokens: int) -> dict[str, Any]:
    """Arguments of a generation; depth: None for the engine's own setting."""
    raw = engine.chat_template is None or not task.question
    params = replace(or_official(engine.sampling), seed=task.seed)
    prompt = task.beginning if raw else task.question
    return {"prompt": prompt, "raw": raw, "sampling": params, "max_tokens": max_tokens, "draft_tokens": depth}


def _show(console: Console, engine: Engine, task: Task, depth: int | None, max_tokens: int) -> Output:
    """Write a text on the screen as it comes; of the one with drafts the beginning stays."""
    from rich.live import Live
    from rich.text import Text

    request = _request(engine, task, depth, max_tokens)
    text = Text(task.beginning if request["raw"] else "")
    text.stylize("dim")
    written: list[Event] = []
    with Live(console=console, auto_refresh=False, transient=True) as live:
        for event in engine.stream(**request):
            written.append(event)
            text.append(Text.assemble(*((delta.text, _colour(delta.depth)) for delta in event.deltas), event.rest))
            live.update(Text("\n").join(_lines(text, console)[-LINES:]), refresh=console.is_terminal)
    if depth is None:
        lines = _lines(text, console)
        more = Text(" ..." if len(lines) > LINES else "", "dim")
        console.print(Text("\n").join(lines[:LINES]).append(more))
    return "".join(event.text for event in written), tuple(d.token for event in written for d in event.deltas)


def _lines(text: Text, console: Console) -> list[Text]:
    """As the screen shows them; blank ones are left out."""
    return [line for line in text.wrap(console, console.width - len(" ...")) if line.plain.strip()]


def _colour(depth: int) -> str:
    return COLOURS[min(depth, len(COLOURS)) - 1] if depth else ""
