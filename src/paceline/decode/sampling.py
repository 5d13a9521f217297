"""How a token is drawn from logits, as frozen strategies with one method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from paceline.types import Float32


class Sampling(Protocol):
    """A rule that turns one row of logits into a token; a pure function of its arguments and its own settings."""

    def draw(self, logits: Float32, position: int) -> int:
        """The token at absolute `position`, from the logits [vocabulary] of the row before it."""


@dataclass(frozen=True)
class Greedy:
    """The most likely token; of equals the lowest id."""

    def draw(self, logits: Float32, position: int) -> int:
        return int(logits.argmax())
