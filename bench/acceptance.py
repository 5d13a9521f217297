"""How often the first draft is accepted, by the rule and by how drafts are drawn.

    python bench/acceptance.py --model tiny-python

Prompts are places in those files of Python's standard library that `tiny-python` was not trained on. Prints a table on
stderr and one JSON line on stdout. `coupled` is what the engine does; `coupled, drafter untruncated` leaves top-k and
top-p to the target alone; `arg-max drafts` is what engines do that draft greedily; `rejection` is the ratio test.
Needs PyTorch, because the split into files is the training's.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace

import paceline
from paceline.backends.base import Backend
from paceline.decode.rules import RULES
from paceline.engine.cost_model import Silent
from paceline.engine.sequence import Sequence
from paceline.engine.step import step
from paceline.train.data import standard_library
from paceline.types import Anchors, Drafts, SamplingParams

PROMPT = 200  # tokens
STRETCH = 64  # tokens written behind each prompt
SETTINGS = {
    "temperature 1, top-k 64, top-p 0.95": SamplingParams(1.0, 64, 0.95),
    "temperature 1": SamplingParams(1.0),
    "temperature 0.7, top-k 64, top-p 0.95": SamplingParams(0.7, 64, 0.95),
}
Change = Callable[[SamplingParams], SamplingParams]
WAYS: dict[str, tuple[str, Change]] = {
    "rejection": ("rejection", lambda s: s),
    "coupled": ("coupled", lambda s: s),
    "coupled, drafter untruncated": ("coupled", lambda s: replace(s, top_k=0, top_p=1.0)),
    "arg-max drafts": ("coupled", lambda s: replace(s, temperature=0.0)),
}


class OtherDraws:
    """A backend whose drafter draws with other settings than the target."""

    def __init__(self, backend: Backend, change: Change) -> None:
        self._backend, self._change = backend, change

    def __getattr__(self, name: str) -> object:
        return getattr(self._backend, name)

    def draft(self, anchors: Anchors) -> Drafts:
        return self._backend.draft(replace(anchors, samplings=tuple(map(self._change, anchors.samplings))))


def prompts(engine: paceline.Engine, count: int) -> list[list[int]]:
    """Stretches of held-out source, taken in turn from its files, each place once."""
    texts = [engine.encode(text, raw=True) for text in standard_library().held_out.values()]
    places = [(i * 397, text) for i in range(100) for text in texts]
    return [text[at : at + PROMPT] for at, text in places if at + PROMPT <= len(text)][:count]


def measure(engine: paceline.Engine, sampling: SamplingParams, way: str, rounds: int, depth: int) -> dict[str, object]:
    """Shares of rounds whose draft at depth 1, 2, ... was accepted, and their count."""
    name, change = WAYS[way]
    backend = OtherDraws(engine.backend, change)
    accepted, by_prompt = [0] * depth, []
    for seed, prompt in enumerate(prompts(engine, 1000)):
        sequence = Sequence(
            tokens=list(prompt),
            rule=RULES[name](replace(sampling, seed=seed), engine.backend),
            draft_tokens=depth,
            max_tokens=1 << 30,  # no round is shortened
            limit=engine.backend.info.context,
            stop_ids=frozenset(),
            detokenizer=Silent(),
            slot=engine.backend.open_slot(),
        )
        while len(sequence.generated) < STRETCH:
            step(backend, [sequence], engine.scheduler.chunk)  # type: ignore[arg-type]
        engine.backend.close_slot(sequence.slot)
        at_depth = sequence.statistics.accepted_at_depth
        accepted = [a + b for a, b in zip(accepted, at_depth, strict=True)]
        by_prompt.append((sequence.statistics.rounds, at_depth[0]))
        if sum(count for count, _ in by_prompt) >= rounds:
            break
    done = sum(count for count, _ in by_prompt)
    shares = [count / done for count in accepted]
    # Rounds behind one prompt are alike, so prompts are the sample.
    error = sum((first - shares[0] * count) ** 2 for count, first in by_prompt) ** 0.5 / done
    return {"rounds": done, "by_depth": shares, "standard_error": error}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-python")
    parser.add_argument("--rounds", type=int, default=12000, help="rounds of each way and setting")
    parser.add_argument("--draft-tokens", type=int, default=3)
    options = parser.parse_args()
    engine = paceline.load(options.model, draft_tokens=options.draft_tokens)
    found = {
        setting: {way: measure(engine, sampling, way, options.rounds, options.draft_tokens) for way in WAYS}
        for setting, sampling in SETTINGS.items()
    }
    for setting, ways in found.items():
        print(setting, file=sys.stderr)
        for way, result in ways.items():
            shares = "  ".join(f"{share:.3f}" for share in result["by_depth"])
            error = f"{result['rounds']} rounds, standard error {result['standard_error']:.3f}"
            print(f"  {way:30} {shares}   ({error})", file=sys.stderr)
    print(json.dumps({"model": options.model, "draft_tokens": options.draft_tokens, "acceptance": found}))


if __name__ == "__main__":
    main()
