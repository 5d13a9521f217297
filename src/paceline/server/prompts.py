"""From OpenAI's requests to the engine's: messages for the chat template, settings, the shape of the text."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from paceline.engine.engine import Engine, Request
from paceline.errors import PromptError, SettingsError
from paceline.server.schemas import (
    Called,
    ChatMessage,
    ChatRequest,
    ChosenTool,
    CompletionRequest,
    Generating,
    Penalised,
    ResponseFormat,
    TextPart,
    Tool,
)
from paceline.text.grammar import ANY_OBJECT, Constraint, Grammars, json_rule, regex_rule
from paceline.text.output_parser import begins_in_thought, marks_of
from paceline.text.tool_grammar import call_grammar
from paceline.types import SamplingParams

UNBOUNDED = 1 << 30  # tokens: as many as the context holds


@dataclass(frozen=True)
class Prepared:
    """A prompt and what is asked of it."""

    tokens: list[int]
    request: Request
    choices: int = 1
    in_thought: bool = False  # the prompt has opened a thought
    echo: str = ""  # what goes in front of each choice


@dataclass
class Preparer:
    """Turns requests into prompts and settings. Slow work: call it on a thread of its own.

    Args:
        engine: a loaded pair.
    """

    engine: Engine
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._marks = marks_of(self.engine.tokenizer.token_id)

    def chat(self, body: ChatRequest) -> Prepared:
        """A chat's prompt.

        Raises:
            PromptError: messages that the model's template refuses, or that do not fit the context.
            SettingsError: a setting out of range, a schema or expression that cannot be followed.
        """
        thinks, variables = _thinking(body)
        tools = [] if body.tool_choice == "none" else body.tools or []
        text, tokens = self.render(body.messages, tools, variables)
        self.engine.check_length(tokens)  # before more work is done
        demanded = _demanded(body.tool_choice, tools)
        in_thought = begins_in_thought(text)
        request = replace(
            self._request(body),
            max_tokens=body.max_completion_tokens or body.max_tokens or UNBOUNDED,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            grammar=self._grammar(body, demanded, thinks or in_thought, in_thought),
            marks=self._marks,
        )
        if body.top_logprobs is not None and not body.logprobs:
            raise SettingsError("top_logprobs goes with logprobs: true; add it")
        return Prepared(tokens, request, body.n or 1, in_thought)

    def completions(self, body: CompletionRequest) -> list[Prepared]:
        """The prompts of a completion.

        Raises:
            PromptError, SettingsError: as for `chat`.
        """
        prompt: Any = body.prompt
        several = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)
        grammar = self._format_grammar(body.response_format, "", "")
        request = replace(self._request(body), max_tokens=body.max_tokens or UNBOUNDED, logprobs=body.logprobs)
        prepared = []
        for one in prompt if several else [prompt]:
            request = replace(request, grammar=grammar.copy() if grammar else None)
            tokens = self.engine.encode(one, raw=True)
            self.engine.check_length(tokens)
            echo = self.engine.tokenizer.decode(tokens) if body.echo else ""
            prepared.append(Prepared(tokens, request, body.n or 1, echo=echo))
        return prepared

    def render(
        self, messages: Sequence[ChatMessage], tools: Sequence[Tool], variables: Mapping[str, Any]
    ) -> tuple[str, list[int]]:
        """A conversation as text and as tokens."""
        template = self.engine.chat_template
        if template is None:
            raise PromptError("the model has no chat template; use /v1/completions")
        if tools and not template.knows("tools"):
            raise SettingsError("this model's chat template knows no tools; leave them out")
        declared = [tool.model_dump(exclude_none=True) for tool in tools] or None
        taken = ("self", "messages", "tools", "documents", "add_generation_prompt")
        safe = {name: value for name, value in variables.items() if name not in taken and not name.endswith("_token")}
        text = template.render(template_messages(messages), tools=declared, **safe)
        return text, self.engine.encode_text(text)

    def _request(self, body: Penalised) -> Request:
        """What both kinds of requests say alike."""
        return Request(
            params=_sampling(self.engine.sampling, body),
            stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
            draft_tokens=body.draft_tokens,
        )

    def _grammar(
        self, body: ChatRequest, demanded: list[dict[str, Any]], thinks: bool, in_thought: bool
    ) -> Constraint | None:
        ids = [self.engine.tokenizer.token_id(name) for name in ("<|channel>", "<channel|>")]
        thought = None
        if thinks and None not in ids:  # what is demanded comes behind the thoughts
            thought = f"TEXT <[{ids[1]}]>" if in_thought else f"(<[{ids[0]}]> TEXT <[{ids[1]}]>)?"
        before, rules = (f"{thought} ", "\nTEXT: /(.|\\n)*/") if thought else ("", "")
        if not demanded:
            return self._format_grammar(body.response_format, before, rules)
        if body.response_format and body.response_format.type != "text":
            raise SettingsError("response_format and a demanded call exclude each other; give one of them")
        several = body.parallel_tool_calls is not False and not isinstance(body.tool_choice, ChosenTool)
        grammar = call_grammar(demanded, self.engine.tokenizer.token_id, several=several)
        return self._compiler().lark(grammar.replace("start: ", f"start: {before}", 1) + rules)

    def _format_grammar(self, wanted: ResponseFormat | None, before: str, rules: str) -> Constraint | None:
        match wanted:
            case None | ResponseFormat(type="text"):
                return None
            case ResponseFormat(type="json_object"):
                schema = ANY_OBJECT
            case ResponseFormat(type="json_schema", json_schema=described) if described:
                schema = described.schema_
            case ResponseFormat(type="regex", regex=pattern) if pattern:
                if before:
                    return self._compiler().lark(f"start: {before}{regex_rule(pattern)}{rules}")
                return self._compiler().regex(pattern)
            case _:
                raise SettingsError(f"response_format of type {wanted.type} needs {wanted.type}; add it")
        if before:
            return self._compiler().lark(f"start: {before}body{rules}\nbody: {json_rule(schema)}")
        return self._compiler().json_schema(schema)

    def _compiler(self) -> Grammars:
        with self._lock:
            return self.engine.grammars


def choices_of(prepared: Prepared) -> list[Request]:
    """One request for each choice: with seeds one after another, so that the first is what it is alone."""
    requests = [prepared.request]
    sampling = prepared.request.params or SamplingParams()
    for index in range(1, prepared.choices):
        seed = None if sampling.seed is None else (sampling.seed + index) % (1 << 64)
        grammar = prepared.request.grammar
        copy = grammar.copy() if isinstance(grammar, Constraint) else None
        requests.append(replace(prepared.request, params=replace(sampling, seed=seed), grammar=copy))
    return requests


def template_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Messages as chat templates take them: text in one piece, arguments as objects, names with the tools' answers."""
    names: dict[str, str] = {}
    turns = []
    for message in messages:
        role = "system" if message.role == "developer" else message.role
        turn: dict[str, Any] = {"role": role, "content": text_of(message.content)}
        if message.reasoning_content:
            turn["reasoning_content"] = message.reasoning_content
        if message.tool_calls:
            names |= {call.id: call.function.name for call in message.tool_calls}
            turn["tool_calls"] = [_template_call(call) for call in message.tool_calls]
        if role == "tool":
            turn |= {
                "tool_call_id": message.tool_call_id,
                "name": message.name or names.get(message.tool_call_id or ""),
            }
        elif message.name:
            turn["name"] = message.name
        turns.append(turn)
    return turns


