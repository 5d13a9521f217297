"""What goes wrong around a server, and that it disturbs nobody else: bad requests, lost clients, keys, its own end."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import httpx
import openai
import pytest

from paceline.server.access import AccessMiddleware
from paceline.server.bodies import Bodies
from tests.fixtures.serving import scripted_engine, serving, wait_until

CHAT = [{"role": "user", "content": "Hi"}]
LONG = "abc " * 400


@pytest.fixture(scope="module")
def server() -> Iterator[SimpleNamespace]:
    with serving(scripted_engine("Hello there.", slots=2)) as server:
        yield server


def post(server: SimpleNamespace, path: str, **body: object) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body, timeout=20)


BAD_CALL = {"id": "1", "function": {"name": "f", "arguments": "["}}
CHAT_ERRORS = [
    ({"messages": []}, "messages"),
    ({"messages": "Hi"}, "messages"),
    ({"messages": [{"role": "king", "content": "Hi"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages.0"),
    ({"messages": CHAT, "temperature": "hot"}, "temperature"),
    ({"messages": CHAT, "temperature": -1}, "temperature"),
    ({"messages": CHAT, "temperature": 1e-9}, "use 0 for greedy"),
    ({"messages": CHAT, "top_p": 2}, "top_p"),
    ({"messages": CHAT, "n": 99}, "n:"),
    ({"messages": CHAT, "max_tokens": 0}, "max_tokens"),
    ({"messages": CHAT, "stop": [""]}, "stop"),
    ({"messages": CHAT, "logit_bias": {"99999": 1}}, "token 99999"),
    ({"messages": CHAT, "logit_bias": {"x": 1}}, "logit_bias"),
    ({"messages": CHAT, "draft_tokens": 99}, "draft_tokens"),
    ({"messages": CHAT, "top_logprobs": 2}, "logprobs: true"),
    ({"messages": CHAT, "response_format": {"type": "json_schema"}}, "needs json_schema"),
    (
        {"messages": CHAT, "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "thing"}}}},
        "schema cannot be used",
    ),
    ({"messages": CHAT, "response_format": {"type": "regex", "regex": "(a"}}, "cannot be used: unclosed group"),
    ({"messages": CHAT, "tool_choice": "required"}, "there are no tools"),
    ({"messages": CHAT, "model": 3}, "model"),
    ({"messages": [{"role": "assistant", "tool_calls": [BAD_CALL]}]}, "not a JSON object"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "hex escape"),
    ({"messages": [{"role": "user", "content": "word " * 3000}]}, "the context holds"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "message"), CHAT_ERRORS, ids=[message for _, message in CHAT_ERRORS])
def test_bad_requests_get_a_line_that_says_why(server: SimpleNamespace, body: dict, message: str) -> None:
    answer = httpx.post(
        f"{server.url}/v1/chat/completions", content=json.dumps(body), headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"
    assert "Traceback" not in answer.text


def test_responses_without_a_message(server: SimpleNamespace) -> None:
    answer = post(server, "/v1/responses", input=[{"type": "reasoning"}])
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "the input holds no message; add one")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'{"messages": "\xff"}', b"\xff\xfe", b"[" * 100_000, b'{"messages":' * 5000]
)
@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize", "/detokenize"]
)
def test_what_is_no_json_is_refused(server: SimpleNamespace, path: str, content: bytes) -> None:
    answer = httpx.post(server.url + path, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


def test_recursive_and_deep_schemas_get_an_answer(server: SimpleNamespace) -> None:
    deep: dict = {"type": "object"}
    for _ in range(60):
        deep = {"type": "array", "items": deep}
    recursive = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}
    wild = {"type": "string", "pattern": "((((a{1,99}){1,99}){1,99}){1,99}){1,99}"}
    for schema, status in ((recursive, 400), (wild, 200)):
        format_ = {"type": "json_schema", "json_schema": {"schema": schema}}
        answer = post(server, "/v1/chat/completions", messages=CHAT, response_format=format_, max_tokens=3)
        assert answer.status_code == status, answer.text
    for parameters in (recursive, wild, deep, {"properties": {"a": recursive}, "$defs": recursive["$defs"]}):
        tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
        body = {"messages": CHAT, "tools": [tool], "tool_choice": "required", "max_tokens": 3}
        assert post(server, "/v1/chat/completions", **body).status_code == 200


def test_unknown_models_paths_and_methods(server: SimpleNamespace) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-5' here") as caught:
        client.chat.completions.create(model="gpt-5", messages=CHAT)
    assert caught.value.code == "model_not_found"
    for method, path, status in (
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/models/other", 404),
        ("GET", "/../pyproject.toml", 404),
        ("GET", "/%2e%2e/app.py", 404),
        ("GET", "/playground.html", 404),
        ("GET", "/static/app.py", 404),
        ("DELETE", "/v1/models", 405),
        ("GET", "/docs", 404),
    ):
        answer = httpx.request(method, server.url + path)
        assert (answer.status_code, "error" in answer.json()) == (status, True)


def test_ignored_fields_are_named(server: SimpleNamespace) -> None:
    answer = post(server, "/v1/chat/completions", messages=CHAT, user="me", best_of=3, mirostat=2)
    assert answer.status_code == 200
    assert answer.headers["x-paceline-ignored"] == "best_of,mirostat"


def test_size_is_bounded_with_and_without_a_length() -> None:
    with serving(scripted_engine("Hi"), max_bytes=2000) as server:
        big = json.dumps({"messages": [{"role": "user", "content": "x" * 5000}]}).encode()
        headers = {"content-type": "application/json"}
        for content in (big, iter([big[:1000], big[1000:]])):  # the second is sent in chunks
            answer = httpx.post(f"{server.url}/v1/chat/completions", content=content, headers=headers)
            assert (answer.status_code, "larger than 2000 bytes" in answer.json()["error"]["message"]) == (413, True)
        assert post(server, "/v1/chat/completions", messages=CHAT).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_lost_client_frees_its_slot_within_a_round(stream: bool) -> None:
    engine = scripted_engine(LONG, slots=1)
    engine.backend.seconds = 0.02
    with serving(engine) as server:
        body = json.dumps({"messages": CHAT, "stream": stream}).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1]))) as connection:
                connection.sendall(head.encode() + body)
                wait_until(lambda: engine.scheduler.running and engine.scheduler.running[0].generated)
                sequence = engine.scheduler.running[0]
            wait_until(lambda s=sequence: s.finish, 1.0)
            written = len(sequence.generated)
            wait_until(lambda: not engine.scheduler.running, 1.0)
            assert sequence.finish == "cancelled"
            assert len(sequence.generated) <= written + 16  # the round that ran
        assert server.service.runner._requests == set()
        assert server.service.metrics._last == {}


def test_a_full_queue_says_so() -> None:
    engine = scripted_engine(LONG, slots=1, most_waiting=1)
    engine.backend.seconds = 0.01
    with serving(engine) as server:
        asking = [
            threading.Thread(target=post, args=(server, "/v1/chat/completions"), kwargs={"messages": CHAT})
            for _ in range(2)
        ]
        for index, thread in enumerate(asking):
            thread.start()
            wait_until(lambda n=index: len(engine.scheduler.running) + engine.scheduler.waiting > n)
        answer = post(server, "/v1/chat/completions", messages=CHAT)
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        assert answer.json()["error"]["code"] == "queue_full"
        engine.backend.seconds = 0.0
        for thread in asking:
            thread.join(20)


def test_a_request_that_takes_too_long_is_ended() -> None:
    engine = scripted_engine(LONG, slots=1)
    engine.backend.seconds = 0.05
    with serving(engine, max_seconds=0.3) as server:
        answer = post(server, "/v1/chat/completions", messages=CHAT)
        assert (answer.status_code, answer.json()["error"]["code"]) == (408, "timeout")
        with httpx.stream(
            "POST", f"{server.url}/v1/chat/completions", json={"messages": CHAT, "stream": True}
        ) as stream:
            lines = [line for line in stream.iter_lines() if line.startswith("data: ")]
        assert json.loads(lines[-1][6:])["error"]["code"] == "timeout"
        wait_until(lambda: not engine.scheduler.running, 1.0)


def test_the_server_survives_an_engine_fault(caplog: pytest.LogCaptureFixture) -> None:
    engine = scripted_engine("Hello there.", slots=2)
    run = engine.backend.run
    with serving(engine) as server:
        engine.backend.run = lambda _: 1 / 0
        with caplog.at_level(logging.CRITICAL):
            answer = post(server, "/v1/chat/completions", messages=CHAT)
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
        assert "division" not in answer.text
        engine.backend.run = run
        assert (
            post(server, "/v1/chat/completions", messages=CHAT).json()["choices"][0]["message"]["content"]
            == "Hello there."
        )


def test_keys() -> None:
    with serving(scripted_engine("Hi"), keys=("secret-a", "secret-b")) as server:
        for path in ("/v1/models", "/metrics", "/tokenize", "/v1/chat/completions", "/openapi.json", "/nothing"):
            for headers in ({}, {"authorization": "Bearer secret"}, {"authorization": "Bearer"}, {"x-api-key": "no"}):
                answer = httpx.get(server.url + path, headers=headers)
                assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        for key in ("secret-a", "secret-b"):
            assert httpx.get(f"{server.url}/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200
            assert httpx.get(f"{server.url}/v1/models", headers={"x-api-key": key}).status_code == 200
        assert httpx.get(f"{server.url}/health").status_code == httpx.get(f"{server.url}/").status_code == 200
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).models.list()


def test_every_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Digests of one length, each compared by `hmac.compare_digest`, whether or not an earlier one was right."""
    compared: list[tuple[bytes, bytes]] = []

    def watched(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return one == other

    monkeypatch.setattr("hmac.compare_digest", watched)
    guard = AccessMiddleware(lambda *_: asyncio.sleep(0), ["a", "b" * 50, "c"], [], Bodies(10))
    scope = {"type": "http", "path": "/v1/models", "headers": [(b"authorization", b"Bearer a")]}
    asyncio.run(guard(scope, lambda: asyncio.sleep(0), lambda _: asyncio.sleep(0)))
    assert len(compared) == 3
    assert {len(digest) for pair in compared for digest in pair} == {32}


def test_other_hosts_names_are_refused() -> None:
    with serving(scripted_engine("Hi"), hosts=("127.0.0.1", "localhost", "[::1]")) as server:
        port = server.url.rsplit(":", 1)[1]
        for host, status in (
            (f"127.0.0.1:{port}", 200),
            ("localhost", 200),
            ("[::1]:99", 200),
            ("evil.example", 403),
            (f"127.0.0.1.evil.example:{port}", 403),
            ("", 403),
        ):
            assert httpx.get(f"{server.url}/v1/models", headers={"host": host}).status_code == status


def test_prompts_reach_the_log_only_when_asked(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    for asked in (False, True):
        caplog.clear()
        with serving(scripted_engine("Hello there."), log_prompts=asked) as server:
            post(server, "/v1/chat/completions", messages=[{"role": "user", "content": "a secret thing"}])
            post(server, "/v1/chat/completions", messages=[{"role": "user", "content": "a secret thing"}], n="x")
        assert ("secret thing" in caplog.text) == asked
        assert "Hello there" not in caplog.text


def test_a_stop_under_load_finishes_what_was_begun() -> None:
    """SIGTERM to a real server with running and waiting streams: each comes to its own end, whole."""
    command = [sys.executable, "-m", "paceline", "serve", "--port", "0", "--slots", "2", "--threads", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        url = next(found[1] for line in process.stderr if (found := re.search(r"listening at (http://[^/]+)/", line)))
        threading.Thread(target=process.stderr.read, daemon=True).start()
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        begun, texts = threading.Barrier(5), {}

        def ask(number: int) -> None:
            stream = client.completions.create(
                model="tiny-python", prompt="x = [", max_tokens=600, seed=number, stream=True,
                temperature=1.5, logit_bias={"1": -100, "5": -100},
            )  # fmt: skip
            if number < 2:
                chunks = [next(stream)]
                begun.wait()
            else:
                begun.wait()
                chunks = []
            chunks += list(stream)
            texts[number] = (
                sum(1 for _ in chunks),
                chunks[-1].choices[0].finish_reason,
                chunks[-1].choices[0].paceline,
            )

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        begun.wait()
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(60)
        assert sorted(texts) == [0, 1, 2, 3]
        assert all(finish == "length" for _, finish, _ in texts.values())
        assert process.wait(20) == 0
    finally:
        process.kill()


def test_a_refused_request_leaves_no_room_taken() -> None:
    """More texts than fit beside what waits: 429 and nothing else happens; more than can ever fit: 400."""
    engine = scripted_engine("Hello there.", slots=1, most_waiting=2)
    with serving(engine) as server:
        assert post(server, "/v1/chat/completions", messages=CHAT).status_code == 200
        assert post(server, "/v1/chat/completions", messages=CHAT, n=4).status_code == 400
        engine.backend.seconds = 0.5
        busy = threading.Thread(target=post, args=(server, "/v1/chat/completions"), kwargs={"messages": CHAT})
        busy.start()
        wait_until(lambda: engine.scheduler.running)
        assert post(server, "/v1/chat/completions", messages=CHAT, n=3).status_code == 429
        engine.backend.seconds = 0.0
        busy.join(20)
        assert post(server, "/v1/chat/completions", messages=CHAT, n=3).status_code == 200
        wait_until(lambda: not engine.scheduler.busy)
        assert server.service.runner._requests == set()


def chain(links: int) -> dict:
    """A schema whose references form a chain."""
    names = {f"d{i}": {"type": "array", "items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(links)}
    return {"$ref": "#/$defs/d0", "$defs": {**names, f"d{links}": {"type": "string"}}}


BAD_SCHEMAS = [
    chain(3000),
    {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(3000)}},
    {"type": "object", "properties": {"a": {"enum": []}}, "required": ["a"]},
]


@pytest.mark.parametrize("schema", BAD_SCHEMAS, ids=["a chain of references", "many properties", "an empty choice"])
def test_too_large_schemas_are_refused(server: SimpleNamespace, schema: dict) -> None:
    format_ = {"type": "json_schema", "json_schema": {"schema": schema}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    one = post(server, "/v1/chat/completions", messages=CHAT, response_format=format_)
    other = post(server, "/v1/chat/completions", messages=CHAT, tools=[tool], tool_choice="required")
    thinking = post(server, "/v1/chat/completions", messages=CHAT, response_format=format_, reasoning_effort="low")
    assert [answer.status_code for answer in (one, other, thinking)] == [400, 400, 400]


@pytest.mark.parametrize(
    "word", [{"required": 5}, {"anyOf": 5}, {"anyOf": None}, {"enum": 5}, {"type": []}, {"$ref": 5}]
)
def test_odd_words_in_parameters_are_refused(server: SimpleNamespace, word: dict) -> None:
    parameters = {"type": "object", "properties": {"a": {"type": "integer"}}, **word}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    assert post(server, "/v1/chat/completions", messages=CHAT, tools=[tool], tool_choice="required").status_code == 400


def test_long_invalid_lists_fail_fast(server: SimpleNamespace) -> None:
    for body in ({"messages": [1] * 200_000}, {"messages": CHAT, "stop": [1] * 200_000}):
        answer = post(server, "/v1/chat/completions", **body)
        assert (answer.status_code, len(answer.text) < 1000) == (400, True)
    assert post(server, "/v1/completions", prompt=[-1] * 200_000).status_code == 400
    assert post(server, "/detokenize", tokens=["x"] * 200_000).status_code == 400


def test_names_of_the_template_cannot_be_taken(server: SimpleNamespace) -> None:
    for name in ("self", "messages", "tools", "documents", "bos_token", "add_generation_prompt"):
        answer = post(server, "/v1/chat/completions", messages=CHAT, chat_template_kwargs={name: 1})
        assert (answer.status_code, answer.json()["choices"][0]["message"]["content"]) == (200, "Hello there.")


def test_a_call_that_was_cut_is_not_called() -> None:
    script = '<|tool_call>call:write{path:<|"|>a.py<|"|>,text:<|"|>one two three four<|"|>}<tool_call|>'
    tool = {"type": "function", "function": {"name": "write", "parameters": {"type": "object"}}}
    with serving(scripted_engine(script)) as server:
        for most in (2, 8, 30, 38):
            answer = post(server, "/v1/chat/completions", messages=CHAT, tools=[tool], max_tokens=most).json()
            choice = answer["choices"][0]
            assert choice["finish_reason"] == "length"
            assert not choice["message"]["content"]
            for call in choice["message"].get("tool_calls", ()):
                with pytest.raises(json.JSONDecodeError):
                    json.loads(call["function"]["arguments"])
            responses = post(
                server,
                "/v1/responses",
                input="Hi",
                tools=[{"type": "function", **tool["function"]}],
                max_output_tokens=most,
            )
            assert responses.json()["status"] == "incomplete"


def test_logprobs_are_those_of_the_content_alone() -> None:
    script = "<|channel>thought\nHm\n<channel|>I see. <|tool_call>call:f{a:3}<tool_call|>"
    with serving(scripted_engine(script)) as server:
        answer = post(server, "/v1/chat/completions", messages=CHAT, logprobs=True).json()
        tokens = answer["choices"][0]["logprobs"]["content"]
        assert b"".join(bytes(token["bytes"]) for token in tokens).decode() == "I see. "
        assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] >= 10
        items = post(server, "/v1/responses", input="Hi", top_logprobs=0).json()["output"]
        text = next(item for item in items if item["type"] == "message")["content"][0]
        assert "".join(token["token"] for token in text["logprobs"]) == text["text"] == "I see. "


def test_a_reader_that_stands_still_is_ended_in_time() -> None:
    engine = scripted_engine(LONG, slots=1)
    engine.backend.seconds = 0.02
    with serving(engine, max_seconds=0.5) as server:
        body = json.dumps({"messages": CHAT, "stream": True}).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1]))) as connection:
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            wait_until(lambda: engine.scheduler.running)
            wait_until(lambda: not engine.scheduler.running, 5.0)


