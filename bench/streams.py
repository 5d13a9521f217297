"""Several streams at once: all their tokens a second, with drafts and without, against one stream.

    python bench/streams.py --model tiny-python --streams 8

Each stream continues another stretch of Python source, sampled with the model's sampling parameters and its own seed,
then greedily. The ways alternate, several times, in one process; medians are quoted. Prints a table on stderr and one
JSON line on stdout.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from dataclasses import replace

import paceline
from paceline.bench.machine import ReadBandwidth
from paceline.engine.engine import Request
from paceline.types import SamplingParams

PROMPTS = (
    "def fibonacci(n):",
    "class Stack:\n    def __init__(self",
    "import os\nimport sys\n\ndef main(",
    "def read_lines(path):\n    with open(",
    "    def test_equal(self):\n        self.assert",
    "for key, value in sorted(",
    "def parse(text):\n    tokens = ",
    "try:\n    import json\nexcept ImportError:",
)


def tokens_per_second(
    engine: paceline.Engine, streams: int, tokens: int, sampling: SamplingParams, depth: object
) -> float:
    """Speed of all streams together, from their start to the last one's end."""
    started, sequences = time.perf_counter(), []
    for i in range(streams):
        params = replace(sampling, seed=i, suppressed=tuple(engine.stop_ids))
        request = Request(params, max_tokens=tokens, draft_tokens=depth)
        prompt = engine.encode(PROMPTS[i % len(PROMPTS)], raw=True)
        sequences.append(engine.submit(prompt, request, lambda _: None))
    while engine.scheduler.busy:
        engine.scheduler.tick()
    seconds = time.perf_counter() - started
    return sum(len(sequence.generated) for sequence in sequences) / seconds


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="tiny-python")
    parser.add_argument("--quant", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    engine = paceline.load(
        arguments.model, quant=arguments.quant, threads=arguments.threads, slots=arguments.streams, notify=_note
    )
    dice = random.Random(0)
    ways = {
        "one, auto": (1, "auto"),
        "all, plain": (arguments.streams, 0),
        "all, auto": (arguments.streams, "auto"),
        "all, 1 draft": (arguments.streams, 1),
        "all, 2 drafts": (arguments.streams, 2),
    }
    info = engine.backend.info
    report = {
        "model": arguments.model,
        "streams": arguments.streams,
        "threads": engine.backend.threads,
        "quant": info.quant,
        "device": info.device,
    }
    bandwidth = ReadBandwidth(engine.backend.threads)
    for _ in range(5):
        bandwidth.measure()
    report["bandwidth_gb_per_s"] = round(bandwidth.median, 1)
    for name, sampling in (("the model's own sampling", engine.sampling), ("greedy", SamplingParams())):
        seen: dict[str, list[float]] = {way: [] for way in ways}
        for repeat in range(arguments.rounds + 1):
            for way in dice.sample(list(ways), len(ways)):  # none always follows the same other
                streams, depth = ways[way]
                speed = tokens_per_second(engine, streams, arguments.tokens, sampling, depth)
                if repeat:  # the first finds everything cold
                    seen[way].append(speed)
        report[name] = {way: round(statistics.median(speeds), 1) for way, speeds in seen.items()}
        one, plain, auto = (report[name][way] for way in list(ways)[:3])
        report[name] |= {"auto_over_one": round(auto / one, 2), "auto_over_plain": round(auto / plain, 3)}
        print(f"{name}: " + ", ".join(f"{way} {speed}" for way, speed in report[name].items()), file=sys.stderr)
    print(json.dumps(report))


def _note(line: str) -> None:
    print(line, file=sys.stderr)


if __name__ == "__main__":
    main()
