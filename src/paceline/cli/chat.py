"""`paceline chat`: a conversation in a terminal, or one turn a line from a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from paceline.cli import options as opt
from paceline.cli.chat_terminal import Terminal
from paceline.cli.conversation import Conversation, Turn, figures
from paceline.cli.sampling import Changes, StopOption, with_sampling_options
from paceline.errors import PacelineError, PromptError
from paceline.sampling_params import check_sampling_params

if TYPE_CHECKING:
    from paceline import Engine

FAILED = 1  # what a pipe's last command returns when a line of it failed
CACHE_MEMORY = 1 << 30  # bytes for what was read of the conversation


@with_sampling_options
def chat(
    sampling: Changes,
    model: opt.ModelOption = opt.DEFAULT_MODEL,
    drafter: opt.DrafterOption = "auto",
    system: Annotated[str, typer.Option(help="The system prompt.", metavar="TEXT", show_default=False)] = "",
    max_tokens: opt.MaxTokensOption = 1024,
    draft_tokens: opt.DraftTokensOption = "auto",
    quant: opt.QuantOption = "auto",
    threads: opt.ThreadsOption = None,
    device: opt.DeviceOption = "cpu",
    context: Annotated[
        int | None,
        typer.Option(help="Tokens a conversation may hold; the model's limit, at most 32768, if not given.", min=2),
    ] = None,
    stop: StopOption = None,
) -> None:
    """Talk with a model.

    What was read of the conversation is kept, so each turn reads only what is
    new. /help lists the commands. From a pipe, each line is one message:
    answers go to stdout, all else to stderr.

    \b
    Examples:
      paceline chat -m google/gemma-4-E2B-it
      paceline chat -m ./gemma-4-E2B-it --quant q4 --system "Answer in one line."
      paceline chat --temperature 0.7 < questions.txt
    """
    import paceline
    from paceline.text.stops import check_stops

    engine = paceline.load(
        model,
        drafter=drafter,
        device=device,
        quant=quant,
        threads=threads,
        context=context,
        draft_tokens=opt.draft_tokens_of(draft_tokens),
        cache_memory=CACHE_MEMORY,
        notify=opt.note,
    )
    if engine.chat_template is None:
        raise PromptError(f"{model}: has no chat template; use paceline generate --raw, or the -it model")
    params = check_sampling_params(replace(engine.sampling, **sampling), engine.backend.vocab_size)
    conversation = Conversation(engine, params, max_tokens, check_stops(stop or ()), system=system)
    interactive = all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))
    if not converse(conversation, Terminal(_title(model, engine)) if interactive else Pipe()) and not interactive:
        raise typer.Exit(FAILED)


def converse(conversation: Conversation, screen: Pipe | Terminal) -> bool:
    """Take lines until they end. An error costs a turn, not the conversation; says whether there was none."""
    well = True
    for line in screen.lines():
        try:
            reply = conversation.take(line)
            if reply.text:
                screen.say(reply.text)
            if reply.turn:
                screen.show(reply.turn)
            if reply.end:
                break
        except PacelineError as error:
            well = False
            screen.complain(" ".join(str(error).split()))
        except KeyboardInterrupt:
            if isinstance(screen, Pipe):
                raise
        except MemoryError:
            well = False
            screen.complain("not enough memory for this; /clear, or start again with --quant q4")
    return well


class Pipe:
    """One message a line; answers to stdout, all else to stderr."""

    def lines(self) -> Iterator[str]:
        if sys.stdin is None:
            raise PromptError("stdin: is closed; give messages, one a line")
        for line in sys.stdin.buffer:
            try:
                yield line.decode()
            except UnicodeDecodeError:
                self.complain("stdin: this line is not UTF-8 text; convert it first, for example with iconv -t UTF-8")

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def complain(self, text: str) -> None:
        opt.note(f"error: {text}")

    def show(self, turn: Turn) -> None:
        with turn:
            try:
                for event in turn:
                    print(event.text, end="", flush=True)
            finally:
                if not turn.text.endswith("\n"):
                    print(flush=True)
        self.say(figures(turn.stream.statistics) + (", cut off" if turn.finish == "length" else ""))


def _title(model: str, engine: Engine) -> str:
    pair = "with its drafter" if engine.drafter_config else "without a drafter"
    return f"{model} {pair}, {engine.quant}, {engine.threads} threads. /help lists commands, Ctrl-D ends."
