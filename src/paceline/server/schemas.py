"""What requests may hold: OpenAI's fields, and paceline's own where it has more to offer.

Fields that other servers know and this one does not are reported in the answer's `x-paceline-ignored` header.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MOST_CHOICES = 16
MOST_TOP_LOGPROBS = 20
MOST_STOPS = 16

Stop = Annotated[list[Annotated[str, Field(min_length=1)]], Field(fail_fast=True, max_length=MOST_STOPS)]
TokenName = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,8})$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
Token = Annotated[int, Field(ge=0, lt=1 << 31)]
FEW, MANY, MOST_TOKENS = 1024, 10_000, 4_000_000  # items of lists: more are no use, and checking takes time
Tokens = Annotated[list[Token], Field(fail_fast=True, max_length=MOST_TOKENS)]
HARMLESS = frozenset(
    {"user", "metadata", "store", "service_tier", "prompt_cache_key", "prompt_cache_retention", "safety_identifier"}
)  # nothing is lost by not knowing these


class Body(BaseModel):
    """A request's body. What it holds beyond the fields is kept in `model_extra`."""

    model_config = ConfigDict(extra="allow")

    @property
    def ignored(self) -> list[str]:
        """Fields given that have no effect here."""
        return sorted(
            name for name, value in (self.model_extra or {}).items() if value is not None and name not in HARMLESS
        )


class Generating(Body):
    """What all requests for text share."""

    model: str | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31)] | None = Field(None, description="0 and -1: all tokens.")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)] | None = None
    draft_tokens: Annotated[int, Field(ge=0, le=15)] | Literal["auto"] | None = Field(
        None, description="Tokens drafted a round: 0 is plain decoding. The text does not depend on it."
    )
    acceptance_rule: Literal["coupled", "rejection"] | None = None
    return_rounds: bool | None = Field(None, description="While streaming, say where each token came from.")


class Penalised(Generating):
    """Settings that chat and completions share, and responses have not."""

    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] | None = (
        None
    )
    stop: Annotated[str, Field(min_length=1)] | Stop | None = None
    stream_options: StreamOptions | None = None


class StreamOptions(Body):
    include_usage: bool | None = None


class TextPart(Body):
    type: Literal["text", "input_text", "output_text"]
    text: str


class CalledFunction(Body):
    name: Annotated[str, Field(min_length=1)]
    arguments: str = "{}"


class Called(Body):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True, max_length=MANY)] | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[Called], Field(fail_fast=True, max_length=FEW)] | None = None
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


class ChatRequest(Penalised):
    messages: Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1, max_length=MANY)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=FEW)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = Field(
        None, description="Whether the model thinks before it answers: any word but none switches it on."
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="Names for the model's chat template, such as enable_thinking."
    )


class CompletionRequest(Penalised):
    prompt: str | Tokens | Annotated[list[str | Tokens], Field(fail_fast=True, min_length=1, max_length=MOST_CHOICES)]
    max_tokens: Annotated[int, Field(ge=1)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    echo: bool | None = None
    response_format: ResponseFormat | None = None


class ResponseTool(Body):
    type: Literal["function"]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseToolChoice(Body):
    type: Literal["function"]
    name: str


class InputMessage(Body):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True, max_length=MANY)]


class InputCall(Body):
    type: Literal["function_call"]
    call_id: str
    name: Annotated[str, Field(min_length=1)]
    arguments: str = "{}"


class InputCallOutput(Body):
    type: Literal["function_call_output"]
    call_id: str
    output: str | Annotated[list[TextPart], Field(fail_fast=True, max_length=MANY)]


class InputReasoning(Body):
    type: Literal["reasoning"]


InputItem = InputCall | InputCallOutput | InputReasoning | InputMessage


class TextFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    name: str = "answer"
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None


class TextSettings(Body):
    format: TextFormat | None = None


class Reasoning(Body):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None


class ResponsesRequest(Generating):
    input: str | Annotated[list[InputItem], Field(fail_fast=True, min_length=1, max_length=MANY)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    tools: Annotated[list[ResponseTool], Field(fail_fast=True, max_length=FEW)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextSettings | None = None
    reasoning: Reasoning | None = None
    previous_response_id: None = None  # nothing is stored here: send the conversation
    conversation: None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None


class TokenizeRequest(Body):
    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1, max_length=MANY)] | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=FEW)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool | None = True
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: Tokens
