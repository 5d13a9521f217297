"""Compares passes of two models in one run, taking turns: the ratio of their times beside the ratio of their bytes.

    python bench/gguf_passes.py A.gguf B.gguf [--repeats 25]

Where memory is the limit, a pass of A costs as much more than one of B as it has more bytes to read. Prints a table,
and one JSON line on stdout.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from rich.table import Table

from paceline.backends.cpu.processors import default_threads
from paceline.bench.loading import Pair, open_pairs
from paceline.bench.report import console

ROWS = (1, 2, 4, 8, 16)


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Passes of both, alternating."""
    pairs = [
        open_pairs(model, None, "auto", given.threads, "cpu", given.context, room=given.context + 64)[0]
        for model in (given.first, given.second)
    ]
    seen: list[list[dict[int, float]]] = [[], []]
    for repeat in range(given.repeats):
        for index in (0, 1) if repeat % 2 else (1, 0):  # neither is always the one that comes after the other
            seen[index].append(pairs[index].bench.forward_ms(1, ROWS))
    ratios = {rows: [a[rows] / b[rows] for a, b in zip(*seen, strict=True)] for rows in ROWS}
    return {
        "benchmark": "gguf_passes",
        "models": [_one(pair, times) for pair, times in zip(pairs, seen, strict=True)],
        "bytes_ratio": pairs[0].pass_bytes / pairs[1].pass_bytes,
        "time_ratio": {str(rows): statistics.median(found) for rows, found in ratios.items()},
        "time_ratios_of_one_row": ratios[1],
    }


def _one(pair: Pair, times: list[dict[int, float]]) -> dict[str, Any]:
    medians = {str(rows): statistics.median(one[rows] for one in times) for rows in ROWS}
    bandwidth = pair.bench.bandwidth.median
    return pair.report("passes") | {
        "forward_ms": medians,
        "forward_of_one_row": {rows: ms / medians["1"] for rows, ms in medians.items()},
        "bandwidth_fraction": pair.pass_bytes / medians["1"] / 1e6 / bandwidth,
    }


def table(report: dict[str, Any]) -> Table:
    """Milliseconds of both, A and B, and their ratio, by rows."""
    shown = Table(title=f"Passes; ratio of bytes {report['bytes_ratio']:.3f}")
    for title in ("rows", "A, ms", "B, ms", "A / B", "A of one row", "B of one row"):
        shown.add_column(title, justify="right")
    for rows, ratio in report["time_ratio"].items():
        times = [f"{model['forward_ms'][rows]:.2f}" for model in report["models"]]
        of_one = [f"{model['forward_of_one_row'][rows]:.2f}" for model in report["models"]]
        shown.add_row(rows, *times, f"{ratio:.3f}", *of_one)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", help="a GGUF file, or another model")
    parser.add_argument("second", help="the one that it is compared with")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--context", type=int, default=512, help="tokens in the KV cache (512)")
    parser.add_argument("--repeats", type=int, default=25, help="turns of each (25)")
    report = measure(parser.parse_args())
    out = console()
    out.print(table(report))
    for name, model in zip("AB", report["models"], strict=True):
        share, speed = model["bandwidth_fraction"], model["read_bandwidth_gb_s"]
        read = f"one row reads {model['pass_bytes'] / 1e9:.3f} GB, at {share:.0%} of {speed:.1f} GB/s"
        out.print(f"{name}, {Path(model['model']).name}: {read}")
    spread = sorted(report["time_ratios_of_one_row"])
    out.print(f"A / B of one row: {spread[0]:.2f} to {spread[-1]:.2f}; ratio of bytes {report['bytes_ratio']:.3f}")
    more = report["time_ratio"]["1"] / report["bytes_ratio"] - 1
    out.print(f"one row: {report['time_ratio']['1']:.3f} times the time, {more:+.1%} of what the bytes account for")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