def test_regex_after_reasoning(server: SimpleNamespace) -> None:
    for pattern in ("a/b", r"a\/b", "a\nb"):
        format_ = {"type": "regex", "regex": pattern}
        for effort in ("none", "low"):
            answer = post(
                server, "/v1/chat/completions", messages=CHAT, response_format=format_, reasoning_effort=effort
            )
            assert answer.status_code == 200, answer.text


def test_a_second_signal_does_not_wait() -> None:
    command = [sys.executable, "-m", "paceline", "serve", "--port", "0", "--threads", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        url = next(found[1] for line in process.stderr if (found := re.search(r"listening at (http://[^/]+)/", line)))
        said: list[str] = []
        reader = threading.Thread(target=lambda: said.extend(process.stderr), daemon=True)
        reader.start()
        body = {"prompt": "x = [", "max_tokens": 3000, "n": 8, "stream": True, "logit_bias": {"1": -100, "5": -100}}
        with httpx.stream("POST", f"{url}/v1/completions", json=body) as stream:
            lines = stream.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1.0)
            process.send_signal(signal.SIGTERM)
            process.wait(10)
        reader.join(10)
        assert "Shutting down" in "".join(said)
        assert not [line for line in said if "Traceback" in line or "ERROR" in line or "leak" in line]
    finally:
        process.kill()
