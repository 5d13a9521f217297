"""A real server under load: the longest silence of a stream while a long prompt is read, and memory over many requests.

    python bench/serving.py --requests 20000

Starts `paceline serve` on a free port of the loopback interface. First seven streams are written while an eighth client
sends a prompt of 4,000 tokens, several times: the longest time between two chunks of a stream is reported, with the
prompt and without. Then requests of all kinds follow each other, eight at a time (chats with turns, schemas, clients
that leave, errors), and the server's memory is read as they go. Prints one JSON line on stdout.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx

WORDS = [
    "def",
    "class",
    "return",
    "self",
    "import",
    "value",
    "name",
    "path",
    "None",
    "True",
    "for",
    "in",
    "if",
    "else",
    "lines",
    "open",
    "read",
]
SCHEMA = {"enum": ["yes", "no", 1, None]}


def start(slots: int) -> tuple[subprocess.Popen[str], str]:
    """A server and its address."""
    command = [sys.executable, "-m", "paceline", "serve", "--port", "0", "--slots", str(slots), "--queue", "1000"]
    process = subprocess.Popen([*command, "--cache-memory", "64M"], stderr=subprocess.PIPE, text=True)
    assert process.stderr
    url = next(found[1] for line in process.stderr if (found := re.search(r"listening at (http://[^/]+)/", line)))
    threading.Thread(target=process.stderr.read, daemon=True).start()
    return process, url


async def longest_silence(client: httpx.AsyncClient, number: int, tokens: int) -> float:
    """Seconds between two chunks of a stream at most."""
    body = {
        "prompt": f"value_{number} = [",
        "max_tokens": tokens,
        "stream": True,
        "seed": number,
        "logit_bias": {"1": -100, "5": -100},
    }
    last, longest = 0.0, 0.0
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("data: "):
                now = time.perf_counter()
                longest = max(longest, now - last) if last else 0.0
                last = now
    return longest


async def silences(url: str, prompt_tokens: int) -> tuple[float, float]:
    """The longest silence of seven streams, and the seconds until the long prompt's first token."""
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        streams = [asyncio.ensure_future(longest_silence(client, n, 1500)) for n in range(7)]
        await asyncio.sleep(0.5)
        waited = 0.0
        if prompt_tokens:
            tokens = [random.randrange(300, 4000) for _ in range(prompt_tokens)]
            answer = await client.post("/v1/completions", json={"prompt": tokens, "max_tokens": 1})
            waited = answer.json()["choices"][0]["paceline"]["prompt_seconds"]
        return max(await asyncio.gather(*streams)), waited


async def ask(client: httpx.AsyncClient, dice: random.Random) -> None:
    """One request of some kind."""
    text = " ".join(dice.choices(WORDS, k=dice.randrange(1, 60)))
    body: dict[str, object] = {"messages": [{"role": "user", "content": text}], "max_tokens": dice.randrange(1, 12)}
    kind = dice.randrange(10)
    if kind == 0:
        body["response_format"] = {"type": "json_schema", "json_schema": {"schema": SCHEMA}}
    elif kind == 1:
        body["n"] = 3
    elif kind == 2:
        body["temperature"] = "hot"  # refused
    elif kind == 3:
        body |= {
            "logprobs": True,
            "top_logprobs": 3,
            "messages": [{"role": "system", "content": "self " * 80}, *body["messages"]],
        }
    if kind < 7:
        await client.post("/v1/chat/completions", json=body)
        return
    async with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True, "max_tokens": 40}) as answer:
        async for _ in answer.aiter_lines():
            if kind == 9:
                return  # the client leaves


async def soak(url: str, pid: int, requests: int) -> list[float]:
    """The server's resident memory in MB, twenty times over the requests."""
    dice, seen, left = random.Random(0), [resident(pid)], requests
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=httpx.Limits(max_connections=8)) as client:
        while left > 0:
            batch = max(1, requests // 20)
            queue = iter(range(min(batch, left)))

            async def work() -> None:
                for _ in queue:  # noqa: B023
                    await ask(client, dice)

            await asyncio.gather(*(work() for _ in range(8)))
            left -= batch
            seen.append(resident(pid))
            print(f"{requests - max(0, left)} requests: {seen[-1]:.1f} MB", file=sys.stderr)
    return seen


def resident(pid: int) -> float:
    """Megabytes a process holds in memory."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))) / 1024


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    process, url = start(8)
    try:
        calm = [asyncio.run(silences(url, 0))[0] for _ in range(arguments.repeats)]
        busy = [asyncio.run(silences(url, 4000)) for _ in range(arguments.repeats)]
        report: dict[str, object] = {
            "longest_silence_s": round(max(silence for silence, _ in busy), 3),
            "longest_silence_without_a_prompt_s": round(max(calm), 3),
            "prompt_of_4000_s": round(max(waited for _, waited in busy), 2),
        }
        print(report, file=sys.stderr)
        started = time.perf_counter()
        memory = asyncio.run(soak(url, process.pid, arguments.requests))
        report |= {
            "requests": arguments.requests,
            "requests_per_s": round(arguments.requests / (time.perf_counter() - started), 1),
        }
        report["memory_mb"] = [round(mb, 1) for mb in memory]
        figures = httpx.get(f"{url}/metrics").text
        report["left_running"] = re.findall(r"^paceline:num_requests_running.* (\S+)$", figures, re.MULTILINE)
        process.terminate()
        report["exit_code"] = process.wait(60)
        print(json.dumps(report))
    finally:
        process.kill()


if __name__ == "__main__":
    main()
