"""Request bodies: OpenAI's fields, and paceline's own.

Fields that other servers know and this one does not are reported in the answer's `x-paceline-ignored` header.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, create_model

from paceline.sampling_params import PARAMETERS

MAX_CHOICES = 16
MAX_TOP_LOGPROBS = 20
MAX_STOPS = 16

Stop = Annotated[list[Annotated[str, Field(min_length=1)]], Field(fail_fast=True, max_length=MAX_STOPS)]
TokenName = Annotated[str, Field(pattern=r"^\d{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
Token = Annotated[int, Field(ge=0, lt=1 << 31)]
FEW, MANY, MAX_TOKENS = 1024, 10_000, 1 << 20  # limits of lists, because validation takes time
MAX_VARIABLES, MAX_VARIABLE_DEPTH, MAX_VARIABLE_CHARACTERS = 256, 8, 32 << 10  # of chat_template_kwargs, in all
Tokens = Annotated[list[Token], Field(fail_fast=True, max_length=MAX_TOKENS)]
HARMLESS = frozenset(
    {"user", "metadata", "store", "service_tier", "prompt_cache_key", "prompt_cache_retention", "safety_identifier"}
)  # not reported as ignored: they do not change the answer


def _few_variables(variables: dict[str, Any]) -> dict[str, Any]:
    """Reject variables for templates that are more than switches and short texts."""
    count = characters = 0
    left: list[tuple[Any, int]] = [(variables, 0)]
    while left:
        value, depth = left.pop()
        inner = value if isinstance(value, list) else []
        if isinstance(value, dict):
            characters += sum(map(len, value))
            inner = list(value.values())
        characters += len(value) if isinstance(value, str) else 0
        count += len(inner)
        if count > MAX_VARIABLES or depth > MAX_VARIABLE_DEPTH or characters > MAX_VARIABLE_CHARACTERS:
            raise ValueError(
                f"at most {MAX_VARIABLES} values, {MAX_VARIABLE_DEPTH} levels and {MAX_VARIABLE_CHARACTERS} characters"
            )
        left += [(one, depth + 1) for one in inner]
    return variables


Variables = Annotated[dict[str, Any], AfterValidator(_few_variables)]


class Body(BaseModel):
    """A request body. Unknown fields are kept in `model_extra`. Types are exact: neither true nor "1" is a number."""

    model_config = ConfigDict(extra="allow", strict=True)

    @property
    def ignored(self) -> list[str]:
        """Fields given that have no effect here."""
        return sorted(
            name for name, value in (self.model_extra or {}).items() if value is not None and name not in HARMLESS
        )


def _sampling_fields(base: type[Body], name: str, *, in_responses: bool) -> type[Body]:
    """A body with fields for the sampling parameters, their ranges as declared in `paceline.sampling_params`."""
    numbers: dict[str, Any] = {}
    for field, parameter in PARAMETERS.items():
        if parameter.in_responses == in_responses:
            low, high = parameter.api_range or (parameter.low, parameter.high)
            numbers[field] = (Annotated[parameter.kind, Field(ge=low, le=high)] | None, None)
    return create_model(name, __base__=base, **numbers)


class RequestBody(Body):
    """What all requests have in common."""

    model: str | None = None


class GenerationRequest(_sampling_fields(RequestBody, "Sampling", in_responses=True)):  # type: ignore[misc]
    """What all requests for text have in common."""

    stream: bool | None = None
    draft_tokens: Annotated[int, Field(ge=0, le=15)] | Literal["auto"] | None = Field(
        None, description="Tokens drafted per round; 0 is plain decoding. The text does not depend on it."
    )
    return_rounds: bool | None = Field(None, description="While streaming, report where each token came from.")


class ChoicesRequest(_sampling_fields(GenerationRequest, "Penalties", in_responses=False)):  # type: ignore[misc]
    """What chat and completion requests have in common, and /v1/responses lacks."""

    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    logit_bias: dict[TokenName, Bias] | None = None
    stop: Annotated[str, Field(min_length=1)] | Stop | None = None
    stream_options: StreamOptions | None = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the counts of tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class StreamOptions(Body):
    include_usage: bool | None = None


class TextPart(Body):
    type: Literal["text", "input_text", "output_text"]
    text: str


class CalledFunction(Body):
    name: Annotated[str, Field(min_length=1)]
    arguments: str = "{}"


class ToolCall(Body):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True, max_length=MANY)] | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True, max_length=FEW)] | None = None
    tool_call_id: str | None = None
    name: str | None = None


class Function(Body):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class ChosenFunction(Body):
    name: str


class ChosenTool(Body):
    type: Literal["function"]
    function: ChosenFunction


class JsonSchema(Body):
    name: str = "answer"
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema", "regex"]
    json_schema: JsonSchema | None = None
    regex: Annotated[str, Field(min_length=1)] | None = None


class ChatRequest(ChoicesRequest):
    messages: Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1, max_length=MANY)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=FEW)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = Field(
        None, description="Any value but none enables thinking."
    )
    chat_template_kwargs: Variables | None = Field(
        None, description="Variables for the model's chat template, such as enable_thinking."
    )


class CompletionRequest(ChoicesRequest):
    prompt: str | Tokens | Annotated[list[str | Tokens], Field(fail_fast=True, min_length=1, max_length=MAX_CHOICES)]
    max_tokens: Annotated[int, Field(ge=1)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: bool | None = None
    response_format: ResponseFormat | None = None


class ResponseTool(Function):
    type: Literal["function"]


class ResponseToolChoice(ChosenFunction):
    type: Literal["function"]


class InputMessage(Body):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True, max_length=MANY)]


class InputCall(CalledFunction):
    type: Literal["function_call"]
    call_id: str


class InputCallOutput(Body):
    type: Literal["function_call_output"]
    call_id: str
    output: str | Annotated[list[TextPart], Field(fail_fast=True, max_length=MANY)]


class InputReasoning(Body):
    type: Literal["reasoning"]


def _item_type(item: Any) -> Any:
    return item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", None)


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[InputCall, Tag("function_call")]
    | Annotated[InputCallOutput, Tag("function_call_output")]
    | Annotated[InputReasoning, Tag("reasoning")],
    Discriminator(
        _item_type,
        custom_error_type="input_item",
        custom_error_message="type must be message, function_call, function_call_output or reasoning",
    ),
]


class TextFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    name: str = "answer"
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None


class TextSettings(Body):
    format: TextFormat | None = None


class Reasoning(Body):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None


class ResponsesRequest(GenerationRequest):
    input: str | Annotated[list[InputItem], Field(fail_fast=True, min_length=1, max_length=MANY)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    tools: Annotated[list[ResponseTool], Field(fail_fast=True, max_length=FEW)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextSettings | None = None
    reasoning: Reasoning | None = None
    previous_response_id: None = None  # responses are not stored: send the whole conversation
    conversation: None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None


class TokenizeRequest(RequestBody):
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1, max_length=MANY)] | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=FEW)] | None = None
    chat_template_kwargs: Variables | None = None
    add_special_tokens: bool | None = True
    return_token_strs: bool | None = None


class DetokenizeRequest(RequestBody):
    tokens: Tokens
