"""What a server takes from a client at most: parts of a body, time, connections; and what it says and keeps of it."""

from __future__ import annotations

import hashlib
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from types import SimpleNamespace

import h11
import httpx
import pytest

from paceline.errors import SettingsError
from paceline.server import access, bodies, listening, memory
from paceline.server.app import Service
from paceline.server.bodies import MOST, check_structure
from paceline.server.schemas import MAX_VARIABLE_CHARACTERS, MAX_VARIABLE_DEPTH, MAX_VARIABLES
from tests.fixtures.serving import scripted_engine, serving, wait_until

CHAT = [{"role": "user", "content": "Hi"}]
LONG = "abc " * 400
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def server() -> Iterator[SimpleNamespace]:
    with serving(scripted_engine("Hello there.", slots=2)) as server:
        yield server


@pytest.fixture(scope="module")
def guarded() -> Iterator[SimpleNamespace]:
    with serving(scripted_engine("Hi"), hosts=("127.0.0.1", "localhost", "[::1]")) as server:
        yield server


def post(server: SimpleNamespace, path: str, **body: object) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body, timeout=20)


def connect(server: SimpleNamespace) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])), timeout=20)


def head(length: int) -> bytes:
    lines = ["POST /v1/chat/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    return "\r\n".join([*lines, f"Content-Length: {length}", "", ""]).encode()


def status_of(connection: socket.socket) -> int:
    """The status of the answer on a connection; 0 if it is closed without one."""
    try:
        answer = connection.recv(1000)
    except ConnectionError:
        return 0
    return int(answer.split()[1]) if answer else 0


PARTS = {
    "strings": lambda count: [""] * count,
    "named values": lambda count: {str(i): i for i in range(count)},
    "objects": lambda count: [{}] * count,
    "lists": lambda count: [[]] * count,
    "values": lambda count: [1] * count,
}


@pytest.mark.parametrize("part", PARTS)
def test_bodies_of_too_many_parts_are_refused(server: SimpleNamespace, part: str) -> None:
    assert set(PARTS) == set(MOST)
    for count, status in ((MOST[part] - 100, 200), (MOST[part] + 100, 400)):
        answer = post(server, "/v1/chat/completions", messages=CHAT, extra=PARTS[part](count))
        assert answer.status_code == status, answer.text
    assert part in answer.json()["error"]["message"]


def test_texts_are_not_counted_as_parts() -> None:
    most = max(MOST.values())
    for text in ('"' * most, "\\" * most, "{" * most, ":[," * most, '\\"' * most, '\\\\"{' * most, "a\nü" * most):
        check_structure(json.dumps({"a": text}).encode())
        with pytest.raises(SettingsError, match="lists"):
            check_structure(json.dumps([text, [[]] * (MOST["lists"] + 1), "\\"]).encode())


def test_a_prompt_of_token_ids_may_fill_the_context(server: SimpleNamespace) -> None:
    context = server.service.engine.backend.info.context
    assert post(server, "/v1/completions", prompt=[5] * (context - 2), max_tokens=1).status_code == 200
    assert MOST["values"] > 4 * 131072  # tokens, the longest context of a Gemma 4 model


@pytest.mark.parametrize("name", ["max_tokens", "n", "seed", "top_k", "draft_tokens", "top_logprobs"])
@pytest.mark.parametrize("value", [True, 1.0, "1"])
def test_whole_numbers_are_whole_numbers(server: SimpleNamespace, name: str, value: object) -> None:
    extra = {"logprobs": True} if name == "top_logprobs" else {}
    answer = post(server, "/v1/chat/completions", messages=CHAT, **{name: value}, **extra)
    assert (answer.status_code, name in answer.json()["error"]["message"]) == (400, True)
    assert post(server, "/v1/chat/completions", messages=CHAT, **{name: 1}, **extra).status_code == 200


def test_other_types_are_exact_too(server: SimpleNamespace) -> None:
    for name, wrong, right in (("temperature", "0.5", 1), ("temperature", True, 0.5), ("stream", 0, False)):
        assert post(server, "/v1/chat/completions", messages=CHAT, **{name: wrong}).status_code == 400
        assert post(server, "/v1/chat/completions", messages=CHAT, **{name: right}).status_code == 200
    assert post(server, "/detokenize", tokens=[True]).status_code == 400
    assert post(server, "/v1/completions", prompt=[1.0]).status_code == 400


def deep(levels: int) -> object:
    return {"a": deep(levels - 1)} if levels else 1


def test_variables_of_the_template_are_few(server: SimpleNamespace) -> None:
    for least, most in (
        ({str(i): i for i in range(MAX_VARIABLES)}, {"a": [1] * (MAX_VARIABLES + 1)}),
        (deep(MAX_VARIABLE_DEPTH), deep(MAX_VARIABLE_DEPTH + 1)),
        ({"a": "x" * (MAX_VARIABLE_CHARACTERS - 1)}, {"a": "x" * MAX_VARIABLE_CHARACTERS}),
    ):
        for variables, status in ((least, 200), (most, 400)):
            for path in ("/v1/chat/completions", "/tokenize"):
                answer = post(server, path, messages=CHAT, chat_template_kwargs=variables)
                assert answer.status_code == status, answer.text


def test_items_of_an_input_are_told_apart_by_their_type(server: SimpleNamespace) -> None:
    call = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}
    output = {"type": "function_call_output", "call_id": "1", "output": "ok"}
    items = [{"role": "user", "content": "Hi"}, {"type": "reasoning"}, call, output]
    assert post(server, "/v1/responses", input=items).status_code == 200
    for item, message in (
        ({"type": "item_reference", "id": "x"}, "type must be message, function_call"),
        (1, "type must be message, function_call"),
        ({"type": []}, "type must be message, function_call"),
        ({"type": "function_call", "name": "f"}, "call_id"),
        ({"role": "king", "content": "Hi"}, "role"),
    ):
        answer = post(server, "/v1/responses", input=[item])
        assert (answer.status_code, message in answer.json()["error"]["message"]) == (400, True), answer.text


