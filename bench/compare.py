"""paceline, transformers, llama.cpp and ik_llama.cpp on the same weights in one run, taking turns.

    python bench/compare.py --shape e2b --work FOLDER [--llama-python PYTHON] [--ik-python PYTHON]
    python bench/compare.py --gguf FILE[,FILE] [--llama-python PYTHON] [--ik-python PYTHON]

Of a shape it writes a random checkpoint once, and GGUF files of it. It measures one precision or file at a time: each
engine in its own process, one working while the others sleep, the turn passing at every repeat. Tables go to stderr,
and one JSON line to stdout. An engine whose packages are missing is left out, and named.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from random_checkpoint import SHAPES, write_checkpoint
from rich.table import Table

from paceline.backends.cpu.processors import default_threads
from paceline.bench.machine import ReadBandwidth
from paceline.bench.report import console
from paceline.checkpoint import Checkpoint
from paceline.errors import PacelineError, SettingsError

HERE = Path(__file__).resolve().parent
LLAMA, IK, IK_REPACKED = "llama.cpp", "ik_llama.cpp", "ik_llama.cpp-rtr"
# Every engine's module here, and the packages it needs.
ENGINES: dict[str, tuple[str, tuple[str, ...]]] = {
    "paceline": ("engine_paceline", ()),
    "transformers": ("engine_transformers", ("torch", "transformers")),
    LLAMA: ("engine_llama", ("llama_cpp",)),
    IK: ("engine_ik", ("ik_llama_cpp",)),
    IK_REPACKED: ("engine_ik_repacked", ("ik_llama_cpp",)),
}
OF_GGUF = tuple(name for name in ENGINES if name != "transformers")  # who takes GGUF files
FORMATS = {"bf16": tuple(ENGINES), "q8": OF_GGUF, "q4": OF_GGUF}  # who has which
ROWS = (1, 2, 4, 8, 16)
CHECKED_ROWS = 64
PROMPT_REPEATS, DECODE_REPEATS = 2, 3  # the slow parts of a run
QUIET_SHARE = 0.75  # a machine left alone reads memory about as fast throughout
SETTLE_SECONDS = 0.3  # threads of the engine before may still spin
RESERVE = 64  # positions beyond the context, for decoding


@dataclass(frozen=True)
class Options:
    shape: str | None
    gguf: dict[str, Path]  # files by name; empty for a shape
    work: Path
    formats: list[str]  # or names of files
    engines: list[str]
    llama_python: str
    ik_python: str
    threads: int
    context: int
    repeats: int
    tokens: int
    prepare: bool

    @property
    def folder(self) -> Path:
        assert self.shape
        return self.work / self.shape

    @property
    def vocabulary(self) -> int:
        """How many tokens there are."""
        if self.shape:
            return int(SHAPES[self.shape]["vocab_size"])
        return min(Checkpoint.open(path).target_config().vocab_size for path in self.gguf.values())

    def python(self, engine: str) -> str:
        return {LLAMA: self.llama_python, IK: self.ik_python, IK_REPACKED: self.ik_python}.get(engine, sys.executable)

    def weights(self, engine: str, fmt: str) -> Path:
        if fmt in self.gguf:
            return self.gguf[fmt]
        return self.folder / f"{fmt}.gguf" if engine in (LLAMA, IK, IK_REPACKED) else self.folder

    def runs(self, fmt: str) -> list[str]:
        """The engines that are compared in a precision or on a file."""
        return [name for name in FORMATS.get(fmt, OF_GGUF) if name in self.engines]


class Tokens:
    """Random tokens of a vocabulary, but for its first three, which may mean something."""

    def __init__(self, vocabulary: int) -> None:
        self._random, self._vocabulary = np.random.default_rng(0), vocabulary

    def draw(self, count: int) -> list[int]:
        return [int(token) for token in self._random.integers(3, self._vocabulary, count)]


class Worker:
    """The process of one engine and format; use as a context manager."""

    def __init__(self, options: Options, engine: str, fmt: str) -> None:
        room = options.context + max(RESERVE, CHECKED_ROWS, options.tokens)
        weights = options.weights(engine, fmt)
        command = [options.python(engine), HERE / "worker.py", ENGINES[engine][0], weights, fmt, options.threads, room]
        self._name = f"{engine} {fmt}"
        self._process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(options.threads)},
        )
        self.version: str = self._answer()["version"]

    def ask(self, do: str, **arguments: Any) -> Any:
        """Have it measure something; see `MEASUREMENTS` in worker.py."""
        assert self._process.stdin is not None
        time.sleep(SETTLE_SECONDS)
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.communicate()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise PacelineError(f"{self._name}: its process ended with code {self._process.wait()}; see above")
        return json.loads(line)


@dataclass
class Figures:
    """What one engine showed in one format."""

    forward_ms: dict[int, list[float]] = field(default_factory=lambda: {rows: [] for rows in ROWS})
    prompt_ms: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    against_f32: dict[str, float] | None = None
    against_ours: dict[str, float] | None = None  # paceline's in the same precision

    def summary(self, context: int) -> dict[str, Any]:
        return {
            "forward_ms": {str(rows): statistics.median(seen) for rows, seen in self.forward_ms.items()},
            "prompt_tokens_per_s": context / statistics.median(self.prompt_ms) * 1e3,
            "decode_tokens_per_s": statistics.median(self.decode),
            "against_paceline_f32": self.against_f32,
            "against_paceline": self.against_ours,
        }


def compare(options: Options) -> dict[str, Any]:
    """Measure everything asked for, and return the report."""
    bandwidth = ReadBandwidth(options.threads)
    random = Tokens(options.vocabulary)
    checked = random.draw(CHECKED_ROWS + 1)
    figures: dict[str, Figures] = {}
    versions: dict[str, str] = {}
    with tempfile.TemporaryDirectory(dir=options.work) as scratch:
        exact = Path(scratch) / "exact.npy"
        if options.shape:
            with Worker(options, "paceline", "f32") as worker:
                worker.ask("logits", tokens=checked, path=str(exact))
        for fmt in options.formats:
            with ExitStack() as stack:
                names = options.runs(fmt)
                print(f"measuring {fmt}: {', '.join(names)}", file=sys.stderr)
                workers = {name: stack.enter_context(Worker(options, name, fmt)) for name in names}
                seen = _take_turns(options, workers, bandwidth, random)
                for name, worker in workers.items():
                    versions[name] = worker.version
                    worker.ask("logits", tokens=checked, path=f"{scratch}/{name} {fmt}.npy")
            ours = Path(scratch) / f"paceline {fmt}.npy"
            for name in names:
                theirs = Path(scratch) / f"{name} {fmt}.npy"
                seen[name].against_f32 = _agreement(exact, theirs) if options.shape else None
                seen[name].against_ours = _agreement(ours, theirs) if theirs != ours else None
            figures |= {f"{name} {fmt}": seen[name] for name in names}
    engines = {name: one.summary(options.context) for name, one in figures.items()}
    return {
        "benchmark": "compare",
        "shape": options.shape,
        "files": [str(path) for path in options.gguf.values()],
        "random_weights": True if options.shape else None,
        "threads": options.threads,
        "context": options.context,
        "repeats": options.repeats,
        "read_bandwidth_gb_s": bandwidth.median,
        "read_bandwidth_range_gb_s": [min(bandwidth.seen), max(bandwidth.seen)],
        "engines": engines,
        "times_paceline": {name: _ratios(engines, name) for name in engines if not name.startswith("paceline ")},
        "best_other": {fmt: _best_other(engines, fmt) for fmt in options.formats if len(options.runs(fmt)) > 1},
        "versions": versions,
        "missing": [name for name in ENGINES if name not in options.engines],
    }


def _take_turns(
    options: Options, workers: Mapping[str, Worker], bandwidth: ReadBandwidth, random: Tokens
) -> dict[str, Figures]:
    """One precision: all engines are loaded, and one works at a time."""
    figures = {name: Figures() for name in workers}
    for _ in range(PROMPT_REPEATS):
        prompt = random.draw(options.context)
        for name, worker in workers.items():
            figures[name].prompt_ms.append(worker.ask("prompt", tokens=prompt))
    for _ in range(options.repeats):
        bandwidth.measure()
        batches = [random.draw(rows) for rows in ROWS]
        for name, worker in workers.items():
            times = worker.ask("forward", batches=batches)
            for rows, ms in zip(ROWS, times, strict=True):
                figures[name].forward_ms[rows].append(ms)
    for _ in range(DECODE_REPEATS):
        bandwidth.measure()
        for name, worker in workers.items():
            speed = worker.ask("decode", first=random.draw(1)[0], count=options.tokens)
            figures[name].decode.append(speed)
    return figures


def _agreement(one: Path, other: Path) -> dict[str, float]:
    """How alike two engines' logits are: share of rows with the same best token, and the largest difference."""
    a, b = np.load(one), np.load(other)
    return {
        "top1": float((a.argmax(-1) == b.argmax(-1)).mean()),
        "largest_difference": float(np.abs(a - b).max()),
        "logits_deviation": float(a.std()),
    }


