"""Request preparation: from OpenAI's requests to token ids, sampling parameters and grammars."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from paceline.engine.engine import Engine, Request
from paceline.errors import PromptError, SettingsError
from paceline.sampling_params import PARAMETERS, SamplingParams
from paceline.server.schemas import (
    ChatMessage,
    ChatRequest,
    ChoicesRequest,
    ChosenTool,
    CompletionRequest,
    GenerationRequest,
    ResponseFormat,
    TextPart,
    Tool,
    ToolCall,
)
from paceline.text.grammar import ANY_OBJECT, GrammarMatcher, json_rule, regex_rule
from paceline.text.output_parser import ends_in_reasoning, marks_of
from paceline.text.stops import check_stops
from paceline.text.tool_grammar import call_grammar

NO_LIMIT = 1 << 30  # tokens: as many as the context holds


@dataclass(frozen=True)
class PreparedPrompt:
    """A tokenized prompt and the settings of its generation."""

    tokens: list[int]
    requests: list[Request]  # one for each choice
    in_reasoning: bool = False  # the prompt ends inside of reasoning
    echo: str = ""  # text in front of each choice


@dataclass
class RequestPreparer:
    """Turns request bodies into prompts and settings. This is slow, so call it on a worker thread.

    Args:
        engine: a loaded pair.
    """

    engine: Engine

    def __post_init__(self) -> None:
        self._marks = marks_of(self.engine.tokenizer.token_id)

    def chat(self, body: ChatRequest) -> list[PreparedPrompt]:
        """Prepare a chat request; returns its one prompt.

        Raises:
            PromptError: messages that the model's template rejects, or that do not fit the context.
            SettingsError: a setting out of range, a schema or expression that is not supported.
        """
        reasons, variables = _reasoning(body)
        tools = [] if body.tool_choice == "none" else body.tools or []
        text, tokens = self.render(body.messages, tools, variables)
        self.engine.check_length(tokens)  # before the grammar is compiled
        required = _required(body.tool_choice, tools)
        in_reasoning = ends_in_reasoning(text)
        request = replace(
            self._request(body),
            max_tokens=body.max_completion_tokens or body.max_tokens or NO_LIMIT,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            grammar=self._grammar(body, required, reasons or in_reasoning, in_reasoning),
            marks=self._marks,
            situations=("reasoning",) if reasons or in_reasoning else (),
        )
        if body.top_logprobs is not None and not body.logprobs:
            raise SettingsError("top_logprobs goes with logprobs: true; add it")
        return [PreparedPrompt(tokens, _choices(request, body.n or 1), in_reasoning)]

    def completions(self, body: CompletionRequest) -> list[PreparedPrompt]:
        """Prepare each prompt of a completion request.

        Raises:
            PromptError, SettingsError: as for `chat`.
        """
        prompt: Any = body.prompt
        several = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)
        grammar = self._format_grammar(body.response_format, "", "")
        request = replace(self._request(body), max_tokens=body.max_tokens or NO_LIMIT, logprobs=body.logprobs)
        prepared = []
        for one in prompt if several else [prompt]:
            raw = ("raw_text",) if isinstance(one, str) and self.engine.chat_template else ()
            request = replace(request, grammar=grammar.copy() if grammar else None, situations=raw)
            tokens = self.engine.encode(one, raw=True)
            self.engine.check_length(tokens)
            echo = self.engine.tokenizer.decode(tokens) if body.echo else ""
            prepared.append(PreparedPrompt(tokens, _choices(request, body.n or 1), echo=echo))
        return prepared

    def render(
        self, messages: Sequence[ChatMessage], tools: Sequence[Tool], variables: Mapping[str, Any]
    ) -> tuple[str, list[int]]:
        """Render a conversation; returns its text and token ids."""
        template = self.engine.chat_template
        if template is None:
            raise PromptError("the model has no chat template; use /v1/completions")
        if tools and not template.knows("tools"):
            raise SettingsError("this model's chat template does not support tools; leave them out")
        declared = [tool.model_dump(exclude_none=True) for tool in tools] or None
        taken = ("self", "messages", "tools", "documents", "add_generation_prompt")
        safe = {name: value for name, value in variables.items() if name not in taken and not name.endswith("_token")}
        text = template.render(template_messages(messages), tools=declared, **safe)
        return text, self.engine.encode_text(text)

    def _request(self, body: ChoicesRequest) -> Request:
        """The settings that chat and completion requests share."""
        return Request(
            params=_sampling(self.engine.sampling, body),
            stop=check_stops(body.stop or ()),
            draft_tokens=body.draft_tokens,
        )

    def _grammar(
        self, body: ChatRequest, required: list[dict[str, Any]], reasons: bool, in_reasoning: bool
    ) -> GrammarMatcher | None:
        ids = [self.engine.tokenizer.token_id(name) for name in ("<|channel>", "<channel|>")]
        reasoning = None
        if reasons and None not in ids:  # the grammar applies to what follows the reasoning
            reasoning = f"TEXT <[{ids[1]}]>" if in_reasoning else f"(<[{ids[0]}]> TEXT <[{ids[1]}]>)?"
        before, rules = (f"{reasoning} ", "\nTEXT: /(.|\\n)*/") if reasoning else ("", "")
        if not required:
            return self._format_grammar(body.response_format, before, rules)
        if body.response_format and body.response_format.type != "text":
            raise SettingsError("response_format and a required tool call exclude each other; give one of them")
        several = body.parallel_tool_calls is not False and not isinstance(body.tool_choice, ChosenTool)
        grammar = call_grammar(required, self.engine.tokenizer.token_id, several=several)
        return self.engine.grammars.lark(grammar.replace("start: ", f"start: {before}", 1) + rules, composed=True)

    def _format_grammar(self, response_format: ResponseFormat | None, before: str, rules: str) -> GrammarMatcher | None:
        match response_format:
            case None | ResponseFormat(type="text"):
                return None
            case ResponseFormat(type="json_object"):
                schema = ANY_OBJECT
            case ResponseFormat(type="json_schema", json_schema=described) if described:
                schema = described.schema_
            case ResponseFormat(type="regex", regex=pattern) if pattern:
                if before:
                    return self.engine.grammars.lark(f"start: {before}{regex_rule(pattern)}{rules}", composed=True)
                return self.engine.grammars.regex(pattern)
            case _:
                raise SettingsError(
                    f"response_format of type {response_format.type} needs {response_format.type}; add it"
                )
        if before:
            return self.engine.grammars.lark(f"start: {before}body{rules}\nbody: {json_rule(schema)}", composed=True)
        return self.engine.grammars.json_schema(schema)


def _choices(request: Request, count: int) -> list[Request]:
    """One request per choice, with seeds counting up: choice 0 is the same as with n = 1."""
    requests = [request]
    params = request.params or SamplingParams()
    for index in range(1, count):
        seed = None if params.seed is None else (params.seed + index) % (1 << 64)
        copy = request.grammar.copy() if isinstance(request.grammar, GrammarMatcher) else None
        requests.append(replace(request, params=replace(params, seed=seed), grammar=copy))
    return requests


def template_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Messages as chat templates take them: content as a string, arguments as objects, tool results with names."""
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
    """A message's content as a string."""
    if isinstance(content, list):
        return "".join(part.text for part in content)
    return content or ""


