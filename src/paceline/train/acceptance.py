"""How many drafts a pair accepts on held-out prompts, with a constant draft length and the engine that users have."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from paceline.engine.engine import Engine, Request
from paceline.train.distill import DEPTH
from paceline.train.texts import sampling_of
from paceline.types import Event, SamplingParams

STRETCH = 20  # tokens: a text that repeats as many is a loop, which any drafter is good at


@dataclass(frozen=True)
class Acceptance:
    """Counts over several texts."""

    texts: int
    loops: int  # texts left out because they repeat themselves
    rounds: int  # in which DEPTH tokens were drafted
    accepted: tuple[int, ...]  # [DEPTH] rounds in which the draft at that depth was accepted

    @property
    def length(self) -> float:
        """Tokens a round, the target's own included."""
        return 1 + sum(self.accepted) / self.rounds if self.rounds else 1.0

    @property
    def by_depth(self) -> list[float]:
        """Share of the rounds in which the draft at depth 1, 2, ... was accepted."""
        return [round(count / self.rounds, 4) if self.rounds else 0.0 for count in self.accepted]

    def report(self) -> dict[str, Any]:
        """For JSON."""
        counts = {"texts": self.texts, "loops_left_out": self.loops, "rounds": self.rounds}
        return {"tokens_a_round": round(self.length, 4), "by_depth": self.by_depth, **counts}


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
    found, own = {}, sampling_of(engine)
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
    texts, loops, rounds, accepted = 0, 0, 0, [0] * DEPTH
    end = time.monotonic() + seconds
    for number, prompt in enumerate(prompts):
        if number and time.monotonic() > end:
            break
        mine, at_depth = 0, [0] * DEPTH
        events: list[Event | Exception] = []
        request = Request(replace(params, seed=number), max_tokens, draft_tokens=DEPTH)
        sequence = engine.submit(prompt, request, events.append)
        while not sequence.finish:
            engine.scheduler.tick()
        for event in events:
            if isinstance(event, Exception):
                raise event
            if event.drafted == DEPTH:
                mine += 1
                for depth in range(event.accepted):
                    at_depth[depth] += 1
        texts += 1
        if repeats(sequence.generated):
            loops += 1
        else:
            rounds += mine
            accepted = [a + b for a, b in zip(accepted, at_depth, strict=True)]
        progress(number + 1)
    return Acceptance(texts, loops, rounds, tuple(accepted))


def repeats(tokens: Sequence[int], stretch: int = STRETCH) -> bool:
    """Whether a stretch of that many tokens comes twice."""
    stretches = [tuple(tokens[i : i + stretch]) for i in range(len(tokens) - stretch + 1)]
    return len(set(stretches)) < len(stretches)