def test_only_json_is_read(server: SimpleNamespace) -> None:
    content = json.dumps({"messages": CHAT}).encode()
    kinds = ("application/json", "application/json; charset=utf-8", "Application/JSON", "application/problem+json")
    for kind, status in (*((kind, 200) for kind in kinds), ("text/plain", 400), ("", 400), ("application/jsonx", 400)):
        answer = httpx.post(f"{server.url}/v1/chat/completions", content=content, headers={"content-type": kind})
        assert answer.status_code == status, kind


def test_errors_quote_little(server: SimpleNamespace) -> None:
    long = "m" * 100_000
    for answer in (
        post(server, "/v1/chat/completions", messages=CHAT, model=long),
        post(server, "/v1/chat/completions", messages=CHAT, logit_bias={long: 1}),
        post(server, "/v1/chat/completions", messages=[{"role": long, "content": "x"}]),
        post(server, "/v1/chat/completions", messages=CHAT, tools=[], tool_choice={"type": long}),
        httpx.get(f"{server.url}/v1/models/{long[:30000]}"),
        httpx.get(f"{server.url}/{long[:30000]}"),
    ):
        assert answer.status_code in (400, 404)
        assert len(answer.text) < 1000
        assert "\n" not in answer.json()["error"]["message"]


def test_a_trickled_body_is_refused_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "MAX_BODY_SECONDS", 0.4)
    with serving(scripted_engine("Hi")) as server, connect(server) as connection:
        connection.sendall(head(10_000))
        connection.settimeout(0.02)
        pieces = 0
        while True:
            connection.sendall(b" ")  # never a long pause
            pieces += 1
            assert pieces < 1000
            try:
                answer = connection.recv(1000)
                break
            except TimeoutError:
                continue
        assert b" 408 " in answer.splitlines()[0]
        assert pieces > 3


