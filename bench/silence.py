"""How long a stream is silent beside hostile requests.

    python bench/silence.py

Starts `paceline serve` with the bundled pair on a free port of the loopback interface. One client streams without a
pause while requests of each kind are sent by another: large bodies, deep and wide JSON, schemas, expressions, odd HTTP.
Reports for each kind the answer's status and seconds, the longest time between two chunks of the stream, and the memory
the server holds afterwards; then the same without other requests. Prints one JSON line on stdout.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import platform
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
from serving import resident, start

MB = 1 << 20
JSON = {"content-type": "application/json"}
CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
HELLO = [{"role": "user", "content": "x"}]
Send = Callable[[str], object]  # sends to the server at a URL; returns what is shown as its answer


class Stream:
    """A client that streams all the time and notes when chunks arrive."""

    def __init__(self, url: str) -> None:
        self._url, self.times, self._ended = url, [], False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        body = {"prompt": "value = [", "max_tokens": 3500, "stream": True, "logit_bias": {"1": -100, "5": -100}}
        with httpx.Client(base_url=self._url, timeout=300) as client:
            for seed in itertools.count():
                with client.stream("POST", COMPLETIONS, json={**body, "seed": seed}) as answer:
                    for line in answer.iter_lines():
                        if self._ended:
                            return
                        if line.startswith("data: {"):
                            self.times.append(time.perf_counter())

    def longest(self, begin: float, end: float) -> float:
        """Seconds between two chunks at most, from the last chunk before `begin` to the first after `end`."""
        while self.times[-1] < end:
            time.sleep(0.005)
        first = next((i for i in range(len(self.times) - 1, 0, -1) if self.times[i] <= begin), 0)
        last = next(i for i in range(first, len(self.times)) if self.times[i] >= end)
        return max(b - a for a, b in itertools.pairwise(self.times[first : last + 1]))

    def end(self) -> None:
        """Let the thread end."""
        self._ended = True
        self._thread.join()


def post(path: str, body: object, headers: dict[str, str] = JSON, seconds: float = 60.0) -> Send:
    """A request with a JSON body, or with bytes."""
    content = body if isinstance(body, bytes) else json.dumps(body, ensure_ascii=False).encode()

    def send(url: str) -> object:
        try:
            return httpx.post(url + path, content=content, headers=headers, timeout=seconds).status_code
        except httpx.TransportError as error:
            return type(error).__name__

    return send


def raw(*pieces: bytes, pause: float = 0.0, read: bool = True, seconds: float = 20.0) -> Send:
    """Bytes on a connection."""

    def send(url: str) -> object:
        try:
            with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), timeout=seconds) as connection:
                for piece in pieces:
                    connection.sendall(piece)
                    time.sleep(pause)
                return connection.recv(64)[9:12].decode() if read else "left"
        except OSError as error:
            return type(error).__name__

    return send


def head(path: str, *lines: str) -> bytes:
    """A POST request's head."""
    return "\r\n".join(
        [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *lines, "", ""]
    ).encode()


def chat(**fields: object) -> Send:
    """A chat request."""
    return post(CHAT, {"messages": HELLO, "max_tokens": 4, **fields})


def schema(value: object, **fields: object) -> Send:
    """A chat request with a schema for the answer."""
    return chat(response_format={"type": "json_schema", "json_schema": {"schema": value}}, **fields)


def regex(pattern: str, **fields: object) -> Send:
    """A chat request with an expression for the answer."""
    return chat(response_format={"type": "regex", "regex": pattern}, **fields)


def nested(depth: int, leaf: object = 1) -> object:
    """Objects in objects."""
    for _ in range(depth):
        leaf = {"type": "array", "items": leaf}
    return leaf


