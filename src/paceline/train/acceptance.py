"""How many drafts a pair accepts on held-out prompts, with a constant draft length and the engine that users have."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

from paceline.engine.engine import Engine
from paceline.sampling_params import or_official
from paceline.train.distill import DEPTH
from paceline.types import Generation, SamplingParams

STRETCH = 20  # tokens: a text that repeats as many is a loop, which any drafter is good at


@dataclass(frozen=True)
class Acceptance:
    """Sums over several texts."""

    texts: int = 0
    loops: int = 0  # texts left out because they repeat themselves
    rounds: int = 0
    tokens: int = 0  # that the rounds gave
    accepted: tuple[int, ...] = (0,) * DEPTH  # rounds in which the draft at depth 1, 2, ... was accepted

    def __add__(self, text: Generation) -> Acceptance:
        """With another text."""
        if repeats(text.tokens):
            return replace(self, texts=self.texts + 1, loops=self.loops + 1)
        found = text.statistics
        return Acceptance(
            texts=self.texts + 1,
            loops=self.loops,
            rounds=self.rounds + found.rounds,
            tokens=self.tokens + max(0, found.tokens - 1),
            accepted=tuple(map(sum, zip_longest(self.accepted, found.accepted_at_depth, fillvalue=0))),
        )

    @property
    def length(self) -> float:
        """Tokens a round, the target's own included."""
        return self.tokens / self.rounds if self.rounds else 1.0

    @property
    def by_depth(self) -> list[float]:
        """Share of the rounds in which the draft at depth 1, 2, ... was accepted."""
        return [count / self.rounds if self.rounds else 0.0 for count in self.accepted]

    def report(self) -> dict[str, Any]:
        """For JSON."""
        counts = {"texts": self.texts, "loops_left_out": self.loops, "rounds": self.rounds}
        return {"tokens_a_round": round(self.length, 4), "by_depth": [round(x, 4) for x in self.by_depth], **counts}


def measure(
    engine: Engine, prompts: Sequence[list[int]], max_tokens: int, seconds: float, progress: Callable[[int], None]
) -> dict[str, Acceptance]:
    """Greedy, and at the model's own sampling.

    Args:
        engine: a loaded pair.
        prompts: token ids.
        max_tokens: of each text.
        seconds: after which no further text is begun, greedy and sampled each.
        progress: told how many texts are done.
    """
    found, own = {}, or_official(engine.sampling)
    for done, (name, params) in enumerate({"greedy": replace(own, temperature=0.0), "sampled": own}.items()):

        def report(count: int, before: int = done * len(prompts)) -> None:
            progress(before + count)

        found[name] = acceptance(engine, prompts, params, max_tokens, seconds, report)
    return found


def acceptance(
    engine: Engine,
    prompts: Sequence[list[int]],
    params: SamplingParams,
    max_tokens: int,
    seconds: float = math.inf,
    progress: Callable[[int], None] = lambda _: None,
) -> Acceptance:
    """Acceptance over the continuations of prompts, each with its number as seed; see `measure`."""
    found, end = Acceptance(), time.monotonic() + seconds
    for number, prompt in enumerate(prompts):
        if number and time.monotonic() > end:
            break
        settings = {"sampling": replace(params, seed=number), "max_tokens": max_tokens}
        found += engine.generate(prompt, **settings, draft_tokens=DEPTH)
        progress(number + 1)
    return found


def repeats(tokens: Sequence[int], stretch: int = STRETCH) -> bool:
    """Whether a stretch of that many tokens comes twice."""
    stretches = [tuple(tokens[i : i + stretch]) for i in range(len(tokens) - stretch + 1)]
    return len(set(stretches)) < len(stretches)
