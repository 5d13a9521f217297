"""`/v1/chat/completions`, see https://platform.openai.com/docs/api-reference/chat"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from paceline.server.choices import Choice, ChoicesAnswer, round_report
from paceline.server.runner import RunningRequest
from paceline.server.schemas import ChatRequest
from paceline.text.output_parser import OutputDelta
from paceline.types import Event, TokenDelta


class ChatAnswer(ChoicesAnswer):
    """The answer to a chat request; see `ChoicesAnswer`."""

    id_prefix, object_name, chunk_name = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(
        self, running: RunningRequest, choices: list[Choice], body: ChatRequest, model: str, fingerprint: str
    ) -> None:
        super().__init__(running, choices, body, model, fingerprint)
        self._with_logprobs, self._with_rounds = bool(body.logprobs), bool(body.return_rounds)
        self._begun: set[int] = set()

    def _complete(self, index: int, tokens: list[TokenDelta]) -> dict[str, Any]:
        choice = self._choices[index]
        return {"message": _message(choice), "logprobs": self._logprobs(choice, tokens)}

    def _partial(self, index: int, event: Event) -> Iterator[dict[str, Any]]:
        choice = self._choices[index]
        if index not in self._begun:
            self._begun.add(index)
            yield {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        deltas, tokens = choice.push(event)
        delta, logprobs = _delta(choice, deltas), self._logprobs(choice, tokens)
        if delta or (logprobs and logprobs["content"]) or self._with_rounds:
            rounds = {"round": round_report(event)} if self._with_rounds else {}
            yield {"delta": delta, "logprobs": logprobs, "finish_reason": None, **rounds}
        if event.finish:
            yield {"delta": {}, "logprobs": None, "finish_reason": choice.finish, "paceline": choice.report}

    def _logprobs(self, choice: Choice, tokens: list[TokenDelta]) -> dict[str, Any] | None:
        return {"content": choice.token_logprobs(tokens), "refusal": None} if self._with_logprobs else None


def _delta(choice: Choice, deltas: list[OutputDelta]) -> dict[str, Any]:
    """What an event added to a message."""
    added: dict[str, Any] = {}
    calls: dict[int, dict[str, Any]] = {}
    for delta in deltas:
        match delta.kind:
            case "content" | "reasoning":
                name = "content" if delta.kind == "content" else "reasoning_content"
                added[name] = added.get(name, "") + delta.text
            case "call":
                function = {"name": delta.text, "arguments": ""}
                identity = {"id": choice.calls[delta.call].id, "type": "function"}
                calls[delta.call] = {"index": delta.call, **identity, "function": function}
            case "arguments":
                call = calls.setdefault(delta.call, {"index": delta.call, "function": {"arguments": ""}})
                call["function"]["arguments"] += delta.text
    return {**added, "tool_calls": list(calls.values())} if calls else added


def _message(choice: Choice) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": choice.content, "refusal": None}
    if choice.reasoning:
        message["reasoning_content"] = choice.reasoning
    if choice.calls:
        message["content"] = choice.content or None
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in choice.calls
        ]
    return message
