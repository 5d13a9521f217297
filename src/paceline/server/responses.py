"""`/v1/responses`, see https://platform.openai.com/docs/api-reference/responses

Nothing is stored between requests: a client sends the whole conversation. An answer is a list of items (reasoning, a
message, calls); a stream has events for each item's start, deltas and end.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Iterator
from copy import deepcopy  # of open items, which change
from typing import Any

from paceline.errors import PromptError
from paceline.server.choices import Choice, round_report
from paceline.server.http import KEEP_ALIVE_SECONDS, describe
from paceline.server.runner import RunningRequest
from paceline.server.schemas import (
    CalledFunction,
    ChatMessage,
    ChatRequest,
    ChosenFunction,
    ChosenTool,
    Function,
    GenerationRequest,
    InputCall,
    InputCallOutput,
    InputMessage,
    JsonSchema,
    ResponseFormat,
    ResponsesRequest,
    ResponseToolChoice,
    Tool,
    ToolCall,
)
from paceline.text.output_parser import OutputDelta

ITEM_TYPES = {"content": "message", "reasoning": "reasoning"}  # any other delta belongs to a function_call


def as_chat(body: ResponsesRequest) -> ChatRequest:
    """The same request as a chat request."""
    choice = body.tool_choice
    text_format = body.text.format if body.text else None
    schema = None
    if text_format and text_format.type == "json_schema":
        schema = JsonSchema.model_validate({"name": text_format.name, "schema": text_format.schema_ or {}})
    return ChatRequest(
        messages=_messages(body),
        max_tokens=body.max_output_tokens,
        tools=[
            Tool(type="function", function=Function(**tool.model_dump(exclude={"type"}))) for tool in body.tools or ()
        ]
        or None,
        tool_choice=ChosenTool(type="function", function=ChosenFunction(name=choice.name))
        if isinstance(choice, ResponseToolChoice)
        else choice,
        parallel_tool_calls=body.parallel_tool_calls,
        response_format=ResponseFormat(type=text_format.type, json_schema=schema) if text_format else None,
        reasoning_effort=body.reasoning.effort if body.reasoning else None,
        logprobs=True if body.top_logprobs is not None else None,
        top_logprobs=body.top_logprobs,
        **{name: getattr(body, name) for name in GenerationRequest.model_fields},
    )


def _messages(body: ResponsesRequest) -> list[ChatMessage]:
    items = [InputMessage(role="user", content=body.input)] if isinstance(body.input, str) else body.input
    messages = [ChatMessage(role="system", content=body.instructions)] if body.instructions else []
    for item in items:
        match item:
            case InputMessage():
                messages.append(ChatMessage(role=item.role, content=item.content))
            case InputCall():
                call = ToolCall(id=item.call_id, function=CalledFunction(name=item.name, arguments=item.arguments))
                if messages and messages[-1].role == "assistant":
                    messages[-1].tool_calls = [*(messages[-1].tool_calls or ()), call]
                else:
                    messages.append(ChatMessage(role="assistant", tool_calls=[call]))
            case InputCallOutput():
                messages.append(ChatMessage(role="tool", tool_call_id=item.call_id, content=item.output))
    if not messages:
        raise PromptError("the input holds no message; add one")
    return messages


class ResponsesAnswer:
    """The answer to a request.

    Args:
        running: its sequence.
        choice: the text of that sequence.
        body: the request.
        model: the name of the model in the answer.
    """

    def __init__(self, running: RunningRequest, choice: Choice, body: ResponsesRequest, model: str) -> None:
        self._running, self._choice, self._model = running, choice, model
        self._return_rounds, self._echoed = bool(body.return_rounds), _echoed(body)  # not the body, which may be large
        self._id, self._created = f"resp_{secrets.token_hex(16)}", int(time.time())
        self._items: list[dict[str, Any]] = []
        self._open = ""  # type of the item that is not complete yet
        self._logprobs: list[dict[str, Any]] = []  # of tokens whose text is not sent yet
        self._number = 0  # of the next event

    async def whole(self) -> dict[str, Any]:
        """The complete answer."""
        async for _ in self._events(1e9):
            pass
        return self._response(self._status)

    async def chunks(self) -> AsyncIterator[dict[str, Any] | str | None]:
        """The answer as server-sent events."""
        for name in ("response.created", "response.in_progress"):
            yield self._event(name, response=self._response("in_progress"))
        try:
            async for event in self._events(KEEP_ALIVE_SECONDS):
                yield event
        except Exception as error:
            about = describe(error)[1]["error"]
            yield self._event("error", code=about["code"], message=about["message"], param=None)
            return
        yield self._event(f"response.{self._status}", response=self._response(self._status))

    @property
    def _status(self) -> str:
        return "incomplete" if self._choice.finish == "length" else "completed"

    async def _events(self, max_wait: float) -> AsyncIterator[dict[str, Any] | None]:
        async for item in self._running.events(max_wait):
            if item is None:
                yield None
                continue
            _, event = item
            deltas, tokens = self._choice.push(event)
            self._logprobs = self._choice.token_logprobs(tokens)
            for delta in deltas:
                for sent in self._delta(delta):
                    yield sent
            if self._return_rounds:
                yield self._event("paceline.round", round=round_report(event))
        for sent in self._end_item(self._status):
            yield sent

    def _delta(self, delta: OutputDelta) -> Iterator[dict[str, Any]]:
        kind = ITEM_TYPES.get(delta.kind, "function_call")
        if kind != self._open or delta.kind == "call":
            yield from self._end_item()
            yield from self._begin_item(kind, delta)
        if delta.kind == "call":
            return
        item, where = self._items[-1], self._where()
        match kind:
            case "message":
                item["content"][0]["text"] += delta.text
                logprobs, self._logprobs = self._logprobs, []  # all of the event's, with its first text
                item["content"][0]["logprobs"] += logprobs
                name, more = "response.output_text.delta", {"content_index": 0, "logprobs": _short(logprobs)}
            case "reasoning":
                item["content"][0]["text"] += delta.text
                name, more = "response.reasoning_text.delta", {"content_index": 0}
            case _:
                item["arguments"] += delta.text
                name, more = "response.function_call_arguments.delta", {}
        yield self._event(name, delta=delta.text, **where, **more)

    def _begin_item(self, kind: str, delta: OutputDelta) -> Iterator[dict[str, Any]]:
        self._open = kind
        item: dict[str, Any] = {"type": kind, "status": "in_progress"}
        match kind:
            case "message":
                item |= {"id": f"msg_{secrets.token_hex(12)}", "role": "assistant", "content": []}
            case "reasoning":
                item |= {"id": f"rs_{secrets.token_hex(12)}", "summary": [], "content": []}
            case _:
                call_id = self._choice.calls[delta.call].id
                item |= {"id": f"fc_{secrets.token_hex(12)}", "call_id": call_id, "name": delta.text, "arguments": ""}
        self._items.append(item)
        yield self._event("response.output_item.added", output_index=len(self._items) - 1, item=deepcopy(item))
        if kind != "function_call":
            item["content"].append(_content(kind))
            name = "response.content_part.added"
            yield self._event(name, content_index=0, part=_content(kind), **self._where())

    def _end_item(self, status: str = "completed") -> Iterator[dict[str, Any]]:
        if not self._open:
            return
        item, where = self._items[-1], self._where()
        item["status"] = status
        if self._open == "function_call":
            done = {"name": item["name"], "arguments": item["arguments"]}
            yield self._event("response.function_call_arguments.done", **done, **where)
        else:
            part = item["content"][0]
            if self._open == "message":
                done = {"text": part["text"], "logprobs": _short(part["logprobs"])}
                yield self._event("response.output_text.done", content_index=0, **done, **where)
            else:
                yield self._event("response.reasoning_text.done", content_index=0, text=part["text"], **where)
            yield self._event("response.content_part.done", content_index=0, part=dict(part), **where)
        yield self._event("response.output_item.done", output_index=len(self._items) - 1, item=deepcopy(item))
        self._open = ""

    def _where(self) -> dict[str, Any]:
        return {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1}

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        number, self._number = self._number, self._number + 1
        return {"type": kind, "sequence_number": number, **fields}

    def _response(self, status: str) -> dict[str, Any]:
        done = status != "in_progress"
        sampling = self._choice.sampling
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "model": self._model,
            "output": deepcopy(self._items),
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "metadata": {},
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            **self._echoed,
            "store": False,
            "usage": self._usage() if done else None,
            **({"paceline": self._choice.report} if done else {}),
        }

    def _usage(self) -> dict[str, Any]:
        choice = self._choice
        return {
            "input_tokens": choice.statistics.prompt_tokens,
            "input_tokens_details": {"cached_tokens": choice.statistics.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": choice.tokens,
            "output_tokens_details": {"reasoning_tokens": choice.reasoning_tokens},
            "total_tokens": choice.statistics.prompt_tokens + choice.tokens,
        }


def _echoed(body: ResponsesRequest) -> dict[str, Any]:
    """What an answer repeats of its request."""
    choice = body.tool_choice
    return {
        "instructions": body.instructions,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "max_output_tokens": body.max_output_tokens,
        "tool_choice": choice.model_dump() if isinstance(choice, ResponseToolChoice) else choice or "auto",
        "tools": [
            {"strict": None, "parameters": None, **tool.model_dump(exclude_none=True)} for tool in body.tools or ()
        ],
    }


def _short(reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Log-probabilities as events have them: without bytes."""
    return [
        {
            "token": report["token"],
            "logprob": report["logprob"],
            "top_logprobs": [{"token": one["token"], "logprob": one["logprob"]} for one in report["top_logprobs"]],
        }
        for report in reports
    ]


def _content(kind: str) -> dict[str, Any]:
    if kind == "message":
        return {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    return {"type": "reasoning_text", "text": ""}
