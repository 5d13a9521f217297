"""One choice of an answer as it comes: what each round adds to it, and what it has become."""

from __future__ import annotations

import secrets
from typing import Any

from paceline.engine.sequence import Sequence
from paceline.text.output_parser import AnswerReader, Part
from paceline.text.tokenizer import Tokenizer
from paceline.types import Event, SamplingParams, Statistics, TokenDelta

LEAST_LOGPROB = -9999.0  # JSON has no infinity


class Choice:
    """An answer that is being written.

    Args:
        sequence: its sequence.
        tokenizer: for the texts of single tokens.
        in_thought: the prompt has opened a thought.
        plain: the text is what it is, without thoughts and calls.
    """

    def __init__(self, sequence: Sequence, tokenizer: Tokenizer, in_thought: bool = False, plain: bool = False) -> None:
        self._sequence, self._tokenizer = sequence, tokenizer
        self._reader = None if plain else AnswerReader(in_thought)
        self.content = self.thought = ""
        self.calls: list[dict[str, Any]] = []
        self.tokens = self.thought_tokens = 0
        self.finish: str | None = None

    def push(self, event: Event) -> tuple[list[Part], list[TokenDelta]]:
        """Take what a round added.

        Returns:
            Its parts, in order, and the tokens of the content.
        """
        parts: list[Part] = []
        pieces: list[TokenDelta] = []
        reader = self._reader
        for piece in event.pieces:
            content, thought = reader is None or reader.in_content, reader is not None and reader.in_thought
            parts += self._read(piece.text)
            self.tokens += 1
            self.thought_tokens += reader is not None and (thought or reader.in_thought)
            if content and (reader is None or reader.in_content):
                pieces.append(piece)
        parts += self._read(event.rest)
        if event.finish:
            parts += reader.finish() if reader and event.finish == "stop" else []
            called = bool(self.calls) or any(part.kind == "call" for part in parts)
            self.finish = "tool_calls" if called and event.finish == "stop" else event.finish
            if self._sequence.grammar and self._sequence.grammar.failed:
                self.finish = "length"  # cut by a limit, though not of tokens
        for part in parts:
            self._take(part)
        return parts, pieces

    def _read(self, text: str) -> list[Part]:
        if self._reader:
            return self._reader.push(text)
        return [Part("content", text)] if text else []

    def _take(self, part: Part) -> None:
        match part.kind:
            case "content":
                self.content += part.text
            case "thought":
                self.thought += part.text
            case "call":
                self.calls.append({"id": f"call_{secrets.token_hex(12)}", "name": part.text, "arguments": ""})
            case "arguments":
                self.calls[-1]["arguments"] += part.text

    @property
    def statistics(self) -> Statistics:
        return self._sequence.statistics

    @property
    def sampling(self) -> SamplingParams:
        return self._sequence.params

    @property
    def report(self) -> dict[str, Any]:
        """How the answer was made: what no other server tells."""
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

    def token_report(self, piece: TokenDelta) -> dict[str, Any] | None:
        """A token's log-probabilities as chat completions tell them; None if they were not asked for."""
        if piece.logprobs is None:
            return None
        top = [self._token(token, value) for token, value in piece.logprobs.top]
        return {**self._token(piece.token, piece.logprobs.token), "top_logprobs": top}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        raw = self._tokenizer.token_bytes(token)
        return {"token": raw.decode(errors="replace"), "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(raw)}


def round_report(event: Event) -> dict[str, Any]:
    """Where the tokens of a round came from: each one's text and its draft depth, 0 for the target's own."""
    pieces = [[piece.text, piece.depth] for piece in event.pieces]
    if event.rest:
        pieces.append([event.rest, 0])
    return {"drafted": event.drafted, "accepted": event.accepted, "pieces": pieces}


def usage_of(choices: list[Choice], prompts: int = 1) -> dict[str, Any]:
    """Counts of tokens: each prompt once, all choices together.

    Args:
        choices: those of the first prompt, then of the second, ...
        prompts: how many.
    """
    firsts = choices[:: max(1, len(choices) // prompts)]
    prompt_tokens = sum(choice.statistics.prompt_tokens for choice in firsts)
    written = sum(choice.tokens for choice in choices)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": written,
        "total_tokens": prompt_tokens + written,
        "prompt_tokens_details": {"cached_tokens": sum(choice.statistics.cached_tokens for choice in firsts)},
        "completion_tokens_details": {"reasoning_tokens": sum(choice.thought_tokens for choice in choices)},
    }
