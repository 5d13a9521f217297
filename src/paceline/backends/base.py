"""What a backend does for the engine: three verbs over slots of KV memory.

A backend loads a target and perhaps a drafter, owns the KV cache, and knows nothing of text or requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from paceline.types import Anchors, BackendInfo, Batch, Drafts, Output, Result, Row, SamplingParams, Work


class Snapshot(Protocol):
    """The rows of a slot at one moment, in memory of their own."""

    @property
    def nbytes(self) -> int: ...

    @property
    def length(self) -> int:
        """Positions it holds."""

    @property
    def shortest(self) -> int:
        """The shortest length that a slot can be truncated to after it was restored: sliding rings forget."""


class Backend(Protocol):
    """A loaded model pair and its KV memory."""

    @property
    def info(self) -> BackendInfo:
        """Sizes, formats and device."""

    def run(self, works: Sequence[Work]) -> list[Result]:
        """One step: propose, run one pass of the target, sample and accept, roll back rejected rows.

        Args:
            works: of different slots, at least one.

        Returns:
            A result for each work. A row's logits, and so its tokens, depend on the slot's tokens alone: not on the
            other works, on drafts, on chunks of the prompt or on threads. A drafter continues from the target's hidden
            state at the slot's last accepted row, which the backend keeps.

        Raises:
            BackendError: a work that does not continue its slot's cache, or does not fit it.
        """

    @property
    def vocab_size(self) -> int: ...

    @property
    def context(self) -> int:
        """Positions a slot can hold."""

    @property
    def max_rows(self) -> int:
        """Most rows of one slot in one batch: the largest prompt chunk and the largest verification."""

    @property
    def slots(self) -> int:
        """Sequences held at once."""

    @property
    def can_draft(self) -> bool:
        """Whether a drafter is loaded."""

    @property
    def stops_early(self) -> bool:
        """Whether drafting stops at the floors of a plan; else it goes to the plan's depth."""

    def open_slot(self) -> int:
        """Reserve an empty cache and return its number.

        Raises:
            BackendError: all slots are taken.
        """

    def close_slot(self, slot: int) -> None:
        """Give a cache back."""

    def forward(self, batch: Batch) -> Output:
        """Run all rows through the target, append their keys and values to the caches, return the wanted rows."""

    def draft(self, anchors: Anchors) -> Drafts:
        """Guess the next tokens of each anchor from the target's cache below the anchor's position."""

    def draw(self, logits: Row, sampling: SamplingParams, position: int) -> int:
        """The same token as `decode.sampler.draw`, faster."""

    def allowed(self, logits: Row, sampling: SamplingParams) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """The same tokens and weights as `decode.sampler.allowed` in any order, faster; temperature above 0."""

    def truncate(self, slot: int, length: int) -> None:
        """Forget all positions from `length` on.

        Raises:
            BackendError: the slot is shorter than that, or its sliding rings no longer hold what `length` needs.
        """


class Copies(Protocol):
    """A backend whose slots can be copied."""

    def save(self, slot: int) -> Any:
        """Copy a slot's rows: a `Snapshot` for `restore` of the same backend."""

    def restore(self, slot: int, snapshot: Any) -> None:
        """Fill an empty slot with the rows of a snapshot."""

    def truncate(self, slot: int, length: int) -> None:
        """See `Backend.truncate`."""
