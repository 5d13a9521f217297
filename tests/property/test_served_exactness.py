"""The contract under load: each request's text is what it is alone, whatever else runs at the same time."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest

import paceline
from paceline.checkpoint.location import ASSETS
from paceline.engine.engine import Engine, Request
from paceline.engine.sequence import Sequence
from paceline.types import Event, SamplingParams
from tests.fixtures.backends import DEVICE, examples

REQUESTS = examples(1000)
SOURCE = (ASSETS.parent / "errors.py").read_text() + (ASSETS.parent / "types.py").read_text()
PATTERNS = (
    "[a-z_]+ = [0-9]{1,4}\n",
    '\\{"a": (true|false), "b": \\[[0-9]{1,3}(, [0-9]{1,3}){0,3}\\]\\}',
    "(yes|no|[a-z]{3})+",
)


@dataclass(frozen=True)
class Asked:
    """One request, as it can be asked again."""

    tokens: tuple[int, ...]
    request: Request
    pattern: str | None


def asked(dice: random.Random, engine: Engine, earlier: list[Sequence]) -> Asked:
    """A request: a prefix that others have, too, or a next turn of an earlier one, and settings of its own."""
    shared = SOURCE[: dice.choice([0, 300, 900])]
    start = dice.randrange(len(SOURCE) - 200)
    tokens = engine.encode(shared + SOURCE[start : start + dice.randrange(1, 120)], raw=True)
    if earlier and dice.random() < 0.2:
        tokens = [*dice.choice(earlier[-20:]).tokens[:600], *tokens[1:40]]
    warm = dice.random() < 0.6
    sampling = SamplingParams(
        temperature=dice.choice([0.5, 1.0, 1.3]) if warm else 0.0,
        top_k=dice.choice([0, 64, 5]),
        top_p=dice.choice([1.0, 0.95]),
        repetition_penalty=dice.choice([1.0, 1.0, 1.2]),
        seed=dice.randrange(1 << 60),
    )
    stop = dice.choice([(), (), ("self", "\n\n")])
    request = Request(sampling, dice.randrange(1, 25), stop, dice.choice([0, 1, 3, 8, "auto", "auto"]))
    return Asked(tuple(tokens), request, dice.choice([None, None, None, *PATTERNS]))


def submit(engine: Engine, one: Asked, deliver: Callable[[Event], None], **changes: object) -> Sequence:
    grammar = engine.grammars.regex(one.pattern) if one.pattern else None
    return engine.submit(list(one.tokens), replace(one.request, grammar=grammar, **changes), deliver)


def drain(engine: Engine) -> None:
    while engine.scheduler.busy:
        engine.scheduler.tick()


@pytest.mark.parametrize("chunk", [16, 100])
def test_texts_do_not_depend_on_load(chunk: int) -> None:
    dice = random.Random(chunk)
    on = {"device": DEVICE}
    busy = paceline.load("tiny-python", slots=6, prompt_chunk=chunk, cache_memory=16 << 20, most_waiting=REQUESTS, **on)
    quiet = paceline.load("tiny-python", drafter="none", threads=1, **on)
    asks, sequences, heard = [], [], []
    for _ in range(REQUESTS // 2):
        one = asked(dice, busy, sequences)
        asks.append(one)
        heard.append([])
        sequences.append(submit(busy, one, heard[-1].append))
        for _ in range(dice.randrange(8)):
            busy.scheduler.tick()
        if dice.random() < 0.1:
            busy.scheduler.cancel(dice.choice(sequences[-6:]))
    drain(busy)
    compared = 0
    for one, mine, events in zip(asks, sequences, heard, strict=True):
        texts: list[str] = []
        alone = submit(quiet, one, lambda event, texts=texts: texts.append(event.text), draft_tokens=0)
        drain(quiet)
        whole, got = "".join(texts), "".join(event.text for event in events)
        assert mine.generated == alone.generated[: len(mine.generated)]
        if mine.finish != "cancelled":
            assert (got, mine.finish) == (whole, alone.finish)
            compared += 1
        else:
            assert whole.startswith(got)
    assert compared > 0.8 * REQUESTS / 2
    cached = np.array([s.statistics.cached_tokens for s in sequences])
    assert (cached > 0).mean() > 0.2  # cached prefixes were used
    assert sum(s.statistics.accepted for s in sequences) > REQUESTS / 4  # drafts were accepted
    assert busy.scheduler.prefix_cache.nbytes <= 16 << 20
