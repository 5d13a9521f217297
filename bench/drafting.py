"""Whether drafting pays: the adaptive draft length against fixed ones and plain decoding, from a cold start.

    python bench/drafting.py                                          # tiny-python, greedy and sampled
    python bench/drafting.py --shape e2b --acceptance 0.8,0.65,0.5    # SIMULATED acceptance
    python bench/drafting.py --shape e2b --acceptance 0.9,0.85,0.8 --then 0.3,0.1,0     # in bursts
    python bench/drafting.py --shape e2b --echo                       # and a SIMULATED copy, edited every 250 tokens

In each run all ways write a text of their own from the same prompt, starting with nothing learned, and take turns of
some tokens, so that a machine that gets slower for some seconds is slow for all of them. With a model, a drafter whose
rows were shuffled is one that is never right. Quotes medians over the runs, and the ratio in each.
Prints figures on stderr and one JSON line on stdout.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
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
from paceline.engine.engine import DraftTokens, Engine, Request
from paceline.engine.proposers import GUESSED, LEAST_MATCH, GrammarProposer, PromptLookup, match_class
from paceline.engine.scheduler import Scheduler
from paceline.engine.sequence import Sequence
from paceline.errors import PacelineError
from paceline.types import GREEDY, MAX_DRAFT, Draft, SamplingParams

PROMPT = "import socket\nimport threading\n\n\nclass Server:\n"
BURST = 60  # tokens of each acceptance in turn
EDIT = 250  # tokens from one edit of the copy to the next
TURN_OF_MODEL, TURN_OF_SHAPE = 50, 10  # tokens: some tens or hundreds of milliseconds
COPY = "with prompt lookup"
Shares = tuple[float, ...]
Way = str | int  # a fixed draft length, or what the engine makes of it


@dataclass
class Text:
    """A text that is being written."""

    length: Callable[[], int]
    advance: Callable[[], object]  # by a round
    close: Callable[[], object]


def in_turns(
    ways: list[Way], runs: int, tokens: int, turn: int, start: Callable[[Way], Text], title: str
) -> dict[str, object]:
    """Median speeds, and in each run those of the adaptive ways over the best fixed length's and plain decoding's."""
    seen = [one_run(ways, tokens, turn, start, random.Random(run)) for run in range(runs)]
    medians = {way: statistics.median(run[way] for run in seen) for way in ways}
    best = max((way for way in ways if isinstance(way, int)), key=medians.__getitem__)
    report: dict[str, object] = {"tokens_per_s": {str(way): round(v, 2) for way, v in medians.items()}, "best": best}
    for way, other in (("auto", best), ("auto", 0), ("never right", 0)):
        if way in ways:
            ratios = [round(run[way] / run[other], 3) for run in seen]
            report[f"{way} / {'plain' if other == 0 else 'best'}"] = {
                "median": statistics.median(ratios),
                "runs": ratios,
            }
    print(f"{title}: {json.dumps(report)}", file=sys.stderr)
    return report


def one_run(
    ways: Iterable[Way], tokens: int, turn: int, start: Callable[[Way], Text], dice: random.Random
) -> dict[Way, float]:
    """Tokens per second of each way, over as many tokens."""
    texts = {way: start(way) for way in ways}
    first = {way: text.length() for way, text in texts.items()}
    seconds = dict.fromkeys(texts, 0.0)
    for target in range(turn, tokens + turn, turn):
        for way, text in dice.sample(sorted(texts.items(), key=str), len(texts)):
            started = time.perf_counter()
            while text.length() - first[way] < target:
                text.advance()
            seconds[way] += time.perf_counter() - started
    speeds = {way: (text.length() - first[way]) / seconds[way] for way, text in texts.items()}
    for text in texts.values():
        text.close()
    return speeds


def model_speeds(name: str, tokens: int, runs: int, lengths: list[int], threads: int | None) -> dict[str, object]:
    """A real pair, greedy and sampled, and the same target with a drafter that is never right."""
    with tempfile.TemporaryDirectory() as folder:
        place = locate(name, _note)
        wrong = shuffled(locate_drafter(name, place, "auto", _note), Path(folder) / "drafter")
        many = len(lengths) + 2
        pairs = [
            paceline.load(name, drafter=d, threads=threads, slots=many, notify=_note) for d in ("auto", str(wrong))
        ]
    suppressed = tuple(pairs[0].stop_ids)  # no text ends early
    samplings = {
        "greedy": replace(GREEDY, suppressed=suppressed),
        "sampled": SamplingParams(temperature=1.0, top_k=64, top_p=0.95, seed=1, suppressed=suppressed),
    }
    report: dict[str, object] = {"model": name, "isa": pairs[0].backend.info.device}
    for title, sampling in samplings.items():

        def start(engine: Engine, way: Way, sampling: SamplingParams = sampling) -> Text:
            info = engine.backend.info
            proposers = [GrammarProposer(), DraftControl(info.has_drafter, info.stops_early)]
            scheduler = Scheduler(engine.backend, proposers, engine.scheduler.chunk)
            drafts: DraftTokens = way if isinstance(way, int) else "auto"
            request = Request(sampling, max_tokens=1 << 20, draft_tokens=drafts)
            cold = replace(engine, scheduler=scheduler)
            sequence = cold.submit(engine.encode(PROMPT, raw=True), request, lambda _: None)
            while sequence.in_prefill:
                scheduler.tick()

            def close() -> None:
                scheduler.cancel(sequence)
                scheduler.sweep()

            return Text(lambda: len(sequence.tokens), scheduler.tick, close)

        report[title] = in_turns(
            [0, *lengths, "auto"], runs, tokens, TURN_OF_MODEL, partial(start, pairs[0]), f"{name}, {title}"
        )
        never = f"never right, {title}"
        report[never] = in_turns([0, "auto"], runs, tokens, TURN_OF_MODEL, partial(start, pairs[1]), f"{name}, {never}")
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
    pair: Pair, shares: Shares, then: Shares | None, tokens: int, runs: int, lengths: list[int]
) -> dict[str, object]:
    """Random weights of an official shape at a SIMULATED acceptance."""
    ways: list[Way] = [0, *lengths, "auto", "never right"]
    found = in_turns(
        ways,
        runs,
        tokens,
        TURN_OF_SHAPE,
        partial(simulated, pair.bench, shares, then),
        f"SIMULATED acceptance {shares}" + (f" and {then}, {BURST} tokens each" if then else ""),
    )
    return {**pair.report("drafting"), "acceptance": shares, "then": then, **found}


def simulated(bench: Bench, shares: Shares, then: Shares | None, way: Way) -> Text:
    """A text of random weights."""
    slot = bench.open_filled()
    bench.probe()
    found = () if way == "never right" else shares
    kind: Callable[..., SimulatedAcceptance] = Echo if way == COPY else SimulatedAcceptance
    if then and found:
        kind = partial(Bursts, turns=(shares, then))
    sequence, advance = bench.start_text(slot, way if isinstance(way, int) else None, found, kind)
    return Text(lambda: len(sequence.tokens), advance, lambda: bench.backend.close_slot(slot))


@dataclass
class Bursts(SimulatedAcceptance):
    """Another acceptance every `BURST` tokens, SIMULATED."""

    turns: tuple[Shares, ...] = ()

    def propose(self, sequence: Sequence, most: int) -> Draft | None:
        self.shares = self.turns[len(sequence.tokens) // BURST % len(self.turns)]
        return super().propose(sequence, most)


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


def echo_speeds(pair: Pair, shares: Shares, tokens: int, runs: int) -> dict[str, object]:
    """How much faster a copy is with prompt lookup than with the drafter alone."""
    seen = [
        one_run(("auto", COPY), tokens, TURN_OF_SHAPE, partial(simulated, pair.bench, shares, None), random.Random(run))
        for run in range(runs)
    ]
    medians = {str(way): round(statistics.median(run[way] for run in seen), 2) for way in seen[0]}
    ratios = [round(run[COPY] / run["auto"], 3) for run in seen]
    found = {"tokens_per_s": medians, "ratio": statistics.median(ratios), "runs": ratios, "acceptance": shares}
    print(f"SIMULATED copy: {json.dumps(found)}", file=sys.stderr)
    return {**pair.report("echo"), **found}


def shares_of(text: str) -> Shares:
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
    parser.add_argument("--then", type=shares_of, help=f"every other {BURST} tokens, SIMULATED")
    parser.add_argument("--echo", action="store_true", help="a text that copies, with --shape")
    parser.add_argument("--expert-overlap", type=float, help="of neighbouring rows, for a mixture; default: 0.3")
    parser.add_argument("--lengths", type=lengths_of, default="1,2,3,4,6,8")
    parser.add_argument("--tokens", type=int, default=500)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    lengths = arguments.lengths
    if (arguments.then or arguments.echo) and not arguments.shape:
        parser.error("--then and --echo are SIMULATED; add --shape")
    if arguments.expert_overlap is not None and not arguments.shape:
        parser.error("--expert-overlap is SIMULATED; add --shape")
    if arguments.then and arguments.echo:
        parser.error("--then and --echo exclude each other; give one")
    if arguments.shape:
        shares = arguments.acceptance
        room, slots = 512 + arguments.tokens + 64, 1 + len(lengths) + 3
        overlap = arguments.expert_overlap
        (pair,) = open_pairs(
            None, arguments.shape, arguments.quant, arguments.threads, "cpu", 512, room, overlap, slots=slots
        )
        if arguments.echo:
            report = echo_speeds(pair, shares, arguments.tokens, arguments.runs)
        else:
            report = shape_speeds(pair, shares, arguments.then, arguments.tokens, arguments.runs, lengths)
    else:
        report = model_speeds(arguments.model, arguments.tokens, arguments.runs, lengths, arguments.threads)
    print(json.dumps({"benchmark": "drafting", "tokens": arguments.tokens, **report}))


def _note(line: str) -> None:
    print(line, file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except (PacelineError, OSError) as error:
        sys.exit(f"drafting: {error}")