def _ratios(engines: dict[str, Any], name: str) -> dict[str, Any]:
    """How many times an engine's time is paceline's in the same precision; above 1, paceline is faster."""
    theirs, ours = engines[name], engines[f"paceline {name.split()[-1]}"]
    speeds = ("prompt_tokens_per_s", "decode_tokens_per_s")
    return {
        "forward_ms": {rows: ms / ours["forward_ms"][rows] for rows, ms in theirs["forward_ms"].items()},
        **{key: ours[key] / theirs[key] for key in speeds},
    }


def _best_other(engines: dict[str, Any], fmt: str) -> dict[str, Any]:
    """The times of the best other engine, a figure at a time, over paceline's: above 1, paceline is faster."""
    others = [
        _ratios(engines, name) for name in engines if name.endswith(f" {fmt}") and not name.startswith("paceline ")
    ]
    return {
        "forward_ms": {str(rows): min(one["forward_ms"][str(rows)] for one in others) for rows in ROWS},
        **{key: min(one[key] for one in others) for key in ("prompt_tokens_per_s", "decode_tokens_per_s")},
    }


def prepare(options: Options) -> None:
    """Write the files that the engines read, those that are not there yet."""
    if not options.shape:
        return
    settings = options.folder / "config.json"
    before = settings.read_text() if settings.exists() else None
    write_checkpoint(options.folder, options.shape)
    if not {LLAMA, IK, IK_REPACKED} & set(options.engines):
        return
    fresh = before == settings.read_text()
    for fmt in options.formats:
        path = options.weights(LLAMA, fmt)
        if not (fresh and path.exists()):
            command = [sys.executable, HERE / "gguf_file.py", options.folder, path, fmt]
            if code := subprocess.run([str(part) for part in command]).returncode:
                raise PacelineError(f"{path}: writing it ended with code {code}; see above")


