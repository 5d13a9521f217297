"""Text that must fit a JSON schema: plain, with the drafter, and with what the grammar forces drafted, too.

    python bench/grammar.py --model tiny-python

The texts are the same in all ways, which is checked. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import time

import paceline
from paceline.engine.engine import Request
from paceline.text.grammar import GrammarMatcher
from paceline.types import SamplingParams

SCHEMA = {
    "type": "object",
    "properties": {
        "first_name": {"enum": ["anna", "bert"]},
        "street_address": {"type": "string", "maxLength": 12},
        "postal_code": {"type": "integer", "maximum": 99999},
        "is_registered_customer": {"type": "boolean"},
        "preferred_language": {"enum": ["english", "german"]},
    },
    "required": ["first_name", "street_address", "postal_code", "is_registered_customer", "preferred_language"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}


class Quiet:
    """A constraint that does not tell what it forces."""

    def __init__(self, constraint: GrammarMatcher) -> None:
        self._constraint = constraint

    def __getattr__(self, name: str) -> object:
        return getattr(self._constraint, name)

    def forced(self) -> tuple[int, ...]:
        return ()


def write(engine: paceline.Engine, constraint: GrammarMatcher, depth: object, seed: int) -> tuple[str, float, int, int]:
    """A text, its seconds, tokens and rounds."""
    sampling = SamplingParams(1.0, 64, 0.95, seed=seed)
    request = Request(sampling, max_tokens=300, draft_tokens=depth, grammar=constraint)
    prompt, texts = engine.encode("address = ", raw=True), []
    started = time.perf_counter()
    sequence = engine.submit(prompt, request, lambda event: texts.append(event.text))
    while engine.scheduler.busy:
        engine.scheduler.tick()
    seconds = time.perf_counter() - started
    return "".join(texts), seconds, len(sequence.generated), sequence.statistics.rounds


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="tiny-python")
    parser.add_argument("--quant", default="auto")
    parser.add_argument("--texts", type=int, default=60)
    arguments = parser.parse_args()
    engine = paceline.load(arguments.model, quant=arguments.quant)
    whole = engine.grammars.json_schema(SCHEMA)
    ways = {"plain": (Quiet, 0), "drafter": (Quiet, "auto"), "drafter and grammar": (GrammarMatcher.copy, "auto")}
    seen: dict[str, list[tuple[str, float, int, int]]] = {way: [] for way in ways}
    for seed in range(arguments.texts):
        for way, (kind, depth) in ways.items():
            seen[way].append(write(engine, kind(whole.copy()), depth, seed))
    assert len({tuple(text for text, *_ in runs) for runs in seen.values()}) == 1, "the texts differ"
    report: dict[str, object] = vars(arguments)
    for way, runs in seen.items():
        seconds, tokens, rounds = (sum(run[i] for run in runs[1:]) for i in (1, 2, 3))  # type: ignore[misc]
        report[way] = {"tokens_per_s": round(tokens / seconds, 1), "tokens_a_round": round(tokens / rounds, 2)}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
