"""Measures a GPU: every official shape that fits in bf16, q8 and q4, tiny-python, transformers' MTP, and exactness.

    bench/gpu.sh [--out FOLDER] [--seconds 520] [--device cuda] [--shapes 31b,e2b] [--quants bf16,q4]

Each measurement is a separate process; the most important come first, and those that no time is left for are named.
One JSON file holds all results, rewritten after each, and one picture the cost curves and speeds. Random weights accept
no drafts, so acceptance in the official shapes is SIMULATED; all else is real.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paceline.bench.shapes import TARGETS
from paceline.errors import PacelineError
from paceline.files import atomic_file

HERE = Path(__file__).resolve().parent
SHARES = (0.8, 0.65, 0.5)
FIRST = ("31b bf16", "31b q4")  # the bars are about these
QUANTS = ("bf16", "q8", "q4")
LEAST_SECONDS = 20.0  # a measurement is not begun with less left
EXACTNESS = ("tests/property/test_exactness.py", "tests/parity/test_transformers.py")


@dataclass(frozen=True)
class Job:
    """One measurement: a command that ends in a line of JSON, or passes or fails."""

    name: str
    command: list[str]
    most_seconds: float
    tests: bool = False


def jobs(device: str, shapes: list[str], quants: list[str]) -> list[Job]:
    """All measurements, the most telling first."""
    torch_device = device.removeprefix("torch:")
    paceline = [sys.executable, "-m", "paceline"]
    peer = [sys.executable, str(HERE / "gpu_transformers.py"), "--device", torch_device]
    decode = [*paceline, "bench", "decode", "--device", device]
    shares = ",".join(map(str, SHARES))
    measured = {
        f"{shape} {quant}": Job(
            f"{shape} {quant}",
            [*decode, "--shape", shape, "--quant", quant, "--acceptance", shares, "--repeats", "5"],
            120,
        )
        for shape in shapes
        for quant in quants
    }
    first = [measured.pop(name) for name in FIRST if name in measured]
    tiny = [
        Job("tiny-python bf16", [*decode, "--model", "tiny-python", "--quant", "bf16", "--tokens", "200"], 90),
        Job("transformers tiny-python", [*peer, "--model", "tiny-python"], 90),
        Job(
            "verify tiny-python",
            [*paceline, "verify", "tiny-python", "--device", device, "--quant", "bf16", "--max-tokens", "32", "--json"],
            90,
        ),
    ]
    peers = [
        Job(f"transformers {shape}", [*peer, "--shape", shape], 120) for shape in ("31b", "e2b") if shape in shapes
    ]
    exact = Job("exactness", [sys.executable, "-m", "pytest", "-q", "-x", *EXACTNESS], 200, tests=True)
    return [*first, *tiny, *peers[:1], exact, *measured.values(), *peers[1:]]


def run(job: Job, seconds: float, device: str) -> dict[str, Any]:
    """What a measurement found, or why there is nothing."""
    environment = {**os.environ, "PACELINE_TEST_DEVICE": device}
    started = time.monotonic()
    try:
        done = subprocess.run(
            job.command, capture_output=True, text=True, timeout=seconds, cwd=HERE.parent, env=environment, check=False
        )
    except subprocess.TimeoutExpired as late:
        said = (late.stdout or b"").decode(errors="replace").splitlines() if job.tests else []
        return {"failed": f"not done within {seconds:.0f} s", "until_then": said[-3:]}
    took = {"took_seconds": round(time.monotonic() - started, 1)}
    if job.tests:
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        return {"passed": done.returncode == 0, "summary": lines[-1] if lines else done.stderr[-300:], **took}
    try:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        errors = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
        return {"failed": errors[-1][:300], **took}
    return {**found, **took}


def name_of(device: str) -> str:
    """What the device calls itself."""
    from paceline.backends.torch.load import open_device
    from paceline.backends.torch.measure import device_name

    return device_name(open_device(device.removeprefix("torch:")))


def plot(results: dict[str, Any], path: Path) -> None:
    """Cost curves beside speeds: what checking more rows costs, and what MTP makes of it."""
    from matplotlib.figure import Figure

    decoded = {name: found for name, found in results.items() if "forward_ms" in found}
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    curves, speeds = figure.subplots(1, 2)
    for name, found in decoded.items():
        times = list(found["forward_ms"].values())
        curves.plot([int(rows) for rows in found["forward_ms"]], [t / times[0] for t in times], label=name, lw=1.2)
    curves.set(xlabel="rows checked in one pass", ylabel="time, of one row", ylim=(0, None))
    curves.legend(fontsize=7, ncols=2)
    places = range(len(decoded))
    for shift, key, label in ((-0.2, "plain_tokens_per_s", "plain"), (0.2, "mtp_tokens_per_s", "MTP, 3 drafts")):
        speeds.bar([place + shift for place in places], [found[key] for found in decoded.values()], 0.4, label=label)
    speeds.set(ylabel="tokens/s", xticks=list(places), yscale="log", ylim=(1, None))
    speeds.set_title("acceptance is SIMULATED but for tiny-python", fontsize=9)
    speeds.set_xticklabels(list(decoded), rotation=60, ha="right", fontsize=8)
    speeds.legend(loc="lower right", framealpha=0.9)
    for axes in (curves, speeds):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def summary(results: dict[str, Any]) -> list[str]:
    """A line for each measurement."""
    lines = []
    for name, found in results.items():
        if "forward_ms" in found:
            one = found["forward_ms"]["1"]
            step = found["draft_step_ms"]
            lines.append(
                f"{name}: {one:.2f} ms a row, {found['bandwidth_fraction']:.0%} of the bandwidth; V(4) "
                f"{found['forward_ms']['4'] / one:.2f}, V(8) {found['forward_ms']['8'] / one:.2f}; draft step "
                f"{step / one:.1%}; {found['plain_tokens_per_s']:.1f} -> {found['mtp_tokens_per_s']:.1f} tokens/s, "
                f"{found['speedup']:.2f} times; same bits: {found['same_bits']}"
            )
        else:
            shown = {key: value for key, value in found.items() if isinstance(value, int | float | str)}
            words = [f"{key} {round(value, 1) if isinstance(value, float) else value}" for key, value in shown.items()]
            lines.append(f"{name}: " + ", ".join(words[:10]))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder for the JSON file and the picture")
    parser.add_argument("--seconds", type=float, default=520.0, help="for all of it")
    parser.add_argument("--device", default="cuda", help="cuda, or torch:cpu to try the script")
    parser.add_argument("--shapes", default=",".join(TARGETS), help="official shapes, with commas; empty for none")
    parser.add_argument("--quants", default=",".join(QUANTS))
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    shapes, quants = ([part for part in text.split(",") if part] for text in (options.shapes, options.quants))
    results: dict[str, Any] = {}
    options.out.mkdir(parents=True, exist_ok=True)
    name = "gpu-" + re.sub(r"[^a-z0-9]+", "-", name_of(options.device).lower()).strip("-")
    for job in jobs(options.device, shapes, quants):
        left = end - time.monotonic()
        if left < LEAST_SECONDS:
            results[job.name] = {"failed": "no time left"}
        else:
            results[job.name] = run(job, min(left, job.most_seconds), options.device)
        print(*summary({job.name: results[job.name]}), flush=True)
        with atomic_file(options.out / f"{name}.json") as file:
            file.write(json.dumps(results, indent=1).encode())
    plot(results, options.out / f"{name}.png")
    print(f"{options.out / name}.json and .png")


if __name__ == "__main__":
    try:
        main()
    except PacelineError as error:
        sys.exit(f"gpu.py: {error}")
