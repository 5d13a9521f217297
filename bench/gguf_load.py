"""What starts of a GGUF file's model take: the first, when its weights are packed, and later ones, from the pack file.

    python bench/gguf_load.py FILE.gguf [--starts 3] [--drafter MODEL]

Each start is a process of its own, and the packed weights go to a folder that is removed afterwards. The file is read
once before, so no start waits for the disk. Memory is sampled from /proc while a model loads, which needs Linux: what
is the process's own (RssAnon), and what it has in all (VmRSS), pages of mapped files included, which are the page
cache's and can be evicted. Prints a table, and one JSON line on stdout.
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
from pathlib import Path
from threading import Thread
from typing import Any

from rich.table import Table

from paceline.backends.cpu.processors import default_threads
from paceline.bench.machine import ReadBandwidth, processor
from paceline.bench.report import console

SAMPLE_SECONDS = 0.003
READ_BYTES = 64 << 20
PROMPT = "hello"


def start(model: str, drafter: str, threads: int, spawned: float) -> None:
    """The process of one start: load, and generate one token."""
    from paceline import load

    before = time.monotonic()
    engine = load(model, drafter=drafter, threads=threads)
    loaded = time.monotonic()
    report = {
        "import_s": before - spawned,
        "load_s": loaded - before,
        "load_cpu_s": time.process_time(),
        "weight_bytes": engine.backend.info.weight_bytes,
        "isa": engine.backend.info.device,
        "has_drafter": engine.backend.info.has_drafter,
    }
    print(json.dumps(report), flush=True)
    with engine.stream(PROMPT, max_tokens=1) as stream:
        next(iter(stream))
    print(json.dumps({"first_token_s": time.monotonic() - spawned}), flush=True)


class Memory(Thread):
    """Samples how much memory a process holds, while it loads."""

    def __init__(self, process: int) -> None:
        super().__init__(daemon=True)
        self._path, self._stopped = Path(f"/proc/{process}/status"), False
        self.peaks = {"anonymous_bytes": 0, "resident_bytes": 0}

    def run(self) -> None:
        while not self._stopped:
            try:
                lines = self._path.read_text().splitlines()
            except OSError:  # it has ended
                return
            sizes = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines if line.endswith(" kB")}
            for key, name in (("anonymous_bytes", "RssAnon"), ("resident_bytes", "VmRSS")):
                self.peaks[key] = max(self.peaks[key], sizes.get(name, 0))
            time.sleep(SAMPLE_SECONDS)

    def stop(self) -> dict[str, int]:
        self._stopped = True
        self.join()
        return self.peaks


def measure_start(given: argparse.Namespace, cache: Path) -> dict[str, Any]:
    """One start in a process of its own."""
    command = [sys.executable, __file__, given.file, "--drafter", given.drafter, "--threads", str(given.threads)]
    spawned = time.monotonic()
    process = subprocess.Popen(
        [*command, "--spawned", str(spawned)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PACELINE_CACHE": str(cache)},
    )
    assert process.stdout is not None
    memory = Memory(process.pid)
    memory.start()
    loaded = process.stdout.readline()
    peaks = memory.stop()
    end = process.communicate()[0]
    if process.returncode or not end:
        raise SystemExit(f"{given.file}: its start ended with code {process.returncode}; see above")
    return {**json.loads(loaded), **json.loads(end), **peaks}


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """All starts, and what they can be compared with."""
    _read(Path(given.file))
    bandwidth = ReadBandwidth(given.threads)
    with tempfile.TemporaryDirectory(prefix="paceline-bench-") as folder:
        starts = []
        for _ in range(1 + given.starts):
            bandwidth.measure()
            starts.append(measure_start(given, Path(folder)))
        packs = sum(path.stat().st_size for path in Path(folder).glob("*.pack"))
    first, *later = starts
    packed = packs or first["weight_bytes"]  # small models are not kept
    return {
        "benchmark": "gguf_load",
        "file": Path(given.file).name,
        "file_bytes": Path(given.file).stat().st_size,
        "processor": processor(),
        "threads": given.threads,
        "isa": first["isa"],
        "has_drafter": first["has_drafter"],
        "read_bandwidth_gb_s": bandwidth.median,
        "weight_bytes": first["weight_bytes"],
        "pack_file_bytes": packs,
        "first_start": first,
        "later_starts": later,
        "later_load_s": statistics.median(one["load_s"] for one in later),
        "anonymous_share": first["anonymous_bytes"] / packed,
    }


def table(report: dict[str, Any]) -> Table:
    """Seconds and memory of each start."""
    shown = Table(
        title=f"Starts of {report['file']} ({report['file_bytes'] / 1e9:.2f} GB), {report['threads']} threads"
    )
    columns = {
        "start": "",
        "load, s": "load_s",
        "of it processor time, s": "load_cpu_s",
        "first token, s": "first_token_s",
    }
    columns |= {"own memory, GB": "anonymous_bytes", "with mapped files, GB": "resident_bytes"}
    for title in columns:
        shown.add_column(title, justify="right")
    for index, one in enumerate([report["first_start"], *report["later_starts"]]):
        cells = [one[key] / 1e9 if key.endswith("bytes") else one[key] for key in columns.values() if key]
        shown.add_row("first" if index == 0 else str(index + 1), *(f"{cell:.2f}" for cell in cells))
    return shown


def _read(path: Path) -> None:
    """Bring a file into the page cache."""
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(READ_BYTES)
        while file.readinto(buffer):
            pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="a GGUF file")
    parser.add_argument("--drafter", default="auto", help="as of paceline.load (auto: one beside the file)")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--starts", type=int, default=3, help="after the first (3)")
    parser.add_argument("--spawned", type=float, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.spawned is not None:
        start(given.file, given.drafter, given.threads, given.spawned)
        return
    if not Path("/proc/self/status").exists():
        raise SystemExit("memory is read from /proc, which this system does not have; run it on Linux")
    report = measure(given)
    out = console()
    out.print(table(report))
    out.print(
        f"packed weights: {report['pack_file_bytes'] / 1e9:.3f} GB in files; the first start held at most "
        f"{report['anonymous_share']:.1%} of that as memory of its own; "
        f"reading memory: {report['read_bandwidth_gb_s']:.1f} GB/s"
    )
    print(json.dumps(report))


if __name__ == "__main__":
    main()
