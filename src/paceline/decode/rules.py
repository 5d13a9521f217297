"""How drafts are accepted, as frozen strategies with one method: the token that stands at a position.

`Coupled` is exact in a strong sense: the token is the target's own draw, whatever was drafted. The drafter uses the
same noise for each token, so its guess coincides with the target's draw as often as a coupling without communication
allows (Daliri, Musco and Suresh, "Coupling without Communication and Drafter-Invariant Speculative Decoding", arXiv
2408.07978).

`Rejection` is exact in distribution only: the ratio test of Leviathan, Kalman and Matias, "Fast Inference from
Transformers via Speculative Decoding", arXiv 2211.17192. The text then depends on what was drafted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from paceline.decode.sampler import allowed, draw, gumbel, uniform_bits
from paceline.decode.sampling_params import History, adjusted
from paceline.types import GREEDY, Line, Row, SamplingParams

TARGET_STREAM, DRAFTER_STREAM, TEST_STREAM = range(3)  # of the noise

Lister = Callable[[Row, SamplingParams], tuple[NDArray[np.int32], NDArray[np.int64]]]
"""Lists the tokens that can be drawn, with their weights: `decode.sampler.allowed`, or a backend's faster twin of it."""

Drawer = Callable[[Row, SamplingParams, int], int]
"""Draws the token at a position from logits [vocabulary]: `decode.sampler.draw`, or a backend's faster twin of it."""


class Rule(Protocol):
    """What verification asks of a strategy."""

    @property
    def sampling(self) -> SamplingParams: ...
    @property
    def stream(self) -> int:
        """The stream of the drafter's noise."""

    @property
    def with_logits(self) -> bool:
        """Whether the drafter's logits are needed."""

    def settle(self, logits: Row, position: int, history: History, line: Line, depth: int) -> int:
        """The token at `position`.

        Args:
            logits: [vocabulary] of the row before it, as the target gave them.
            position: absolute position of the token.
            history: what was committed before it.
            line: what was drafted.
            depth: index of the draft at this position; the line's length where none was drafted.
        """


@dataclass(frozen=True)
class Coupled:
    """The target's own draw. A draft is accepted when it is equal."""

    sampling: SamplingParams = GREEDY
    drawer: Drawer = draw
    stream: ClassVar[int] = TARGET_STREAM
    with_logits: ClassVar[bool] = False

    def settle(self, logits: Row, position: int, history: History, line: Line, depth: int) -> int:
        return self.drawer(adjusted(logits, self.sampling, history), self.sampling, position)


@dataclass(frozen=True)
class Rejection:
    """A draft x is accepted with probability min(1, p(x) / q(x)); else the token is drawn from the rest, p - q."""

    sampling: SamplingParams = GREEDY
    drawer: Drawer = draw
    lister: Lister = allowed
    stream: ClassVar[int] = DRAFTER_STREAM
    with_logits: ClassVar[bool] = True

    def settle(self, logits: Row, position: int, history: History, line: Line, depth: int) -> int:
        s = self.sampling
        logits = adjusted(logits, s, history)
        if depth == len(line.tokens) or s.temperature == 0:
            return self.drawer(logits, s, position)
        assert line.logits is not None
        p, q = (probabilities(row, s, self.lister) for row in (logits, line.logits[depth]))
        draft = line.tokens[depth]
        bits = uniform_bits(s.seed or 0, TEST_STREAM, position, np.zeros(1, np.int32))[0]
        if (float(bits) + 0.5) / 2**32 * q[draft] < p[draft]:
            return draft
        rest = np.maximum(p - q, 0)
        ids = np.flatnonzero(rest)
        if not len(ids):  # p = q but for rounding
            return draft
        noise = gumbel(s.seed or 0, TARGET_STREAM, position, ids.astype(np.int32))
        return int(ids[(np.log(rest[ids]) + noise).argmax()])


def probabilities(logits: Row, sampling: SamplingParams, lister: Lister = allowed) -> NDArray[np.float64]:
    """The distribution [vocabulary] that tokens are drawn from at a temperature above 0."""
    ids, weights = lister(logits, sampling)
    p = np.zeros(len(logits))
    p[ids] = weights / weights.sum()
    return p


class Draws(Protocol):
    """A backend, as far as rules need it."""

    def draw(self, logits: Row, sampling: SamplingParams, position: int) -> int: ...
    def allowed(self, logits: Row, sampling: SamplingParams) -> tuple[NDArray[np.int32], NDArray[np.int64]]: ...


RULES: dict[str, Callable[[SamplingParams, Draws], Rule]] = {
    "coupled": lambda sampling, backend: Coupled(sampling, backend.draw),
    "rejection": lambda sampling, backend: Rejection(sampling, backend.draw, backend.allowed),
}