def text_of(content: str | list[TextPart] | None) -> str:
    """A message's content in one piece."""
    if isinstance(content, list):
        return "".join(part.text for part in content)
    return content or ""


def _template_call(call: Called) -> dict[str, Any]:
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise PromptError(f"the arguments of call {call.id!r} are not a JSON object; send them as they came")
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


def _thinking(body: ChatRequest) -> tuple[bool, dict[str, Any]]:
    """Whether the model is to think, and the names for its template."""
    variables = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        variables.setdefault("enable_thinking", body.reasoning_effort != "none")
    return bool(variables.get("enable_thinking")), variables


def _demanded(choice: object, tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Declarations of the functions of which one must be called; none where the model is free."""
    declared = [tool.function.model_dump(exclude_none=True) for tool in tools]
    if isinstance(choice, ChosenTool):
        chosen = [tool for tool in declared if tool["name"] == choice.function.name]
        if not chosen:
            raise SettingsError(f"tool_choice names {choice.function.name!r}, which is not among the tools")
        return chosen
    if choice == "required" and not declared:
        raise SettingsError("tool_choice is required, and there are no tools; add them")
    return declared if choice == "required" else []


def _sampling(model: SamplingParams, body: Generating) -> SamplingParams:
    """The model's own settings with those that were given in their place."""
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    given = {name: getattr(body, name, None) for name in names}
    changed: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if body.top_k is not None:
        changed["top_k"] = max(0, body.top_k)  # others write -1 for all
    if body.seed is not None:
        changed["seed"] = body.seed % (1 << 64)
    if bias := getattr(body, "logit_bias", None):
        changed["bias"] = tuple((int(token), value) for token, value in bias.items())
    return replace(model, **changed)
