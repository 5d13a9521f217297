"""What a backend does for the engine: one step of a model pair over slots of KV cache.

A backend loads a target and perhaps a drafter, owns the KV cache, the hidden states and the sampler, and knows nothing
of text or requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from paceline.types import BackendInfo, Result, Work


class Snapshot(Protocol):
    """A copy of a slot's KV cache."""

    @property
    def nbytes(self) -> int: ...

    @property
    def length(self) -> int:
        """Positions it holds."""

    @property
    def shortest(self) -> int:
        """The shortest length that a slot can be truncated to after it was restored: sliding rings forget."""


class Backend(Protocol):
    """A loaded model pair and its KV cache."""

    @property
    def info(self) -> BackendInfo:
        """Sizes, format and device."""

    threads: int
    """Processor threads; results do not depend on how many."""

    def open_slot(self) -> int:
        """Reserve an empty KV cache and return its number.

        Raises:
            BackendError: all slots are taken.
        """

    def close_slot(self, slot: int) -> None:
        """Free a slot."""

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

    def truncate(self, slot: int, length: int) -> None:
        """Forget all positions from `length` on. The hidden state stays as it is, which only drafts can show.

        Raises:
            BackendError: the slot is shorter than that, or its sliding rings no longer hold what `length` needs.
        """

    def save(self, slot: int) -> Any:
        """Copy a slot's KV cache: a `Snapshot` for `restore` of the same backend."""

    def restore(self, slot: int, snapshot: Any) -> None:
        """Fill an empty slot with a snapshot."""
