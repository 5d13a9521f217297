"""How often the first draft is accepted, by the rule and by how drafts are drawn.

    python bench/acceptance.py --model tiny-python

Prompts are places in Python's standard library. Prints a table on stderr and one JSON line on stdout. `coupled` is what
the engine does; `coupled, drafter untruncated` leaves top-k and top-p to the target alone; `arg-max drafts` is what
engines do that draft greedily; `rejection` is the ratio test.
"""

from __future__ import annotations

import argparse
import json
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import paceline
from paceline.backends.base import Backend
from paceline.decode.rules import RULES
from paceline.engine.sequence import Sequence
from paceline.engine.step import step
from paceline.types import Anchors, Drafts, Sampling

MODULES = ("argparse", "ast", "bdb", "cmd", "csv", "difflib", "dis", "doctest", "enum", "ftplib", "gzip", "imaplib")
PROMPT = 200  # tokens
STRETCH = 64  # tokens written behind each prompt
SETTINGS = {
    "temperature 1, top-k 64, top-p 0.95": Sampling(1.0, 64, 0.95),
    "temperature 1": Sampling(1.0),
    "temperature 0.7, top-k 64, top-p 0.95": Sampling(0.7, 64, 0.95),
}
Change = Callable[[Sampling], Sampling]
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


class Ids:
    """A decoder for measurements: ids stay ids."""

    def push(self, token: int) -> str:
        return ""

    def finish(self) -> str:
        return ""


def prompts(engine: paceline.Engine, count: int) -> list[list[int]]:
    """Stretches of the library's source, taken in turn from its modules, each place once."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    texts = [engine.encode((folder / f"{name}.py").read_text(encoding="utf8"), raw=True) for name in MODULES]
    places = [(i * 997, text) for i in range(count) for text in texts]
    return [text[at : at + PROMPT] for at, text in places if at + PROMPT <= len(text)][:count]


def measure(engine: paceline.Engine, sampling: Sampling, way: str, rounds: int, depth: int) -> dict[str, object]:
    """Shares of rounds whose draft at depth 1, 2, ... was accepted, and their count."""
    name, change = WAYS[way]
    backend = OtherDraws(engine.backend, change)
    done, accepted = 0, [0] * depth
    for seed, prompt in enumerate(prompts(engine, 1000)):
        sequence = Sequence(
            tokens=list(prompt),
            rule=RULES[name](replace(sampling, seed=seed), engine.backend.draw),
            draft_tokens=depth,
            max_tokens=STRETCH,
            limit=engine.backend.context,
            stop_ids=frozenset(),
            detokenizer=Ids(),
            slot=engine.backend.open_slot(),
        )
        while sequence.finish is None:
            step(backend, [sequence], engine.scheduler.chunk)  # type: ignore[arg-type]
        engine.backend.close_slot(sequence.slot)
        done += sequence.statistics.rounds
        for i, count in enumerate(sequence.statistics.accepted_at_depth):
            accepted[i] += count
        if done >= rounds:
            break
    shares = [count / done for count in accepted]
    return {"rounds": done, "by_depth": shares, "standard_error": (shares[0] * (1 - shares[0]) / done) ** 0.5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-python")
    parser.add_argument("--rounds", type=int, default=4000, help="rounds of each way and setting")
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
            print(f"  {way:30} {shares}   ({result['rounds']} rounds)", file=sys.stderr)
    print(json.dumps({"model": options.model, "draft_tokens": options.draft_tokens, "acceptance": found}))


if __name__ == "__main__":
    main()