TEXTS = {
    "a": "a" * 4 * MB,
    "spaces": " " * 4 * MB,
    "words": "value_of = self.name(path) " * (4 * MB // 27),
    "quotes": '"' * (2 * MB - 500),
    "backslashes": "\\" * (2 * MB - 500),
    "emoji": "\U0001f600" * (MB - 500),
    "combining": "e" + "\u0301" * (2 * MB - 500),
    "digits": "7" * 4 * MB,
    "newlines": "\n" * (2 * MB - 500),
}


def text_kinds() -> Iterator[tuple[str, Send]]:
    """Long texts: mostly the work of tokenizer and template."""
    size = 4 * MB - 500
    for name, text in TEXTS.items():
        cut = text[:size]
        yield f"chat, 4 MB of {name}", post(CHAT, {"messages": [{"role": "user", "content": cut}]})
    for name in ("a", "spaces", "words"):
        yield f"completions, 4 MB of {name}", post(COMPLETIONS, {"prompt": TEXTS[name][:size]})
        yield f"responses, 4 MB of {name}", post(RESPONSES, {"input": TEXTS[name][:size]})
        yield f"tokenize, 4 MB of {name}", post("/tokenize", {"prompt": TEXTS[name][:size]})
    yield "chat, 10k messages of 300 B", post(CHAT, {"messages": [{"role": "user", "content": "x" * 300}] * 10_000})
    yield "tokenize, 10k messages", post("/tokenize", {"messages": HELLO * 10_000})
    yield "responses, 10k items", post(RESPONSES, {"input": HELLO * 10_000})
    yield "responses, 4 MB of instructions", post(RESPONSES, {"input": "x", "instructions": "a" * size})
    yield "16 long prompts", post(COMPLETIONS, {"prompt": ["word " * 45_000] * 16})


def value_kinds() -> Iterator[tuple[str, Send]]:
    """Bodies of many or odd values."""
    yield "completions, 1.9M ids", post(COMPLETIONS, b'{"prompt":[' + b"1," * 1_900_000 + b"1]}")
    yield "completions, 1M ids", post(COMPLETIONS, b'{"prompt":[' + b"1," * 1_000_000 + b"1]}")
    yield "completions, 1M ids, the last wrong", post(COMPLETIONS, b'{"prompt":[' + b"1," * 1_000_000 + b"-1]}")
    yield "detokenize, 1M ids", post("/detokenize", b'{"tokens":[' + b"1," * 1_000_000 + b"1]}")
    yield "detokenize, ids beyond the vocabulary", post("/detokenize", {"tokens": [1] * 4000 + [10**8]})
    fields = {f"k{i}": i for i in range(30_000)}
    yield "30k extra fields", chat(**fields)
    yield "200k extra fields", chat(**{f"k{i}": 1 for i in range(200_000)})
    yield "30k extra fields in a message", chat(messages=[{**HELLO[0], **fields}])
    yield "30k template variables", chat(chat_template_kwargs=fields)
    yield "200k template variables", chat(chat_template_kwargs={f"k{i}": 1 for i in range(200_000)})
    yield "a 3 MB template variable", chat(chat_template_kwargs={"enable_thinking": "x" * 3 * MB})
    yield "30k biases", chat(logit_bias={str(i): 1 for i in range(30_000)})
    yield "30k wrong biases", chat(logit_bias={f"k{i}": 1 for i in range(30_000)})
    yield "16 stops of 200 KB", chat(stop=["x" * 200_000 + str(i) for i in range(16)])
    yield "200k stops", chat(stop=["x"] * 200_000)
    yield "200k messages", chat(messages=[1] * 200_000)
    yield "10k wrong items", post(RESPONSES, {"input": [{"type": "item_reference", "id": "x"}] * 10_000})
    yield "10k parts", chat(messages=[{"role": "user", "content": [{"type": "text", "text": "x"}] * 10_000}])
    yield "a name of 3 MB", chat(**{"x" * 3 * MB: 1})
    yield "a model of 3 MB", chat(model="m" * 3 * MB)
    yield "a role of 3 MB", chat(messages=[{"role": "r" * 3 * MB, "content": "x"}])
    yield (
        "1k calls with broken arguments",
        chat(
            messages=[
                {
                    "role": "assistant",
                    "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "[" * 3000}}] * 1000,
                }
            ]
        ),
    )


def json_kinds() -> Iterator[tuple[str, Send]]:
    """What is no JSON, or hardly."""
    begin = b'{"messages":[{"role":"user","content":"x"}],"max_tokens":1,"z":'
    yield "1.9M brackets", post(CHAT, b"[" * 1_900_000)
    yield "deep lists", post(CHAT, begin + b"[" * 100_000 + b"]" * 100_000 + b"}")
    yield "deep objects", post(CHAT, begin + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"}")
    yield "1M empty lists", post(CHAT, begin + b"[" + b"[]," * 1_000_000 + b"1]}")
    yield "30k lists of lists", post(CHAT, begin + b"[" + b"[[]]," * 30_000 + b"1]}")
    yield "1M empty strings", post(CHAT, begin + b"[" + b'"",' * 1_000_000 + b"1]}")
    yield "escaped quotes", post(CHAT, begin + b'"' + b'\\"' * 1_900_000 + b'"}')
    yield "an open string of escaped quotes", post(CHAT, begin + b'"' + b'\\"' * 1_900_000)
    yield "escaped characters", post(CHAT, begin + b'"' + b"\\u00e9" * 600_000 + b'"}')
    yield "lone surrogates", post(CHAT, b'{"messages":[{"role":"user","content":"' + b"\\ud800" * 600_000 + b'"}]}')
    yield "an integer of 3 MB", post(CHAT, begin + b"9" * 3 * MB + b"}")
    yield "a seed of 5000 digits", post(CHAT, begin[:-4] + b'"seed":' + b"9" * 5000 + b"}")
    yield "a fraction of 3 MB", post(CHAT, begin + b"0." + b"9" * 3 * MB + b"}")
    yield "1e999 and NaN", post(CHAT, begin + b'1e999,"temperature":1e999,"top_p":NaN}')
    yield "4 MB of spaces", post(CHAT, b" " * (4 * MB - 2) + b"{}")
    yield "4 MB of zero bytes", post(CHAT, b"\0" * 4 * MB)
    yield "UTF-16", post(CHAT, ("{" + '"a":1,' * 60_000 + '"b":1}').encode("utf-16"))
    yield "no UTF-8", post(CHAT, begin + b'"' + b"\xff" * 3 * MB + b'"}')
    yield "gzip", post(CHAT, gzip.compress(b"a" * 4 * MB), {**JSON, "content-encoding": "gzip"})
    yield "another content type", post(CHAT, b"a" * 4 * MB, {"content-type": "text/plain"})
    yield "8 MB", post(CHAT, b"a" * 8 * MB)


def grammar_kinds() -> Iterator[tuple[str, Send]]:
    """Schemas, expressions and tools."""
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    wild = {"type": "string", "pattern": "((((a{1,99}){1,99}){1,99}){1,99}){1,99}"}
    yield "a const of 3 MB", schema({"const": "x" * 3 * MB})
    yield "an enum of 30k", schema({"enum": [f"v{i}" for i in range(30_000)]})
    yield "an enum of 500 long texts", schema({"enum": [str(i) + "x" * 6000 for i in range(500)]})
    yield "a pattern of 3 MB", schema({"type": "string", "pattern": "a|" * (3 * MB // 2)})
    yield "60 levels", schema(nested(60, {"type": "object"}))
    yield "5000 levels", post(CHAT, b'{"response_format":' + b'{"items":' * 5000 + b"1" + b"}" * 5000 + b"}")
    yield "512 properties", schema({"type": "object", "properties": {f"p{i}": wild for i in range(500)}})
    yield "references in a ring", schema({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}})
    links = {f"d{i}": {"type": "array", "items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(200)}
    yield "200 references", schema({"$ref": "#/$defs/d0", "$defs": {**links, "d200": {"type": "string"}}})
    yield "a wild pattern", schema(wild)
    yield "a wild expression", regex("((((a{1,99}){1,99}){1,99}){1,99}){1,99}")
    yield "an expression of 3 MB", regex("a|" * (3 * MB // 2))
    yield "an expression of 30 KB", regex("(a|b)" * 6000)
    yield "deep brackets", regex("(" * 20_000 + "a" + ")" * 20_000)
    yield "repeats", regex("(a*)*" * 500 + "[^x]{1,5000}")
    yield "16 schemas", schema({"type": "object", "properties": {f"p{i}": wild for i in range(40)}}, n=16)
    yield "16 expressions", regex("([a-z]+ = [a-z]+\n){200}", n=16)
    yield "1000 tools", chat(tools=[{"type": "function", "function": {"name": f"f{i}"}} for i in range(1000)])
    yield (
        "a tool of 30k values",
        chat(tools=[{**tool, "function": {"name": "f", "parameters": {f"k{i}": i for i in range(30_000)}}}]),
    )
    yield (
        "responses, 1000 tools",
        post(
            RESPONSES,
            {
                "input": "x",
                "tools": [{"type": "function", "name": f"f{i}", "description": "d" * 3000} for i in range(1000)],
            },
        ),
    )


def http_kinds() -> Iterator[tuple[str, Send]]:
    """Odd HTTP."""
    small = json.dumps({"messages": HELLO, "max_tokens": 2}).encode()
    length = f"Content-Length: {len(small)}"
    yield "100k headers", raw(head(CHAT, *(f"x-{i}: y" for i in range(100_000))))
    yield "a header of 1 MB", raw(head(CHAT, "x: " + "y" * MB))
    yield "a path of 60 KB", raw(b"GET /" + b"a" * 60_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n")
    chunk = b"1\r\nx\r\n"
    yield "1 MB in chunks of one byte", raw(head(CHAT, "Transfer-Encoding: chunked") + chunk * MB + b"0\r\n\r\n")
    yield "wrong chunks", raw(head(CHAT, "Transfer-Encoding: chunked") + b"zz\r\nx")
    yield "two lengths", raw(head(CHAT, length, "Content-Length: 7") + small)
    yield "a negative length", raw(head(CHAT, "Content-Length: -1") + small)
    yield "a length of 5000 digits", raw(head(CHAT, "Content-Length: " + "9" * 5000))
    yield "trickled", raw(head(CHAT, length), *(small[i : i + 1] for i in range(len(small))), pause=0.01)
    yield "half closed", raw(head(CHAT, length) + small[:10], read=False)
    yield "100 requests at once", raw((head(CHAT, length) + small) * 100)
    yield "2000 requests for /health at once", raw(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 2000)
    yield "no HTTP", raw(b"\0\xff" * 20_000)
    yield "an upgrade", raw(b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n")

    def connections(url: str) -> object:
        address = ("127.0.0.1", int(url.rsplit(":", 1)[1]))
        opened = []
        try:
            for _ in range(1500):
                opened.append(socket.create_connection(address, timeout=5))
            return len(opened)
        except OSError as error:
            return f"{len(opened)}, {type(error).__name__}"
        finally:
            for one in opened:
                one.close()

    yield "1500 connections", connections


GROUPS = {
    "texts": text_kinds,
    "values": value_kinds,
    "JSON": json_kinds,
    "grammars": grammar_kinds,
    "HTTP": http_kinds,
}


def processor() -> str:
    """The processor's name, as Linux gives it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--groups", nargs="*", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--only", help="kinds whose name has this text", default="")
    arguments = parser.parse_args()
    process, url = start(4)
    report: dict[str, dict[str, list[object]]] = {}
    try:
        stream = Stream(url)
        while len(stream.times) < 20:
            time.sleep(0.05)
        memory = [resident(process.pid)]
        begin = time.perf_counter()
        time.sleep(10)
        calm = stream.longest(begin, time.perf_counter())
        for group in arguments.groups:
            report[group] = {}
            for name, send in GROUPS[group]():
                if arguments.only not in name:
                    continue
                begin = time.perf_counter()
                status = send(url)
                end = time.perf_counter()
                time.sleep(0.3)  # what goes on after the answer
                silence = stream.longest(begin, time.perf_counter())
                report[group][name] = [status, round(end - begin, 2), round(silence, 3)]
                memory.append(resident(process.pid))
                print(
                    f"{group:9}{name:42}{status!s:>16}{end - begin:8.2f} s{silence:8.3f} s{memory[-1]:7.0f} MB",
                    file=sys.stderr,
                )
        stream.end()
        longest = {group: max((kind[2] for kind in kinds.values()), default=0) for group, kinds in report.items()}
        print(
            json.dumps(
                {
                    "machine": f"{processor()}, {platform.system()}, Python {platform.python_version()}",
                    "kinds": sum(map(len, report.values())),
                    "longest_silence_s": longest,
                    "longest_silence_alone_s": round(calm, 3),
                    "memory_mb": [round(memory[0]), round(max(memory)), round(memory[-1])],
                    "each": report,
                }
            )
        )
    finally:
        process.kill()


if __name__ == "__main__":
    main()
