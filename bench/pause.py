"""How long prefilling 4,000 tokens stalls three streams, and the same prompt with a warm prefix cache. Random weights.

    python bench/pause.py --shape e2b --quant q4

Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import numpy as np

from paceline.backends.cpu.backend import CpuBackend
from paceline.backends.cpu.processors import default_threads
from paceline.bench.machine import ReadBandwidth
from paceline.bench.random_weights import random_weights
from paceline.bench.shapes import official_target
from paceline.engine.prefix_cache import PrefixCache
from paceline.engine.scheduler import Scheduler
from paceline.engine.sequence import Sequence
from paceline.text.detokenizer import Detokenizer
from paceline.types import GREEDY

PROMPT, STREAMS, CONTEXT = 4000, 3, 8192


def sequence(backend: CpuBackend, tokens: list[int], most: int) -> Sequence:
    """A greedy one without drafts."""
    return Sequence(
        tokens=tokens,
        params=GREEDY,
        draft_tokens=0,
        max_tokens=most,
        limit=CONTEXT,
        stop_ids=frozenset(),
        detokenizer=Detokenizer(None, lambda _: None),
    )


def ticks_until_end(scheduler: Scheduler, one: Sequence) -> list[float]:
    """Submit a sequence; the seconds of each step until it ends."""
    scheduler.submit(one)
    seconds = []
    while not one.finish:
        started = time.perf_counter()
        scheduler.tick()
        seconds.append(time.perf_counter() - started)
    return seconds


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", default="e2b", choices=["e2b", "e4b", "12b", "26b", "31b"])
    parser.add_argument("--quant", default="q4", choices=["bf16", "q8", "q4"])
    parser.add_argument("--threads", type=int, default=default_threads())
    arguments = parser.parse_args()
    config = official_target(arguments.shape)
    weights = random_weights(config, arguments.quant)
    backend = CpuBackend((config, weights), threads=arguments.threads, context=CONTEXT, slots=STREAMS + 1)
    scheduler = Scheduler(backend, (), 256, prefix_cache=PrefixCache(backend, 4 << 30))
    random = np.random.default_rng(0)
    prompts = [random.integers(5, config.vocab_size, n).tolist() for n in (*[20] * STREAMS, PROMPT)]
    for prompt in prompts[:STREAMS]:
        scheduler.submit(sequence(backend, prompt, 1 << 30))
    for _ in range(8):
        scheduler.tick()
    calm = [ticks_until_end(scheduler, sequence(backend, [5 + n], 8)) for n in range(2)]
    first = ticks_until_end(scheduler, sequence(backend, prompts[-1], 1))
    again = ticks_until_end(scheduler, sequence(backend, [*prompts[-1], 7, 7, 7], 1))
    bandwidth = ReadBandwidth(arguments.threads)
    report = {
        **vars(arguments),
        "bandwidth_gb_per_s": round(statistics.median(bandwidth.measure() for _ in range(5)), 1),
        "round_s": round(statistics.median(calm[1]), 3),
        "longest_pause_s": round(max(first), 3),
        "prompt_s": round(sum(first), 2),
        "prompt_again_s": round(sum(again), 3),
        "kept_mb": round(scheduler.prefix_cache.nbytes / 1e6, 1) if scheduler.prefix_cache else 0,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
