"""The choices of an answer: their texts as events arrive, and what chat and completion answers have in common."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from paceline.engine.sequence import Sequence as EngineSequence
from paceline.server.http import KEEP_ALIVE_SECONDS
from paceline.server.runner import RunningRequest
from paceline.server.schemas import ChoicesRequest
from paceline.text.output_parser import OutputDelta, OutputParser
from paceline.text.tokenizer import Tokenizer
from paceline.types import Event, SamplingParams, Statistics, TokenDelta

MIN_LOGPROB = -9999.0  # JSON has no infinity


@dataclass
class Call:
    """A function call by the model."""

    id: str
    name: str
    arguments: str = ""  # JSON


class Choice:
    """One choice, while it is generated.

    Args:
        sequence: its sequence in the engine.
        tokenizer: for the texts of single tokens.
        in_reasoning: the prompt ends inside of reasoning.
        plain: the text is not parsed for reasoning and calls.
    """

    def __init__(
        self, sequence: EngineSequence, tokenizer: Tokenizer, in_reasoning: bool = False, plain: bool = False
    ) -> None:
        self._sequence, self._tokenizer = sequence, tokenizer
        self._parser = None if plain else OutputParser(in_reasoning)
        self.content = self.reasoning = ""
        self.calls: list[Call] = []
        self.tokens = self.reasoning_tokens = 0
        self.finish: str | None = None

    def push(self, event: Event) -> tuple[list[OutputDelta], list[TokenDelta]]:
        """Add an event.

        Returns:
            What it added, in order, and the tokens of the content among it.
        """
        deltas: list[OutputDelta] = []
        content_tokens: list[TokenDelta] = []
        parser = self._parser
        for token in event.deltas:
            content, reasoning = parser is None or parser.in_content, parser is not None and parser.in_reasoning
            deltas += self._parse(token.text)
            self.tokens += 1
            self.reasoning_tokens += parser is not None and (reasoning or parser.in_reasoning)
            if content and (parser is None or parser.in_content):
                content_tokens.append(token)
        deltas += self._parse(event.rest)
        if parser and event.finish == "stop":
            deltas += parser.finish()
        for delta in deltas:
            self._add(delta)
        if event.finish:
            self.finish = "tool_calls" if self.calls and event.finish == "stop" else event.finish
            if self._sequence.grammar and self._sequence.grammar.failed:
                self.finish = "length"  # cut off by a limit of the grammar, not of tokens
        return deltas, content_tokens

    def _parse(self, text: str) -> list[OutputDelta]:
        if self._parser:
            return self._parser.push(text)
        return [OutputDelta("content", text)] if text else []

    def _add(self, delta: OutputDelta) -> None:
        match delta.kind:
            case "content":
                self.content += delta.text
            case "reasoning":
                self.reasoning += delta.text
            case "call":
                self.calls.append(Call(f"call_{secrets.token_hex(12)}", delta.text))
            case "arguments":
                self.calls[delta.call].arguments += delta.text

    @property
    def statistics(self) -> Statistics:
        return self._sequence.statistics

    @property
    def sampling(self) -> SamplingParams:
        return self._sequence.params

    @property
    def report(self) -> dict[str, Any]:
        """The `paceline` field of an answer: how it was generated."""
        s = self.statistics
        return {
            "rounds": s.rounds,
            "drafted": s.drafted,
            "accepted": s.accepted,
            "acceptance_length": round(s.acceptance_length, 3),
            "acceptance_by_depth": [round(share, 3) for share in s.acceptance_by_depth],
            "tokens_per_second": round(s.tokens_per_second, 2),
            "prompt_seconds": round(s.prompt_seconds, 4),
            "queue_seconds": round(s.queue_seconds, 4),
            "seed": self.sampling.seed,
        }

    def token_logprobs(self, tokens: Sequence[TokenDelta]) -> list[dict[str, Any]]:
        """Log-probabilities of tokens in the form of chat completions; none where they were not asked for."""
        return [
            {
                **self._logprob(token.token, token.logprobs.token),
                "top_logprobs": [self._logprob(other, value) for other, value in token.logprobs.top],
            }
            for token in tokens
            if token.logprobs
        ]

    def _logprob(self, token: int, logprob: float) -> dict[str, Any]:
        raw = self._tokenizer.token_bytes(token)
        return {"token": self.token_text(token), "logprob": max(logprob, MIN_LOGPROB), "bytes": list(raw)}

    def token_text(self, token: int) -> str:
        return self._tokenizer.token_bytes(token).decode(errors="replace")


class ChoicesAnswer:
    """The answer to a chat or completion request.

    Args:
        running: its sequences, one for each choice.
        choices: those of the first prompt, then of the second, ...
        body: the request.
        model: the name of the model in the answer.
        fingerprint: of engine and weights.
    """

    id_prefix: ClassVar[str]
    object_name: ClassVar[str]
    chunk_name: ClassVar[str]

    def __init__(
        self, running: RunningRequest, choices: list[Choice], body: ChoicesRequest, model: str, fingerprint: str
    ) -> None:
        self._running, self._choices, self._include_usage = running, choices, body.include_usage
        self._prompts = len(choices) // (body.n or 1)
        self._head = {
            "id": f"{self.id_prefix}-{secrets.token_hex(12)}",
            "object": self.object_name,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }

    async def whole(self) -> dict[str, Any]:
        """The complete answer."""
        tokens: list[list[TokenDelta]] = [[] for _ in self._choices]
        async for item in self._running.events():
            assert item is not None
            index, event = item
            tokens[index] += self._choices[index].push(event)[1]
        choices = [
            {
                "index": index,
                **self._complete(index, tokens[index]),
                "finish_reason": choice.finish,
                "paceline": choice.report,
            }
            for index, choice in enumerate(self._choices)
        ]
        return {**self._head, "choices": choices, "usage": self._usage()}

    async def chunks(self) -> AsyncIterator[dict[str, Any] | str | None]:
        """The answer as server-sent events."""
        head = {**self._head, "object": self.chunk_name}
        usage: dict[str, Any] = {"usage": None} if self._include_usage else {}
        async for item in self._running.events(KEEP_ALIVE_SECONDS):
            if item is None:
                yield None
                continue
            for chunk in self._partial(*item):
                yield {**head, "choices": [{"index": item[0], **chunk}], **usage}
        if self._include_usage:
            yield {**head, "choices": [], "usage": self._usage()}
        yield "[DONE]"

    def _complete(self, index: int, tokens: list[TokenDelta]) -> dict[str, Any]:
        """A choice's text and log-probabilities."""
        raise NotImplementedError

    def _partial(self, index: int, event: Event) -> Iterator[dict[str, Any]]:
        """The chunks of a choice for one event."""
        raise NotImplementedError

    def _usage(self) -> dict[str, Any]:
        """Counts of tokens: each prompt once, all choices together."""
        choices = self._choices
        firsts = choices[:: len(choices) // self._prompts]
        prompt_tokens = sum(choice.statistics.prompt_tokens for choice in firsts)
        completion_tokens = sum(choice.tokens for choice in choices)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(choice.statistics.cached_tokens for choice in firsts)},
            "completion_tokens_details": {"reasoning_tokens": sum(choice.reasoning_tokens for choice in choices)},
        }


def round_report(event: Event) -> dict[str, Any]:
    """Where the tokens of a round came from: each one's text and its draft depth, 0 for the target's own."""
    deltas = [[token.text, token.depth] for token in event.deltas]
    if event.rest:
        deltas.append([event.rest, 0])
    return {"drafted": event.drafted, "accepted": event.accepted, "deltas": deltas}
