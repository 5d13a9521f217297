"""Whether drafting pays: the adaptive draft length against fixed ones and plain decoding, from a cold start.

    python bench/drafting.py                                          # tiny-python, greedy and sampled
    python bench/drafting.py --shape e2b --acceptance 0.8,0.65,0.5    # SIMULATED acceptance
    python bench/drafting.py --shape e2b --echo                       # and a SIMULATED copy, edited every 250 tokens

All ways run in turns in one process, in another order each time, and start with nothing learned. With a model, a
drafter whose rows were shuffled is one that is never right. Quotes medians, the ratio of medians and that of each turn.
Prints a table on stderr and one JSON line on stdout.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.torch import save_file

import paceline
from paceline.bench.loading import Pair, open_pairs
from paceline.bench.runs import Bench, SimulatedAcceptance
from paceline.checkpoint import locate, locate_drafter
from paceline.engine.draft_control import DraftControl
from paceline.engine.proposers import GUESSED, LEAST_MATCH, GrammarProposer, PromptLookup, match_class
from paceline.engine.scheduler import Scheduler
from paceline.engine.sequence import Sequence
from paceline.types import GREEDY, MAX_DRAFT, Draft, SamplingParams

PROMPT = "import socket\nimport threading\n\n\nclass Server:\n"
EDIT = 250  # tokens from one edit of the copy to the next
Way = str | int  # a fixed draft length, or what the engine makes of it


def in_turns(ways: list[Way], runs: int, speed: Callable[[Way], float], title: str) -> dict[str, object]:
    """Median speeds, and what the adaptive ways are of the best fixed length and of plain decoding, turn by turn."""
    dice, seen = random.Random(0), {way: [] for way in ways}  # type: ignore[var-annotated]
    for _ in range(runs):
        for way in dice.sample(ways, len(ways)):
            seen[way].append(speed(way))
    medians = {way: statistics.median(speeds) for way, speeds in seen.items()}
    best = max((way for way in ways if isinstance(way, int)), key=medians.__getitem__)
    report: dict[str, object] = {"tokens_per_s": {str(way): round(v, 2) for way, v in medians.items()}, "best": best}
    for way, other in (("auto", best), ("auto", 0), ("never right", 0)):
        if way in seen:
            turns = [round(a / b, 3) for a, b in zip(seen[way], seen[other], strict=True)]
            ratio = round(medians[way] / medians[other], 3)
            report[f"{way} / {'plain' if other == 0 else 'best'}"] = {"medians": ratio, "turns": turns}
    print(f"{title}: {json.dumps(report)}", file=sys.stderr)
    return report


def model_speeds(name: str, tokens: int, runs: int, lengths: list[int], threads: int | None) -> dict[str, object]:
    """A real pair, greedy and sampled, and the same target with a drafter that is never right."""
    with tempfile.TemporaryDirectory() as folder:
        place = locate(name, _note)
        wrong = shuffled(locate_drafter(name, place, "auto", _note), Path(folder) / "drafter")
        pairs = [paceline.load(name, drafter=d, threads=threads, notify=_note) for d in ("auto", str(wrong))]
    suppressed = tuple(pairs[0].stop_ids)  # no text ends early
    samplings = {
        "greedy": replace(GREEDY, suppressed=suppressed),
        "sampled": SamplingParams(temperature=1.0, top_k=64, top_p=0.95, seed=1, suppressed=suppressed),
    }
    report: dict[str, object] = {"model": name, "isa": pairs[0].backend.info.device}
    for title, sampling in samplings.items():

        def speed(way: Way, sampling: SamplingParams = sampling) -> float:
            engine = pairs[way == "never right"]
            info = engine.backend.info
            proposers = [GrammarProposer(), DraftControl(info.has_drafter, info.stops_early)]
            cold = replace(engine, scheduler=Scheduler(engine.backend, proposers, engine.scheduler.chunk))
            drafts = way if isinstance(way, int) else "auto"
            made = cold.generate(PROMPT, raw=True, sampling=sampling, max_tokens=tokens, draft_tokens=drafts)
            return made.statistics.tokens_per_second

        report[title] = in_turns([0, *lengths, "auto", "never right"], runs, speed, f"{name}, {title}")
    return report


def shuffled(drafter: Path | None, to: Path) -> Path:
    """A copy of a drafter's folder in which the rows of each matrix are in another order."""
    assert drafter
    shutil.copytree(drafter, to)
    dice = np.random.default_rng(0)
    with safe_open(to / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    mixed = {n: t[dice.permutation(len(t))].contiguous() if t.ndim == 2 else t for n, t in tensors.items()}
    save_file(mixed, to / "model.safetensors", metadata={"format": "pt"})
    return to


def shape_speeds(
    pair: Pair, shares: tuple[float, ...], tokens: int, runs: int, lengths: list[int]
) -> dict[str, object]:
    """Random weights of an official shape at a SIMULATED acceptance."""
    run: Bench = pair.bench

    def speed(way: Way) -> float:
        run.probe()
        found = () if way == "never right" else shares
        return run.decode_tokens_per_s(tokens, way if isinstance(way, int) else None, found)

    found = in_turns([0, *lengths, "auto", "never right"], runs, speed, f"SIMULATED acceptance {shares}")
    return {**pair.report("drafting"), "acceptance": shares, **found}


@dataclass
class Echo(SimulatedAcceptance):
    """Prompt lookup always finds a text that the target copies; both are SIMULATED."""

    _start: int = 0

    def guess(self, sequence: Sequence, lookup: PromptLookup, most: int) -> tuple[list[int], list[float]]:
        self._start = self._start or len(sequence.tokens)
        matched = (len(sequence.tokens) - self._start) % EDIT  # since the last edit
        if matched < LEAST_MATCH:
            return [], []
        return [0] * most, [GUESSED[match_class(matched + i)] for i in range(most)]

    def propose(self, sequence: Sequence, most: int) -> Draft | None:
        draft = super().propose(sequence, most)
        if draft is None or not draft.tokens:
            return draft
        return replace(draft, simulated=min(len(draft.tokens), EDIT - (len(sequence.tokens) - self._start) % EDIT))


def echo_speeds(pair: Pair, shares: tuple[float, ...], tokens: int, runs: int) -> dict[str, object]:
    """How much faster a copy is with prompt lookup than with the drafter alone."""
    seen: dict[str, list[float]] = {"drafter": [], "drafter and lookup": []}
    for _ in range(runs):
        for way, kind in zip(seen, (SimulatedAcceptance, Echo), strict=True):
            pair.bench.probe()
            seen[way].append(pair.bench.decode_tokens_per_s(tokens, None, shares, kind))
    medians = {way: round(statistics.median(speeds), 2) for way, speeds in seen.items()}
    ratio = round(medians["drafter and lookup"] / medians["drafter"], 3)
    found = {"tokens_per_s": medians, "ratio": ratio, "acceptance": shares}
    print(f"SIMULATED copy: {json.dumps(found)}", file=sys.stderr)
    return {**pair.report("echo"), **found}


def shares_of(text: str) -> tuple[float, ...]:
    """Acceptance by depth."""
    shares = _numbers(text, float)
    if not all(0 <= share <= 1 for share in shares) or sorted(shares, reverse=True) != shares:
        raise argparse.ArgumentTypeError(f"{text!r}: give rates from 1 down to 0, such as 0.8,0.65,0.5")
    return tuple(shares)


def lengths_of(text: str) -> list[int]:
    """Draft lengths."""
    lengths = _numbers(text, int)
    if not all(1 <= length <= MAX_DRAFT for length in lengths):
        raise argparse.ArgumentTypeError(f"{text!r}: give draft lengths from 1 to {MAX_DRAFT}, such as 1,2,4")
    return lengths


def _numbers(text: str, kind: type) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers") from error


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="tiny-python")
    parser.add_argument("--shape", choices=["e2b", "e4b", "12b", "26b", "31b"])
    parser.add_argument("--quant", default="q4")
    parser.add_argument("--acceptance", type=shares_of, default="0.8,0.65,0.5", help="by depth, SIMULATED")
    parser.add_argument("--echo", action="store_true", help="a text that copies, with --shape")
    parser.add_argument("--lengths", type=lengths_of, default="1,2,3,4,6,8")
    parser.add_argument("--tokens", type=int, default=500)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    lengths = arguments.lengths
    if arguments.shape:
        shares = arguments.acceptance
        room = 512 + 2 * arguments.tokens + 64
        (pair,) = open_pairs(
            None, arguments.shape, arguments.quant, arguments.threads, "cpu", 512, room, None, "auto", [""]
        )
        if arguments.echo:
            report = echo_speeds(pair, shares, arguments.tokens, arguments.runs)
        else:
            report = shape_speeds(pair, shares, arguments.tokens, arguments.runs, lengths)
    else:
        report = model_speeds(arguments.model, arguments.tokens, arguments.runs, lengths, arguments.threads)
    print(json.dumps({"benchmark": "drafting", "tokens": arguments.tokens, **report}))


def _note(line: str) -> None:
    print(line, file=sys.stderr)


if __name__ == "__main__":
    main()
