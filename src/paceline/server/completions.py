"""`/v1/completions`: text goes on. https://platform.openai.com/docs/api-reference/completions"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from paceline.server.answers import LEAST_LOGPROB, Choice, round_report, usage_of
from paceline.server.runner import Job
from paceline.server.schemas import CompletionRequest
from paceline.server.wire import KEEP_ALIVE_SECONDS
from paceline.text.tokenizer import Tokenizer
from paceline.types import TokenDelta


class Completion:
    """One request's answer: the choices of its first prompt, then those of the second, ...

    Args:
        job: its sequences.
        choices: one for each of them.
        body: the request.
        echoes: the text to put in front of each choice.
        model: the name to answer under.
        fingerprint: of engine and weights.
    """

    def __init__(
        self, job: Job, choices: list[Choice], body: CompletionRequest, echoes: list[str], model: str, fingerprint: str
    ) -> None:
        self._job, self._choices, self._body, self._echoes = job, choices, body, echoes
        self._prompts = len(choices) // (body.n or 1)
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }

    async def whole(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """The answer in one piece."""
        pieces: list[list[TokenDelta]] = [[] for _ in self._choices]
        async for came in self._job.events():
            assert came is not None
            index, event = came
            pieces[index] += self._choices[index].push(event)[1]
        choices = [
            {
                "index": index,
                "text": self._echoes[index] + choice.content,
                "logprobs": self._logprobs(pieces[index], tokenizer, len(self._echoes[index])),
                "finish_reason": choice.finish,
                "paceline": choice.report,
            }
            for index, choice in enumerate(self._choices)
        ]
        return {**self._head, "choices": choices, "usage": usage_of(self._choices, self._prompts)}

    async def chunks(self, tokenizer: Tokenizer) -> AsyncIterator[dict[str, Any] | str | None]:
        """The answer as it comes, for server-sent events."""
        with_usage = self._body.stream_options is not None and bool(self._body.stream_options.include_usage)
        usage: dict[str, Any] = {"usage": None} if with_usage else {}
        lengths = [len(echo) for echo in self._echoes]
        echoes = [*self._echoes]  # not sent yet
        async for came in self._job.events(KEEP_ALIVE_SECONDS):
            if came is None:
                yield None
                continue
            index, event = came
            choice = self._choices[index]
            parts, pieces = choice.push(event)
            text = "".join(part.text for part in parts)
            answer = {
                "index": index,
                "text": echoes[index] + text,
                "logprobs": self._logprobs(pieces, tokenizer, lengths[index]),
                "finish_reason": choice.finish,
            }
            lengths[index] += len(text)
            echoes[index] = ""
            if self._body.return_rounds:
                answer["round"] = round_report(event)
            if event.finish:
                answer["paceline"] = choice.report
            yield {**self._head, "choices": [answer], **usage}
        if with_usage:
            yield {**self._head, "choices": [], "usage": usage_of(self._choices, self._prompts)}
        yield "[DONE]"

    def _logprobs(self, pieces: list[TokenDelta], tokenizer: Tokenizer, offset: int) -> dict[str, Any] | None:
        if self._body.logprobs is None:
            return None
        report: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for piece in pieces:
            assert piece.logprobs is not None
            report["tokens"].append(_text(tokenizer, piece.token))
            report["token_logprobs"].append(max(piece.logprobs.token, LEAST_LOGPROB))
            top = {_text(tokenizer, token): max(value, LEAST_LOGPROB) for token, value in piece.logprobs.top}
            report["top_logprobs"].append(top)
            report["text_offset"].append(offset)
            offset += len(piece.text)
        return report


def _text(tokenizer: Tokenizer, token: int) -> str:
    return tokenizer.token_bytes(token).decode(errors="replace")
