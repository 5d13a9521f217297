"""The server through OpenAI's own client, with the bundled pair: real model, real protocol, real HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import SimpleNamespace

import httpx
import jsonschema_rs
import openai
import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

import paceline
from tests.fixtures.serving import scripted_engine, serving

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
PROMPT = "def fibonacci(n):"
CHAT = [{"role": "user", "content": PROMPT}]
EVENT = TypeAdapter(ResponseStreamEvent)


@pytest.fixture(scope="module")
def server() -> Iterator[SimpleNamespace]:
    engine = paceline.load("tiny-python", slots=4, cache_memory=64 << 20)
    with serving(engine, names=("tiny-python", "alias")) as server:
        yield SimpleNamespace(engine=engine, **vars(server))


@pytest.fixture
def client(server: SimpleNamespace) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def alone(server: SimpleNamespace, prompt: object, **settings: object) -> paceline.Generation:
    """What the library writes, plain and by itself."""
    return paceline.load("tiny-python", draft_tokens=0).generate(prompt, **settings)


def test_chat(client: openai.OpenAI, server: SimpleNamespace) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="tiny-python", messages=CHAT, max_tokens=60, temperature=0
    )
    answer = ChatCompletion.model_validate_json(raw.text, strict=False)
    expected = alone(server, PROMPT, max_tokens=60, sampling=paceline.SamplingParams())
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].finish_reason == expected.finish
    assert answer.usage.completion_tokens == len(expected.tokens)
    assert answer.usage.prompt_tokens == expected.statistics.prompt_tokens
    assert answer.choices[0].paceline["accepted"] > 0


def test_streamed_chat_is_the_same_text(client: openai.OpenAI, server: SimpleNamespace) -> None:
    with client.chat.completions.with_streaming_response.create(
        model="tiny-python",
        messages=CHAT,
        max_tokens=60,
        seed=7,
        temperature=0.8,
        stream=True,
        stream_options={"include_usage": True},
    ) as stream:
        lines = [line for line in stream.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    chunks = [ChatCompletionChunk.model_validate_json(line[6:]) for line in lines[:-1]]
    sampling = paceline.SamplingParams(temperature=0.8, top_k=64, top_p=0.95, seed=7)
    expected = alone(server, PROMPT, max_tokens=60, sampling=sampling)
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == expected.text
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == expected.finish
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len(expected.tokens)


def test_a_stream_told_by_rounds(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="tiny-python",
        messages=CHAT,
        max_tokens=60,
        temperature=0,
        stream=True,
        extra_body={"return_rounds": True},
    )
    rounds, text = [], ""
    for chunk in stream:
        text += chunk.choices[0].delta.content or ""
        rounds += [chunk.choices[0].round] if hasattr(chunk.choices[0], "round") else []
    assert "".join(delta for one in rounds for delta, _ in one["deltas"]) == text
    assert sum(one["accepted"] for one in rounds) == sum(depth > 0 for one in rounds for _, depth in one["deltas"]) > 0


def test_choices_with_seeds_one_after_another(client: openai.OpenAI, server: SimpleNamespace) -> None:
    answer = client.chat.completions.create(model="tiny-python", messages=CHAT, max_tokens=20, seed=5, n=3)
    for index, choice in enumerate(answer.choices):
        sampling = paceline.SamplingParams(temperature=1.0, top_k=64, top_p=0.95, seed=5 + index)
        assert choice.message.content == alone(server, PROMPT, max_tokens=20, sampling=sampling).text


def test_stop_strings(client: openai.OpenAI) -> None:
    everything = {"top_k": -1}  # others' way of switching it off
    settings = {"model": "tiny-python", "messages": CHAT, "max_tokens": 60, "temperature": 0, "extra_body": everything}
    whole = client.chat.completions.create(**settings).choices[0].message.content
    stop = whole[30:36]
    choice = client.chat.completions.create(**settings, stop=["never", stop]).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("stop", whole[: whole.index(stop)])


def test_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny-python", messages=CHAT, max_tokens=12, temperature=0, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == 12
    assert b"".join(bytes(token.bytes) for token in content).decode() == answer.choices[0].message.content
    for token in content:
        assert token.top_logprobs[0].token == token.token
        assert token.logprob == max(one.logprob for one in token.top_logprobs) <= 0


def test_the_next_turn_is_cached(client: openai.OpenAI) -> None:
    words = {
        "type": "regex",
        "regex": "[a-z ]{60}",
    }  # a text that begins with a line break is other tokens when it comes back
    first = client.chat.completions.create(model="tiny-python", messages=CHAT, temperature=0, response_format=words)
    said = {"role": "assistant", "content": first.choices[0].message.content}
    second = client.chat.completions.create(
        model="tiny-python", messages=[*CHAT, said, {"role": "user", "content": "more"}], max_tokens=5, temperature=0
    )
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_json_schema(client: openai.OpenAI, stream: bool) -> None:
    format_ = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    answer = client.chat.completions.create(
        model="tiny-python", messages=CHAT, max_tokens=400, seed=1, response_format=format_, stream=stream
    )
    text = (
        "".join(chunk.choices[0].delta.content or "" for chunk in answer)
        if stream
        else answer.choices[0].message.content
    )
    jsonschema_rs.validate(PERSON, json.loads(text))


def test_json_object_and_regex(client: openai.OpenAI) -> None:
    for seed in range(3):
        answer = client.chat.completions.create(
            model="tiny-python", messages=CHAT, max_tokens=300, seed=seed, response_format={"type": "json_object"}
        )
        choice = answer.choices[0]
        assert choice.finish_reason == "length" or isinstance(json.loads(choice.message.content), dict)
        answer = client.completions.create(
            model="tiny-python",
            prompt=PROMPT,
            max_tokens=50,
            seed=seed,
            extra_body={"response_format": {"type": "regex", "regex": "(yes|no){2}!"}},
        )
        assert answer.choices[0].text in {"yesyes!", "yesno!", "noyes!", "nono!"}


def test_drafting_under_a_grammar(client: openai.OpenAI) -> None:
    """The same text at any depth, and drafts are accepted on the way."""
    texts, accepted = set(), 0
    for depth in (0, 3, 8, "auto"):
        answer = client.chat.completions.create(
            model="tiny-python",
            messages=CHAT,
            max_tokens=120,
            temperature=0,
            response_format={"type": "regex", "regex": "(    [a-z]+ = [a-z]+\\(\\)\n){20}"},
            extra_body={"draft_tokens": depth},
        )
        texts.add(answer.choices[0].message.content)
        accepted += answer.choices[0].paceline["accepted"] if depth else 0
    assert len(texts) == 1
    assert accepted > 20


def test_completions(client: openai.OpenAI, server: SimpleNamespace) -> None:
    raw = client.completions.with_raw_response.create(
        model="alias", prompt=[PROMPT, "class A:"], max_tokens=15, temperature=0, n=2, logprobs=2, echo=True
    )
    answer = Completion.model_validate_json(raw.text)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    for choice, prompt in zip(answer.choices, [PROMPT, PROMPT, "class A:", "class A:"], strict=True):
        text = alone(server, prompt, raw=True, max_tokens=15, sampling=paceline.SamplingParams()).text
        assert choice.text == prompt + text
        assert "".join(choice.logprobs.tokens) == text
        assert choice.logprobs.text_offset[0] == len(prompt)
    streamed = client.completions.create(
        model="tiny-python", prompt=PROMPT, max_tokens=15, temperature=0, echo=True, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in streamed) == answer.choices[0].text
    ids = server.engine.encode(PROMPT, raw=True)
    by_ids = client.completions.create(model="tiny-python", prompt=ids, max_tokens=15, temperature=0)
    assert PROMPT + by_ids.choices[0].text == answer.choices[0].text


def test_responses(client: openai.OpenAI, server: SimpleNamespace) -> None:
    raw = client.responses.with_raw_response.create(
        model="tiny-python", input=PROMPT, max_output_tokens=30, temperature=0
    )
    answer = Response.model_validate_json(raw.text)
    expected = alone(server, PROMPT, max_tokens=30, sampling=paceline.SamplingParams()).text
    assert answer.output_text == expected
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    with client.responses.with_streaming_response.create(
        model="tiny-python", input=CHAT, max_output_tokens=30, temperature=0, stream=True
    ) as stream:
        lines = list(stream.iter_lines())
    events = [EVENT.validate_json(line[6:]) for line in lines if line.startswith("data: ")]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == expected
    assert events[-1].response.output_text == expected
    yes = {"format": {"type": "json_schema", "name": "word", "schema": {"enum": ["yes"]}}}
    with client.responses.stream(model="tiny-python", input=PROMPT, text=yes) as helper:
        for _ in helper:
            pass
        assert helper.get_final_response().output_text == '"yes"'


def test_models_and_tokens(client: openai.OpenAI, server: SimpleNamespace) -> None:
    assert [model.id for model in client.models.list()] == ["tiny-python", "alias"]
    assert isinstance(client.models.retrieve("alias"), Model)
    tokens = httpx.post(f"{server.url}/tokenize", json={"prompt": PROMPT, "return_token_strs": True}).json()
    assert tokens["tokens"] == server.engine.encode(PROMPT, raw=True)
    assert tokens["count"] == len(tokens["tokens"]) == len(tokens["token_strs"])
    back = httpx.post(f"{server.url}/detokenize", json={"tokens": tokens["tokens"]}).json()
    assert back["prompt"] == PROMPT
    chat = httpx.post(f"{server.url}/tokenize", json={"messages": CHAT}).json()
    assert chat["tokens"] == server.engine.encode(PROMPT)


def test_metrics(client: openai.OpenAI, server: SimpleNamespace) -> None:
    client.chat.completions.create(model="tiny-python", messages=CHAT, max_tokens=40, temperature=0)
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    figures = {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}
    name = '{model_name="tiny-python"}'
    assert figures[f"paceline:generation_tokens_total{name}"] >= 40
    accepted = figures[f"paceline:spec_decode_num_accepted_tokens_total{name}"]
    by_depth = [value for key, value in figures.items() if "accepted_tokens_per_pos_total" in key]
    assert 0 < accepted <= figures[f"paceline:spec_decode_num_draft_tokens_total{name}"]
    assert sum(by_depth) == accepted
    assert sum(n for key, n in figures.items() if "num_accepted_tokens_by_proposer_total" in key) == accepted
    assert figures[f"paceline:num_requests_running{name}"] == 0
    assert figures[f"paceline:time_to_first_token_seconds_count{name}"] >= 1
    assert figures[f"paceline:prefix_cache_hits_total{name}"] <= figures[f"paceline:prefix_cache_queries_total{name}"]


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
CALLING = (
    "<|channel>thought\nWhich city?\n<channel|>I look. "
    '<|tool_call>call:get_weather{city:<|"|>Graz<|"|>,days:3}<tool_call|><|tool_call>call:get_weather{city:<|"|>Ulm<|"|>}<tool_call|>'
)


def test_tools_in_one_piece_and_streamed() -> None:
    with serving(scripted_engine(CALLING)) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        settings = {"model": "test-model", "messages": CHAT, "tools": [WEATHER]}
        answer = ChatCompletion.model_validate_json(client.chat.completions.with_raw_response.create(**settings).text)
        message = answer.choices[0].message
        assert answer.choices[0].finish_reason == "tool_calls"
        assert (message.content, message.reasoning_content) == ("I look. ", "Which city?")
        calls = [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls]
        assert calls == [("get_weather", {"city": "Graz", "days": 3}), ("get_weather", {"city": "Ulm"})]
        with client.chat.completions.stream(**settings) as stream:
            kinds = {event.type for event in stream}
            final = stream.get_final_completion().choices[0]
        assert "tool_calls.function.arguments.done" in kinds
        assert [(c.function.name, json.loads(c.function.arguments)) for c in final.message.tool_calls] == calls
        assert final.finish_reason == "tool_calls"
        answered = [{"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in message.tool_calls]
        said = message.model_dump(include={"role", "content", "tool_calls"})
        again = client.chat.completions.create(**{**settings, "messages": [*CHAT, said, *answered]})
        assert again.usage.prompt_tokens > answer.usage.prompt_tokens


def test_function_calls_of_responses() -> None:
    with serving(scripted_engine(CALLING)) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        tool = {"type": "function", **WEATHER["function"]}
        settings = {"model": "test-model", "input": "Weather?", "tools": [tool], "reasoning": {"effort": "low"}}
        answer = Response.model_validate_json(client.responses.with_raw_response.create(**settings).text)
        assert [item.type for item in answer.output] == ["reasoning", "message", "function_call", "function_call"]
        assert answer.output[0].content[0].text == "Which city?"
        assert json.loads(answer.output[2].arguments) == {"city": "Graz", "days": 3}
        with client.responses.with_streaming_response.create(**settings, stream=True) as stream:
            events = [EVENT.validate_json(line[6:]) for line in stream.iter_lines() if line.startswith("data: ")]
        last = events[-1].response
        assert [item.type for item in last.output] == [item.type for item in answer.output]
        arguments = [e.arguments for e in events if e.type == "response.function_call_arguments.done"]
        assert [json.loads(text) for text in arguments] == [{"city": "Graz", "days": 3}, {"city": "Ulm"}]
        outputs = [{"type": "function_call_output", "call_id": last.output[i].call_id, "output": "ok"} for i in (2, 3)]
        history = [{"role": "user", "content": "Weather?"}, *(item.model_dump() for item in last.output), *outputs]
        assert client.responses.create(**{**settings, "input": history}).status == "completed"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
@pytest.mark.parametrize("effort", ["none", "high"])
def test_required_tool_call(choice: object, effort: str) -> None:
    with serving(scripted_engine(None, truth=0.5)) as server:  # a model that writes noise
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        answer = client.chat.completions.create(
            model="test-model",
            messages=CHAT,
            tools=[WEATHER],
            tool_choice=choice,
            reasoning_effort=effort,
            max_tokens=1500,
            seed=3,
            temperature=1,
        )
        message = answer.choices[0].message
        for call in message.tool_calls or ():
            assert call.function.name == "get_weather"
        if answer.choices[0].finish_reason == "tool_calls":
            jsonschema_rs.validate(
                WEATHER["function"]["parameters"], json.loads(message.tool_calls[0].function.arguments)
            )


def test_tools_without_template_support(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="does not support tools"):
        client.chat.completions.create(model="tiny-python", messages=CHAT, tools=[WEATHER])
