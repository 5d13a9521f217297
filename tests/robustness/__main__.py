"""`python -m tests.robustness`: many mutated model files, each in a process of its own.

Prints how many of each kind were loaded right or refused with one line, and everything else in full. Exit code 1 if
there was anything else. The same seeds give the same cases.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path

from tests.robustness import cases
from tests.robustness.mutators import MUTATORS


def kinds_of(count: int, kinds: list[str]) -> list[tuple[str, int]]:
    """(kind, seed) of the first `count` cases, kinds by their shares and mixed evenly."""
    shares = [MUTATORS[kind][0] for kind in kinds]
    ends = list(accumulate(shares))
    seeds: Counter[str] = Counter()
    chosen = []
    for number in range(count):
        at = number * 61 % ends[-1]  # 61 has no common divisor with the sum of all shares
        kind = next(kind for kind, end in zip(kinds, ends, strict=True) if at < end)
        chosen.append((kind, seeds[kind]))
        seeds[kind] += 1
    return chosen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first case of each kind")
    parser.add_argument("--kind", action="append", choices=list(MUTATORS))
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    chosen = kinds_of(options.cases, options.kind or list(MUTATORS))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        known = cases.prepare(root)
        outcomes = [o for part in _parts(options.jobs, chosen, options.first, root, known) for o in part]
    return _report(outcomes)


def _parts(
    jobs: int, chosen: list[tuple[str, int]], first: int, root: Path, known: list[int]
) -> list[list[cases.Outcome]]:
    """The outcomes of each job, a process that has no threads."""
    files, children = [], []
    for job in range(jobs):
        files.append(root / f"outcomes-{job}.jsonl")
        child = os.fork()
        if child == 0:
            with files[-1].open("w") as file:
                for kind, seed in chosen[job::jobs]:
                    outcome = cases.run(kind, first + seed, root, known)
                    file.write(json.dumps(asdict(outcome)) + "\n")
                    if not outcome.good:
                        print(f"{outcome.kind} {outcome.seed}: {outcome.result}: {outcome.message}", flush=True)
            os._exit(0)
        children.append(child)
    for child in children:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    return [[cases.Outcome(**json.loads(line)) for line in path.read_text().splitlines()] for path in files]


def _report(outcomes: list[cases.Outcome]) -> int:
    results = ("right", "refused", "exception", "text", "message", "signal", "hang", "memory")
    print(f"{'kind':20}" + "".join(f"{name:>10}" for name in ("cases", *results, "slowest")))
    for kind in MUTATORS:
        of_kind = [outcome for outcome in outcomes if outcome.kind == kind]
        if of_kind:
            counts = Counter(outcome.result for outcome in of_kind)
            cells = [len(of_kind), *(counts[result] for result in results)]
            print(f"{kind:20}" + "".join(f"{n:>10}" for n in cells) + f"{max(o.seconds for o in of_kind):>9.2f}s")
    bad = sum(not outcome.good for outcome in outcomes)
    print(json.dumps({"cases": len(outcomes), "bad": bad}))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