def print_report(report: dict[str, Any]) -> None:
    """The tables for people."""
    out = console()
    times = Table(title=f"{report['shape'] or 'GGUF'}: ms of a pass of 1 to 16 rows after {report['context']} tokens")
    ratios = Table(title="Times paceline's on the same weights: above 1, paceline is faster")
    for table in (times, ratios):
        table.add_column("engine")
        for column in (*map(str, ROWS), "prompt", "decoding"):
            table.add_column(column, justify="right")
    for name, seen in report["engines"].items():
        speeds = (f"{seen[key]:.1f}/s" for key in ("prompt_tokens_per_s", "decode_tokens_per_s"))
        times.add_row(name, *(f"{ms:.1f}" for ms in seen["forward_ms"].values()), *speeds)
    for name, seen in report["times_paceline"].items():
        values = (*seen["forward_ms"].values(), seen["prompt_tokens_per_s"], seen["decode_tokens_per_s"])
        ratios.add_row(name, *(f"{value:.2f}" for value in values))
    for fmt, best in report["best_other"].items():
        values = (*best["forward_ms"].values(), best["prompt_tokens_per_s"], best["decode_tokens_per_s"])
        ratios.add_row(f"best of them, {fmt}", *(f"{value:.2f}" for value in values))
    same = Table(title=f"The same weights? {CHECKED_ROWS} rows: same best token, largest difference of logits")
    for column in ("engine", "paceline f32", "paceline in that precision"):
        same.add_column(column)
    for name, seen in report["engines"].items():
        against = (seen["against_paceline_f32"], seen["against_paceline"])
        same.add_row(name, *(f"{a['top1']:.0%}, {a['largest_difference']:.2g}" if a else "-" for a in against))
    for table in (times, ratios, same):
        out.print(table)
    known = [one[key] for one in report["engines"].values() for key in ("against_paceline_f32", "against_paceline")]
    for agreement in [one for one in known if one][:1]:
        out.print(f"standard deviation of the logits: {agreement['logits_deviation']:.2f}")
    least, most = report["read_bandwidth_range_gb_s"]
    out.print(
        f"reading memory: {report['read_bandwidth_gb_s']:.1f} GB/s with {report['threads']} threads, "
        f"{least:.1f} to {most:.1f} during the run"
    )
    if least < QUIET_SHARE * most:
        out.print("other work disturbed this run: do not quote it")
    out.print("; ".join(report["versions"].values()))


