"""How much a pair gains on real text: acceptance by depth on 100 prompts, and the speed of auto against plain decoding.

    python bench/acceptance.py gemma3-270m

Half of the prompts are stretches of the texts that `paceline eval` measures on (English ones), half are from the middle
of modules of this interpreter's standard library. Acceptance is counted with four drafts a round, greedily and at the
model's own sampling; texts that repeat a stretch of 20 tokens are left out there and counted. Speeds are of all texts,
plain and auto in turns. Prints lines on stderr and one JSON line on stdout.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import sys
import sysconfig
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import paceline
from paceline.bench.machine import ReadBandwidth
from paceline.sampling_params import or_official
from paceline.train.acceptance import acceptance
from paceline.types import SamplingParams

PROSE = ("dialogue", "facts", "licence", "story")
GIVEN = 300  # characters of a prompt


def stretches(text: str, count: int, gap: str) -> list[str]:
    """What follows gaps that are evenly spaced over a text."""
    found = []
    for number in range(count):
        start = (len(text) - 2 * GIVEN) * number // count
        start = text.index(gap, start) + 1 if number else 0
        found.append(text[start : start + GIVEN])
    return found


def prose(count: int) -> list[str]:
    """Prompts from the texts of `paceline eval`."""
    folder = Path(paceline.__file__).parent / "assets" / "eval"
    texts = [(folder / f"{name}.txt").read_text(encoding="utf-8") for name in PROSE]
    each = math.ceil(count / len(PROSE))
    return [prompt for text in texts for prompt in stretches(text, each, " ")][:count]


def code(count: int) -> list[str]:
    """Prompts from the middle of modules of the standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    modules = [p for p in sorted(root.glob("*.py")) if p.stat().st_size > 8 * GIVEN]
    chosen = [modules[len(modules) * number // count] for number in range(count)]
    return [stretches(path.read_text(encoding="utf-8"), 2, "\n")[1] for path in chosen]


def speeds(engine: paceline.Engine, prompts: list[list[int]], params: SamplingParams, tokens: int) -> dict[str, float]:
    """Tokens a second of all texts, plain and auto in turns."""
    seconds, made, dice = {"plain": 0.0, "auto": 0.0}, 0, random.Random(0)
    for number, prompt in enumerate(prompts):
        texts = {}
        for way in dice.sample(list(seconds), 2):
            depth: Any = {"plain": 0, "auto": "auto"}[way]
            settings = {"sampling": replace(params, seed=number), "max_tokens": tokens, "draft_tokens": depth}
            began = time.perf_counter()
            texts[way] = engine.generate(prompt, **settings).tokens
            seconds[way] += time.perf_counter() - began
        assert texts["plain"] == texts["auto"]
        made += len(texts["plain"])
    return {way: made / spent for way, spent in seconds.items()}


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("model")
    parser.add_argument("--drafter", default="auto")
    parser.add_argument("--quant", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=128, help="of each text")
    arguments = parser.parse_args()
    engine = paceline.load(
        arguments.model,
        drafter=arguments.drafter,
        quant=arguments.quant,
        threads=arguments.threads,
        context=1024,
        notify=note,
    )
    bandwidth = ReadBandwidth(engine.backend.threads)
    for _ in range(5):
        bandwidth.measure()
    half = arguments.prompts // 2
    prompts = [engine.encode(text, raw=True) for text in prose(half) + code(arguments.prompts - half)]
    info, own = engine.backend.info, or_official(engine.sampling)
    report: dict[str, Any] = {
        "benchmark": "acceptance",
        "model": arguments.model,
        "drafter": arguments.drafter,
        "quant": info.quant,
        "device": info.device,
        "threads": engine.backend.threads,
        "python": platform.python_version(),
        "read_bandwidth_gb_s": round(bandwidth.median, 1),
    }
    for name, params in {"greedy": replace(own, temperature=0.0), "sampled": own}.items():
        found = acceptance(engine, prompts, params, arguments.tokens).report()
        found["tokens_per_s"] = {k: round(v, 1) for k, v in speeds(engine, prompts, params, arguments.tokens).items()}
        found["auto_over_plain"] = round(found["tokens_per_s"]["auto"] / found["tokens_per_s"]["plain"], 3)
        report[name] = found
        note(f"{name}: {json.dumps(found)}")
    print(json.dumps(report))


def note(line: str) -> None:
    print(line, file=sys.stderr)


if __name__ == "__main__":
    main()
