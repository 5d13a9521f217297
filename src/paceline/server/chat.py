"""`/v1/chat/completions`: a conversation goes on. https://platform.openai.com/docs/api-reference/chat"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from paceline.server.answers import Choice, round_report, usage_of
from paceline.server.runner import Job
from paceline.server.schemas import ChatRequest
from paceline.server.wire import KEEP_ALIVE_SECONDS
from paceline.text.output_parser import Part
from paceline.types import Event


class Chat:
    """One request's answer.

    Args:
        job: its sequences.
        choices: one for each of them.
        body: the request.
        model: the name to answer under.
        fingerprint: of engine and weights.
    """

    def __init__(self, job: Job, choices: list[Choice], body: ChatRequest, model: str, fingerprint: str) -> None:
        self._job, self._choices, self._body = job, choices, body
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        reports: list[list[Any]] = [[] for _ in self._choices]
        async for came in self._job.events():
            assert came is not None
            index, event = came
            _, pieces = self._choices[index].push(event)
            reports[index] += [self._choices[index].token_report(piece) for piece in pieces]
        choices = [
            {
                "index": index,
                "message": _message(choice),
                "logprobs": {"content": reports[index], "refusal": None} if self._body.logprobs else None,
                "finish_reason": choice.finish,
                "paceline": choice.report,
            }
            for index, choice in enumerate(self._choices)
        ]
        return {**self._head, "choices": choices, "usage": usage_of(self._choices)}

    async def chunks(self) -> AsyncIterator[dict[str, Any] | str | None]:
        """The answer as it comes, for server-sent events."""
        head = {**self._head, "object": "chat.completion.chunk"}
        with_usage = self._body.stream_options is not None and bool(self._body.stream_options.include_usage)
        usage: dict[str, Any] = {"usage": None} if with_usage else {}
        begun: set[int] = set()
        async for came in self._job.events(KEEP_ALIVE_SECONDS):
            if came is None:
                yield None
                continue
            index, event = came
            if index not in begun:
                begun.add(index)
                first = {"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
                yield {**head, "choices": [{**first, "logprobs": None}], **usage}
            if part := self._chunk(index, event):
                yield {**head, "choices": [part], **usage}
            if event.finish:
                choice = self._choices[index]
                last = {"index": index, "delta": {}, "logprobs": None, "finish_reason": choice.finish}
                yield {**head, "choices": [{**last, "paceline": choice.report}], **usage}
        if with_usage:
            yield {**head, "choices": [], "usage": usage_of(self._choices)}
        yield "[DONE]"

    def _chunk(self, index: int, event: Event) -> dict[str, Any] | None:
        choice = self._choices[index]
        before = len(choice.calls)
        parts, pieces = choice.push(event)
        delta = _delta(choice, parts, before)
        reports = [choice.token_report(piece) for piece in pieces] if self._body.logprobs else []
        if not (delta or reports or self._body.return_rounds):
            return None
        logprobs = {"content": reports, "refusal": None} if self._body.logprobs else None
        rounds = {"round": round_report(event)} if self._body.return_rounds else {}
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None, **rounds}


def _delta(choice: Choice, parts: list[Part], before: int) -> dict[str, Any]:
    """What a round added, with `before` calls begun earlier."""
    delta: dict[str, Any] = {}
    calls: dict[int, dict[str, Any]] = {}
    current = before - 1
    for part in parts:
        if part.kind in ("content", "thought"):
            name = "content" if part.kind == "content" else "reasoning_content"
            delta[name] = delta.get(name, "") + part.text
            continue
        if part.kind == "call":
            current += 1
            call = choice.calls[current]
            named = {"name": call["name"], "arguments": ""}
            calls[current] = {"index": current, "id": call["id"], "type": "function", "function": named}
        else:
            call = calls.setdefault(current, {"index": current, "function": {"arguments": ""}})
            call["function"]["arguments"] += part.text
    if calls:
        delta["tool_calls"] = list(calls.values())
    return delta


def _message(choice: Choice) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": choice.content, "refusal": None}
    if choice.thought:
        message["reasoning_content"] = choice.thought
    if choice.calls:
        message["content"] = choice.content or None
        message["tool_calls"] = [
            {
                "id": call["id"],
                "type": "function",
                "function": {"name": call["name"], "arguments": call["arguments"]},
            }
            for call in choice.calls
        ]
    return message