def parse(arguments: Sequence[str]) -> Options:
    """Read the command line, and drop engines whose packages are missing.

    Raises:
        SettingsError: an unknown name or a number out of range.
    """
    parser = argparse.ArgumentParser(description="paceline and others on the same weights")
    parser.add_argument("--shape", choices=SHAPES, help="random weights in an official shape")
    parser.add_argument("--gguf", help="GGUF files instead of a shape, separated by commas")
    parser.add_argument("--work", type=Path, help="folder for the files that are written once")
    parser.add_argument("--formats", help=f"precisions of a shape, in turn ({','.join(FORMATS)})")
    parser.add_argument("--engines", default=",".join(ENGINES), help="who takes part (%(default)s)")
    parser.add_argument("--llama-python", default=sys.executable, help="interpreter with llama-cpp-python")
    parser.add_argument("--ik-python", default=sys.executable, help="interpreter with ik-llama-cpp-python")
    parser.add_argument("--threads", type=int, default=default_threads(), help="of every engine (%(default)s)")
    parser.add_argument("--context", type=int, default=512, help="tokens of the prompt, and in the cache (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="turns of the passes; medians are shown (%(default)s)")
    parser.add_argument("--tokens", type=int, default=8, help="tokens of a decoding run (%(default)s)")
    parser.add_argument("--prepare", action="store_true", help="write the files and stop")
    given = vars(parser.parse_args(arguments))
    _choose_weights(given)
    for name, known in (("formats", {**FORMATS, **given["gguf"]}), ("engines", ENGINES)):
        given[name] = given[name].split(",")
        if unknown := set(given[name]) - set(known):
            raise SettingsError(f"unknown in --{name}: {', '.join(sorted(unknown))}; use {', '.join(known)}")
    for name in ("threads", "context", "repeats", "tokens"):
        if given[name] < 1:
            raise SettingsError(f"--{name} is {given[name]}; it must be at least 1")
    given["engines"] = [name for name in ENGINES if name in {"paceline", *given["engines"]}]
    options = Options(**given)
    lacking = {name: _lacks(options.python(name), ENGINES[name][1]) for name in options.engines}
    for name, packages in lacking.items():
        if packages:
            print(f"{name}: left out, {options.python(name)} has no {' and no '.join(packages)}", file=sys.stderr)
    given["engines"] = [name for name, packages in lacking.items() if not packages]
    return Options(**given)


def _choose_weights(given: dict[str, Any]) -> None:
    """Either a shape, with a folder and precisions, or GGUF files, whose names stand for precisions."""
    if bool(given["shape"]) == bool(given["gguf"]):
        raise SettingsError("give either --shape or --gguf")
    if given["shape"] and not given["work"]:
        raise SettingsError("--shape writes files; say where with --work")
    files = [Path(name) for name in (given["gguf"] or "").split(",") if name]
    for path in files:
        if not path.is_file():
            raise SettingsError(f"{path}: no such file")
    given["gguf"] = {path.stem: path for path in files}
    given["formats"] = ",".join(given["gguf"]) or given["formats"] or ",".join(FORMATS)
    given["work"] = given["work"] or Path(tempfile.gettempdir())


def _lacks(python: str, packages: Sequence[str]) -> list[str]:
    """Which of these an interpreter cannot import."""
    code = "import importlib.util, sys; print(*(p for p in sys.argv[1:] if not importlib.util.find_spec(p)))"
    try:
        found = subprocess.run([python, "-c", code, *packages], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SettingsError(f"{python}: is no Python that can be used ({error})") from error
    return found.stdout.split()


def main(arguments: Sequence[str]) -> int:
    try:
        options = parse(arguments)
        prepare(options)
        if not options.prepare:
            report = compare(options)
            print_report(report)
            print(json.dumps(report))
    except PacelineError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
