"""Runs one case in a child process of its own, and says what became of it."""

from __future__ import annotations

import json
import os
import resource
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import paceline
from paceline import _cpu
from paceline.backends.cpu import pack_cache, sources
from paceline.errors import PacelineError
from tests.robustness import bases
from tests.robustness.mutators import MUTATORS, Case

SECONDS = 5.0  # more is a hang
MEMORY = 1 << 30  # that a case may take, beside twice its files
ADDRESS_SPACE = 6 << 30
TOKENS = 8
SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")


@dataclass(frozen=True)
class Outcome:
    kind: str
    seed: int
    result: str  # "right", "refused", or what is wrong: "exception", "text", "message", "signal", "hang", "memory"
    message: str
    seconds: float

    @property
    def good(self) -> bool:
        return self.result in ("right", "refused")


def prepare(root: Path) -> list[int]:
    """Write the folders that cases start from, and return the text of the unchanged one."""
    bases.make(root)
    pack_cache.LEAST_BYTES = sources.LEAST_BYTES = 0  # keep even such small packs
    os.environ["PACELINE_CACHE"] = str(root / "cache")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    child = os.fork()  # threads that this starts must not be in the process that forks the cases
    if child == 0:
        engine = paceline.load(str(root / "edge"), quant="q8", threads=1, context=256)
        (root / "text.json").write_text(json.dumps(_plain(engine)))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    return json.loads((root / "text.json").read_text())


def run(kind: str, seed: int, root: Path, known: list[int]) -> Outcome:
    """Make a case and load it in a child process."""
    dice = Random(f"{kind} {seed}")
    with tempfile.TemporaryDirectory(dir=root, prefix="case") as folder:
        to = Path(folder)
        case = MUTATORS[kind][1](dice, root, to)
        size = sum(path.stat().st_size for path in to.rglob("*") if path.is_file())
        said, errors = to / "said.json", to / "stderr"
        started = time.monotonic()
        child = os.fork()
        if child == 0:
            _child(case, seed, said, errors, known)
        limit = SECONDS * (10 if SANITIZED else 1)
        status, usage = _wait(child, started + limit)
        seconds = time.monotonic() - started
        if status is None:
            return Outcome(kind, seed, "hang", _said(said), seconds)
        if not os.WIFEXITED(status) or os.WEXITSTATUS(status):
            tail = errors.read_text(errors="replace")[-3000:] if errors.exists() else ""
            return Outcome(kind, seed, "signal", f"status {status}: {tail}", seconds)
        answer = json.loads(said.read_text())
        if not SANITIZED and usage.ru_maxrss * 1024 - answer["before"] > 2 * size + MEMORY:
            return Outcome(kind, seed, "memory", f"{usage.ru_maxrss >> 10} MB", seconds)
        return Outcome(kind, seed, answer["result"], answer["message"], seconds)


def _wait(child: int, until: float) -> tuple[int | None, Any]:
    while True:
        pid, status, usage = os.wait4(child, os.WNOHANG)
        if pid:
            return status, usage
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            _, _, usage = os.wait4(child, 0)
            return None, usage
        time.sleep(0.002)


def _said(path: Path) -> str:
    return json.loads(path.read_text())["message"] if path.exists() else ""


def _child(case: Case, seed: int, said: Path, errors: Path, known: list[int]) -> None:
    handle = os.open(errors, os.O_WRONLY | os.O_CREAT)
    os.dup2(handle, 2)
    if not SANITIZED:
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    os.environ["PACELINE_CACHE"] = str(case.cache or said.parent / "cache")
    os.environ["PACELINE_ISA"] = os.environ.get("PACELINE_ISA") or _cpu.usable_isas()[seed % len(_cpu.usable_isas())]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result, message = _attempt(case, seed, known)
    said.write_text(json.dumps({"result": result, "message": message[:3000], "before": before}))
    os._exit(0)


def _attempt(case: Case, seed: int, known: list[int]) -> tuple[str, str]:
    converted = (case.model / "model.paceline").exists()
    quant = "auto" if converted else ("auto", "f32", "bf16", "q8", "q4")[seed % 5]
    try:
        arguments = {"quant": quant, "threads": 1 + seed % 2, "context": 256}
        engine = paceline.load(str(case.model), **{**arguments, **case.arguments})
        plain = _plain(engine)
        if case.text_is_known and plain != known:
            return "text", f"{plain} instead of {known}"
        drafted = engine.generate("def f(x):", raw=True, sampling=GREEDY, max_tokens=TOKENS, draft_tokens=3)
        if list(drafted.tokens) != plain:
            return "text", f"{plain} without drafts, {drafted.tokens} with them"
        _chat(engine, seed)
        if seed % 3 == 0:
            engine.generate("x", raw=True, regex="[a-z]{1,4}", sampling=GREEDY, max_tokens=TOKENS)
        return "right", ""
    except PacelineError as error:
        line = str(error)
        good = 0 < len(line) <= 500 and "\n" not in line
        return ("refused" if good and not case.must_load else "message"), line
    except BaseException as error:
        import traceback

        return "exception", "".join(traceback.format_exception(error))[-2000:]


GREEDY = paceline.SamplingParams()


def _plain(engine: paceline.Engine) -> list[int]:
    return list(engine.generate("def f(x):", raw=True, sampling=GREEDY, max_tokens=TOKENS, draft_tokens=0).tokens)


def _chat(engine: paceline.Engine, seed: int) -> None:
    messages = [{"role": "user", "content": "Hi, what is 1 + 1?"}]
    if seed % 2 and engine.chat_template:
        prompt = engine.encode_text(engine.chat_template.render(messages))
    else:
        prompt = engine.encode(messages)
    result = engine.generate(prompt, max_tokens=TOKENS, logprobs=2)
    for token in result.tokens:
        engine.tokenizer.token_bytes(token)
