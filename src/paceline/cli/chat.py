"""`paceline chat`: a conversation in a terminal, or with one message per line from a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from paceline.cli import options as opt
from paceline.cli.chat_terminal import Terminal
from paceline.cli.conversation import Conversation, Turn, summary
from paceline.cli.sampling import Changes, StopOption, with_sampling_options
from paceline.errors import PacelineError, PromptError
from paceline.sampling_params import check_sampling_params

if TYPE_CHECKING:
    from paceline import Engine

FAILED = 1  # exit code if a line from a pipe failed
CACHE_MEMORY = 1 << 30  # bytes of the prefix cache


@with_sampling_options
def chat(
    sampling: Changes,
    model: opt.ModelOption = opt.DEFAULT_MODEL,
    drafter: opt.DrafterOption = "auto",
    system: Annotated[str, typer.Option(help="The system prompt.", metavar="TEXT", show_default=False)] = "",
    max_tokens: opt.MaxTokensOption = 1024,
    draft_tokens: opt.DraftTokensOption = "auto",
    quant: opt.QuantOption = "auto",
    kv: opt.KvOption = "auto",
    threads: opt.ThreadsOption = None,
    device: opt.DeviceOption = "cpu",
    context: opt.ContextOption = None,
    stop: StopOption = None,
) -> None:
    """Chat with a model.

    The KV cache of the conversation is kept, so each turn prefills only the
    new message. /help lists the commands. From a pipe, each line is one
    message: answers go to stdout, everything else to stderr.

    \b
    Examples:
      paceline chat -m google/gemma-4-E2B-it
      paceline chat -m ./gemma-4-E2B-it --quant q4 --system "Answer in one line."
      paceline chat --temperature 0.7 < questions.txt
    """
    from paceline.text.stops import check_stops

    engine = opt.load(
        model,
        drafter=drafter,
        device=device,
        quant=quant,
        kv=kv,
        threads=threads,
        context=context,
        draft_tokens=draft_tokens,
        cache_memory=CACHE_MEMORY,
    )
    if engine.chat_template is None:
        raise PromptError(f"{model}: has no chat template; use paceline generate --raw, or the -it model")
    params = check_sampling_params(replace(engine.sampling, **sampling), engine.backend.info.vocab_size)
    conversation = Conversation(engine, params, max_tokens, check_stops(stop or ()), system=system)
    interactive = all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))
    if not converse(conversation, Terminal(_title(model, engine)) if interactive else Pipe()) and not interactive:
        raise typer.Exit(FAILED)


def converse(conversation: Conversation, interface: Pipe | Terminal) -> bool:
    """Handle all lines. Errors end a turn, not the conversation; returns whether there were none."""
    succeeded = True
    for line in interface.lines():
        try:
            reply = conversation.handle(line)
            if reply.text:
                interface.say(reply.text)
            if reply.turn:
                interface.show(reply.turn)
            if reply.end:
                break
        except PacelineError as error:
            succeeded = False
            interface.error(" ".join(str(error).split()))
        except KeyboardInterrupt:
            if isinstance(interface, Pipe):
                raise
        except MemoryError:
            succeeded = False
            interface.error("not enough memory; use /clear, or start again with --quant q4")
    return succeeded


class Pipe:
    """One message per line; answers go to stdout, everything else to stderr."""

    def lines(self) -> Iterator[str]:
        if sys.stdin is None:
            raise PromptError("stdin: is closed; give one message per line")
        for line in sys.stdin.buffer:
            try:
                yield line.decode()
            except UnicodeDecodeError:
                self.error("stdin: this line is not UTF-8 text; convert it first, for example with iconv -t UTF-8")

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def error(self, text: str) -> None:
        opt.note(f"error: {text}")

    def show(self, turn: Turn) -> None:
        with turn:
            try:
                for event in turn:
                    print(event.text, end="", flush=True)
            finally:
                if not turn.text.endswith("\n"):
                    print(flush=True)
        self.say(summary(turn.stream.statistics) + (", cut off" if turn.finish == "length" else ""))


def _title(model: str, engine: Engine) -> str:
    pair = "with its drafter" if engine.drafter_config else "without a drafter"
    quant, threads = engine.backend.info.quant, engine.backend.threads
    return f"{model} {pair}, {quant}, {threads} threads. /help lists commands, Ctrl-D ends."