def _template_call(call: ToolCall) -> dict[str, Any]:
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise PromptError(f"the arguments of call {call.id!r} are not a JSON object; send them as received")
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


def _reasoning(body: ChatRequest) -> tuple[bool, dict[str, Any]]:
    """Whether reasoning is enabled, and the variables for the chat template."""
    variables = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        variables.setdefault("enable_thinking", body.reasoning_effort != "none")
    return bool(variables.get("enable_thinking")), variables


def _required(choice: object, tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Declarations of the functions of which one must be called; none if `tool_choice` requires no call."""
    declared = [tool.function.model_dump(exclude_none=True) for tool in tools]
    if isinstance(choice, ChosenTool):
        chosen = [tool for tool in declared if tool["name"] == choice.function.name]
        if not chosen:
            raise SettingsError(f"tool_choice names {choice.function.name!r}, which is not among the tools; add it")
        return chosen
    if choice == "required" and not declared:
        raise SettingsError("tool_choice is required, and there are no tools; add them")
    return declared if choice == "required" else []


def _sampling(model: SamplingParams, body: GenerationRequest) -> SamplingParams:
    """The model's own parameters, replaced by those in the request."""
    given = {name: getattr(body, name, None) for name in PARAMETERS}
    changed: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if "top_k" in changed:
        changed["top_k"] = max(0, changed["top_k"])  # other servers write -1 for all tokens
    if "seed" in changed:
        changed["seed"] %= 1 << 64
    if bias := getattr(body, "logit_bias", None):
        changed["bias"] = tuple((int(token), value) for token, value in bias.items())
    return replace(model, **changed)
