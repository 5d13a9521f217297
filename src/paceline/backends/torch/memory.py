"""The KV cache of every slot in tensors of fixed size, laid out as the CPU backend's.

Full-attention layers keep every position. Sliding layers keep a ring of the window and the most rows a pass may add, so
that a rejected row never overwrites one that is still visible.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from paceline.backends.torch import ops
from paceline.config import TargetConfig
from paceline.errors import BackendError
from paceline.models.gemma4 import Block

KeysValues = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class TorchSnapshot:
    """See `backends.base.Snapshot`."""

    rows: dict[int, KeysValues]  # per layer [kv_heads, ring or length, head_dim]
    length: int
    high: int
    shortest: int

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for pair in self.rows.values() for part in pair)


class SlotMemory:
    """KV cache of all slots.

    Args:
        config: of the target.
        slots: how many.
        context: positions a slot can hold.
        max_rows: most rows one pass may add to a slot.
        dtype: of the tensors.
        device: of the tensors.
    """

    def __init__(
        self, config: TargetConfig, slots: int, context: int, max_rows: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._context, self._window = context, config.sliding_window
        self._ring = min(context, config.sliding_window + max_rows)
        self.length = [0] * slots
        self._high = [0] * slots  # one past the highest position ever written
        self.rows: dict[int, KeysValues] = {}  # per layer [slots, kv_heads, ring or context, head_dim]
        for index, layer in enumerate(config.layers):
            if layer.kv_source != index:
                continue
            shape = (slots, layer.kv_heads, self._ring if layer.sliding else context, layer.head_dim)
            self.rows[index] = (
                torch.zeros(shape, dtype=dtype, device=device),
                torch.zeros(shape, dtype=dtype, device=device),
            )

    def extend(self, slot: int, length: int) -> None:
        """A pass has written rows up to `length`."""
        self.length[slot] = length
        self._high[slot] = max(self._high[slot], length)

    def truncate(self, slot: int, length: int) -> None:
        """Forget all positions from `length` on; see `Backend.truncate`."""
        if not 0 <= length <= self.length[slot]:
            raise BackendError(f"cannot truncate a cache of {self.length[slot]} rows to {length}")
        if length < self._shortest(slot):
            raise BackendError(f"cannot roll back to {length}: the sliding rings hold only {self._ring} rows")
        self.length[slot] = length

    def clear(self, slot: int) -> None:
        """Empty a slot."""
        self.length[slot] = self._high[slot] = 0

    def save(self, slot: int) -> TorchSnapshot:
        """Copy a slot's rows."""
        high = self._high[slot]
        rows = {
            layer: (keys[slot, :, :high].clone(), values[slot, :, :high].clone())
            for layer, (keys, values) in self.rows.items()
        }
        return TorchSnapshot(rows, self.length[slot], high, self._shortest(slot))

    def restore(self, slot: int, snapshot: TorchSnapshot) -> None:
        """Fill an empty slot."""
        if self.length[slot]:
            raise BackendError(f"slot {slot} is not empty")
        for layer, pair in snapshot.rows.items():
            for kept, part in zip(self.rows[layer], pair, strict=True):
                kept[slot, :, : part.shape[1]] = part
        self.length[slot], self._high[slot] = snapshot.length, snapshot.high

    def _shortest(self, slot: int) -> int:
        rolls = self._ring < self._context and self._high[slot] > self._ring
        return min(self.length[slot], self._high[slot] - self._ring + self._window) if rolls else 0


@dataclass(frozen=True)
class SlotRows:
    """Rows of a pass over the caches of their slots; see `models.gemma4.KeysValues`."""

    caches: dict[int, KeysValues]  # see `SlotMemory.rows`
    slots: Tensor  # [M]
    last: Tensor  # [M]
    span: int  # more than any position

    def heads(self, block: Block, x: Tensor, angles: tuple[Tensor, Tensor], heads: int, eps: float) -> Tensor:
        cache = self.caches[block.kv_source]
        at = self.slots, self.last
        norms = block.query_norm, block.key_norm
        queries: Tensor = ops.heads(x, *norms, *angles, *cache, *at, heads, eps, block.value_norm)
        return queries

    def attend(self, block: Block, queries: Tensor, window: int) -> Tensor:
        cache = self.caches[block.kv_source]
        mixed: Tensor = ops.attend(queries, *cache, self.slots, self.last, window, self.span)
        return mixed

    def picked(self, numbers: Tensor) -> SlotRows:
        at = numbers.clamp(min=0)
        return SlotRows(self.caches, self.slots[at], torch.where(numbers < 0, -1, self.last[at]), self.span)
