"""`paceline generate`: streams text to stdout, and prints statistics to stderr."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated

import typer

from paceline.cli import options as opt
from paceline.cli.sampling import Changes, StopOption, with_sampling_options
from paceline.errors import PromptError, SettingsError

if TYPE_CHECKING:
    from paceline import Engine, Stream
    from paceline.types import Event, Logprobs, SamplingParams, Statistics

INTERRUPTED = 130  # the shell's exit code after Ctrl-C


@with_sampling_options
def generate(
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from stdin.", metavar="PROMPT")],
    sampling: Changes,
    model: opt.ModelOption = opt.DEFAULT_MODEL,
    drafter: opt.DrafterOption = "auto",
    max_tokens: opt.MaxTokensOption = 256,
    draft_tokens: opt.DraftTokensOption = "auto",
    device: opt.DeviceOption = "cpu",
    quant: opt.QuantOption = "auto",
    kv: opt.KvOption = "auto",
    threads: opt.ThreadsOption = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt without the model's chat template.")] = False,
    stop: StopOption = None,
    logprobs: Annotated[
        int | None,
        typer.Option(help="With --json: log-probabilities of each token and of N alternatives.", metavar="N", min=0),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of streaming text.")] = False,
) -> None:
    """Generate text from a prompt.

    The text is the same with and without the drafter, only faster. Text goes to
    stdout, statistics go to stderr. Ctrl-C stops and keeps the text so far.

    \b
    Examples:
      paceline generate --raw "def fibonacci(n):"
      paceline generate -m google/gemma-4-E2B-it "Why is the sky blue?"
      paceline generate -m ./gemma-4-E2B-it --quant q4 --draft-tokens 0 "Hi"
      paceline generate --raw --temperature 0.7 --seed 1 "class Stack:"
      git diff | paceline generate -m google/gemma-4-E4B-it --json -
    """
    text = _read_stdin() if prompt == "-" else prompt
    if logprobs is not None and not as_json:
        raise SettingsError("--logprobs needs --json; add it")
    engine = opt.load(
        model, drafter=drafter, quant=quant, kv=kv, threads=threads, draft_tokens=draft_tokens, device=device
    )
    stream = engine.stream(
        text,
        sampling=replace(engine.sampling, **sampling),
        max_tokens=max_tokens,
        stop=stop or (),
        logprobs=logprobs,
        raw=raw,
    )
    events: list[Event] = []
    interrupted = False
    try:
        for event in stream:
            events.append(event)
            if not as_json:
                print(event.text, end="", flush=True)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        stream.close()
    if as_json:
        print(json.dumps(_report(model, engine, stream, events), ensure_ascii=False))
    elif not (events and events[-1].text.endswith("\n")):
        print(flush=True)
    print(_line(stream.statistics, stream.sampling), file=sys.stderr)
    if interrupted:
        raise typer.Exit(INTERRUPTED)


def _read_stdin() -> str:
    if sys.stdin is None:
        raise PromptError("stdin: is closed; give the prompt as an argument")
    return opt.decode_text(sys.stdin.buffer.read(), "stdin")


def _line(statistics: Statistics, sampling: SamplingParams) -> str:
    accepted = f"{statistics.accepted} of {statistics.drafted} drafts accepted" if statistics.drafted else "no drafts"
    return (
        f"{statistics.tokens} tokens, {statistics.tokens_per_second:.1f} tokens/s, "
        f"acceptance length {statistics.acceptance_length:.2f} ({statistics.rounds} rounds, {accepted}), "
        f"prompt {statistics.prompt_tokens} tokens in {statistics.prompt_seconds:.2f} s"
        + (f", seed {sampling.seed}" if sampling.temperature else "")
    )


def _report(model: str, engine: Engine, stream: Stream, events: list[Event]) -> dict[str, object]:
    statistics = stream.statistics
    reports = [delta.logprobs for event in events for delta in event.deltas if delta.logprobs]
    return {
        "text": "".join(event.text for event in events),
        "tokens": [delta.token for event in events for delta in event.deltas],
        "finish": (events[-1].finish if events else None) or "cancelled",
        "prompt_tokens": statistics.prompt_tokens,
        "prompt_seconds": statistics.prompt_seconds,
        "seconds": statistics.seconds,
        "tokens_per_second": statistics.tokens_per_second,
        "rounds": statistics.rounds,
        "drafted": statistics.drafted,
        "accepted": statistics.accepted,
        "acceptance_length": statistics.acceptance_length,
        "acceptance_by_depth": list(statistics.acceptance_by_depth),
        "model": model,
        "quant": engine.backend.info.quant,
        "kv": engine.backend.info.kv,
        "draft_tokens": engine.draft_tokens if engine.drafter_config else 0,
        "sampling": asdict(stream.sampling),
        **({"logprobs": [_logprobs(report) for report in reports]} if reports else {}),
    }


def _logprobs(report: Logprobs) -> dict[str, object]:
    return {"logprob": report.token, "top": [{"token": token, "logprob": value} for token, value in report.top]}