def test_headers_have_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(listening.LIMITS, h11.IDLE, 0.2)
    with serving(scripted_engine("Hi")) as server:
        for sent in (b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /health HT"):
            with connect(server) as connection:
                connection.sendall(sent)
                answers = b"".join(iter(lambda c=connection: c.recv(1000), b""))  # until the server closes
                assert answers.count(b"200 OK") == sent.count(b"\r\n\r\n")
        wait_until(lambda: not server.connections)


def test_a_body_that_nobody_reads_does_not_keep_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(listening.LIMITS, h11.SEND_BODY, 0.2)
    with serving(scripted_engine("Hi")) as server, connect(server) as connection:
        connection.sendall(head(1000).replace(b"/v1/chat/completions", b"/nothing"))
        assert status_of(connection) == 404
        wait_until(lambda: not server.connections)


def test_an_answer_that_nobody_reads_does_not_keep_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "MAX_STANDSTILL", 0.2)
    with serving(scripted_engine("Hi")) as server, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", int(server.url.rsplit(":", 1)[1])))
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 500)  # the page is tens of kilobytes
        wait_until(lambda: server.connections)
        wait_until(lambda: not server.connections)


def test_connections_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the limit, an idle connection makes room; if all are busy, the new one is refused."""
    monkeypatch.setattr(listening, "MAX_CONNECTIONS", 3)
    engine = scripted_engine(LONG, slots=3)
    with serving(engine) as server:
        idle = [connect(server) for _ in range(3)]
        wait_until(lambda: len(server.connections) == 3)
        with connect(server) as fourth:
            fourth.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert status_of(fourth) == 200
            assert len(server.connections) == 3
        for connection in idle:
            connection.close()
        wait_until(lambda: not server.connections)
        engine.backend.seconds = 0.05
        body = json.dumps({"messages": CHAT, "stream": True}).encode()
        busy = [connect(server) for _ in range(3)]
        for connection in busy:
            connection.sendall(head(len(body)) + body)
        wait_until(lambda: len(engine.scheduler.running) == 3)
        with connect(server) as refused:
            assert status_of(refused) == 503
        for connection in busy:
            connection.close()
        wait_until(lambda: not engine.scheduler.running)
        assert httpx.get(f"{server.url}/health").status_code == 200


def test_a_stop_refuses_what_has_not_arrived_and_finishes_what_has() -> None:
    engine = scripted_engine(LONG, slots=1)
    engine.backend.seconds = 0.005
    with serving(engine) as server, connect(server) as trickling:
        trickling.sendall(head(1000) + b"{")
        url, lines = f"{server.url}/v1/chat/completions", []
        with httpx.stream("POST", url, json={"messages": CHAT, "stream": True}, timeout=20) as stream:
            for line in stream.iter_lines():
                if not lines:
                    server.stop()
                lines += [line] if line else []
        assert lines[-1] == "data: [DONE]"
        assert status_of(trickling) == 503
        server.thread.join(20)
        assert not server.thread.is_alive()


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_unfinished_after_the_time_of_grace_ends_with_an_error(stream: bool) -> None:
    engine = scripted_engine(LONG, slots=1)
    engine.backend.seconds = 0.05
    with serving(engine, grace=0.3) as server:
        threading.Timer(0.5, server.stop).start()
        url = f"{server.url}/v1/chat/completions"
        with httpx.stream("POST", url, json={"messages": CHAT, "stream": stream}, timeout=20) as answer:
            lines = [line for line in answer.iter_lines() if line]
        assert answer.status_code == (200 if stream else 503)
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "stopping"
        assert len(lines) > 2 or not stream
        server.thread.join(20)
        assert not server.thread.is_alive()
        assert not engine.scheduler.running


def test_sigterm_is_not_held_up_by_trickling_clients() -> None:
    command = [sys.executable, "-m", "paceline", "serve", "--port", "0", "--threads", "1", "--grace", "600"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    ended = threading.Event()
    try:
        url = next(found[1] for line in process.stderr if (found := re.search(r"listening at (http://[^/]+)/", line)))
        threading.Thread(target=process.stderr.read, daemon=True).start()
        connections = [connect(SimpleNamespace(url=url)) for _ in range(8)]

        def trickle() -> None:
            while not ended.wait(0.1):
                for connection in connections:
                    try:
                        connection.sendall(b" ")
                    except OSError:
                        continue

        for index, connection in enumerate(connections):
            connection.sendall(head(10_000)[: None if index < 5 else 40])  # some have not even sent their headers
        threading.Thread(target=trickle, daemon=True).start()
        assert httpx.get(f"{url}/health").status_code == 200
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        ended.set()
        process.kill()


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:80", 200),
        ("LOCALHOST", 200),
        ("localhost.:80", 200),  # the same name, fully qualified
        ("[::1]", 200),
        ("[::1]:65535", 200),
        ("localhost:80@evil.com", 403),
        ("127.0.0.1:1@evil", 403),
        ("[::1].evil.com", 403),
        ("[::1].:80", 403),
        ("[::1", 403),
        ("::1", 403),
        ("localhost:", 403),
        ("localhost:x", 403),
        ("localhost:123456", 403),
        ("localhost/", 403),
        ("localhost..", 403),
        ("evil@localhost", 403),
        ("localhost,evil.com", 403),
        ("localhost evil.com", 403),
        ("", 403),
    ],
)
def test_the_host_header_is_matched_exactly(guarded: SimpleNamespace, host: str, status: int) -> None:
    assert httpx.get(f"{guarded.url}/v1/models", headers={"host": host}).status_code == status


@pytest.mark.parametrize("keys", [(), ("secret-a", "secret-b")])
def test_clients_are_told_apart(monkeypatch: pytest.MonkeyPatch, keys: tuple[str, ...]) -> None:
    """By a digest of their key if there are keys, else by their address."""
    seen: list[str] = []
    with serving(scripted_engine("Hi"), keys=keys) as server:
        submit = server.service.runner.submit

        def watched(prompts: object, client: str = "") -> object:
            seen.append(client)
            return submit(prompts, client=client)

        monkeypatch.setattr(server.service.runner, "submit", watched)
        for path, field in (("chat/completions", "messages"), ("completions", "prompt"), ("responses", "input")):
            for key in keys or ("any",):
                body = {field: CHAT if field == "messages" else "Hi", "max_tokens": 1}
                headers = {"authorization": f"Bearer {key}"}
                assert httpx.post(f"{server.url}/v1/{path}", json=body, headers=headers).status_code == 200
    assert seen == [hashlib.sha256(key.encode()).hexdigest() for key in keys] * 3 if keys else ["127.0.0.1"] * 3


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
def test_a_body_is_not_kept_while_its_answer_is_written(
    monkeypatch: pytest.MonkeyPatch, path: str, stream: bool
) -> None:
    kept: list[weakref.ref] = []
    read = Service.read

    async def watched(*arguments: object) -> object:
        body = await read(*arguments)
        kept.append(weakref.ref(body))
        return body

    monkeypatch.setattr(Service, "read", watched)
    engine = scripted_engine(LONG, slots=1)
    engine.backend.seconds = 0.02
    body = {"messages": CHAT, "prompt": "Hi", "input": "Hi", "stream": stream, "max_tokens": 500}
    with serving(engine) as server:
        asking = threading.Thread(target=post, args=(server, path), kwargs=body)
        asking.start()
        wait_until(lambda: engine.scheduler.running and len(engine.scheduler.running[0].generated) > 3)
        wait_until(lambda: kept[0]() is None, 2.0)
        assert engine.scheduler.running
        engine.backend.seconds = 0.0
        asking.join(20)


def test_memory_is_given_back_after_large_requests(monkeypatch: pytest.MonkeyPatch, server: SimpleNamespace) -> None:
    times: list[str] = []
    monkeypatch.setattr(access, "give_back", lambda: times.append(threading.current_thread().name))
    assert post(server, "/v1/chat/completions", messages=CHAT).status_code == 200
    assert times == []
    assert post(server, "/v1/chat/completions", messages=CHAT, extra="x" * (access.LARGE_BODY + 1)).status_code == 200
    assert post(server, "/v1/chat/completions", messages="x" * (access.LARGE_BODY + 1)).status_code == 400
    wait_until(lambda: len(times) == 2)
    assert threading.main_thread().name not in times
    memory.give_back()  # no error where the C library has it, and none where it does not
