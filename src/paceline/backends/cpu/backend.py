"""A model pair on the CPU: the three verbs over the native code.

Holds slots and turns native complaints into `BackendError`. The weights' format is one of f32, bf16, q8 and q4; the
drafter's follows it, but never below q8. The KV cache is bf16, or f32 with f32 weights, which makes that the format to
compare with a reference.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np

from paceline import _cpu
from paceline.backends.cpu.load import Loader, load_drafter, load_target
from paceline.checkpoint import Tensors
from paceline.config import DrafterConfig, TargetConfig, check_pair
from paceline.errors import BackendError
from paceline.quant.blocks import FORMATS
from paceline.types import Anchors, Batch, Drafts, Output

DRAFTER_FORMAT = {"f32": "f32", "bf16": "bf16", "q8": "q8", "q4": "q8"}


class CpuBackend:
    """A loaded model pair and its KV memory; see `backends.base.Backend` for the verbs."""

    def __init__(
        self,
        target: tuple[TargetConfig, Tensors],
        drafter: tuple[DrafterConfig, Tensors] | None = None,
        *,
        quant: str,
        threads: int,
        context: int,
        slots: int = 1,
        max_rows: int = 256,
        isa: str = "",
        progress: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Load and pack the weights.

        Args:
            target: settings and checked tensors.
            drafter: the same of the drafter, or None for plain decoding.
            quant: f32, bf16, q8 or q4.
            threads: worker threads, the caller's included.
            context: positions a slot can hold.
            slots: sequences held at once.
            max_rows: most rows of one slot in one batch; sliding rings are that much longer than the window.
            isa: instruction set, empty for the best one.
            progress: called with the file bytes of every tensor packed.

        Raises:
            BackendError: an instruction set or a width that cannot be used here.
            PairError: the drafter is another target's.
            CheckpointError: a file ended early.
        """
        if quant not in FORMATS:
            raise BackendError(f"unknown weight format {quant!r}; use one of {', '.join(FORMATS)}")
        config, tensors = target
        if drafter:
            check_pair(config, drafter[0])
        if isa not in ("", *_cpu.usable_isas()):
            raise BackendError(f"no {isa} kernels on this processor; usable here: {', '.join(_cpu.usable_isas())}")
        loader = Loader(tensors, quant, progress)
        self.vocab_size = config.vocab_size
        self.context = context
        self.max_rows = max_rows
        self._target = _cpu.Target(
            load_target(config, loader),
            isa=isa,
            threads=threads,
            slots=slots,
            context=context,
            max_rows=max_rows,
            bf16_cache=quant != "f32",
        )
        self.weight_bytes = loader.weight_bytes
        self._drafter: _cpu.Drafter | None = None
        if drafter:
            loader = Loader(drafter[1], DRAFTER_FORMAT[quant], progress)
            self._drafter = _cpu.Drafter(load_drafter(drafter[0], loader), self._target)
            self.weight_bytes += loader.weight_bytes
        self._free = list(range(slots))[::-1]

    @property
    def can_draft(self) -> bool:
        return self._drafter is not None

    @property
    def isa(self) -> str:
        return self._target.isa

    @property
    def threads(self) -> int:
        return self._target.threads

    @threads.setter
    def threads(self, count: int) -> None:
        self._target.threads = count

    def open_slot(self) -> int:
        if not self._free:
            raise BackendError("all cache slots are taken; finish or cancel a sequence first")
        return self._free.pop()

    def close_slot(self, slot: int) -> None:
        self._target.clear(slot)
        self._free.append(slot)

    def forward(self, batch: Batch) -> Output:
        """See `Backend.forward`. The arrays returned are overwritten by the next call."""
        try:
            return Output(*self._target.forward(batch.slots, batch.positions, batch.tokens, batch.wanted))
        except ValueError as error:
            raise BackendError(f"a batch the caches cannot take: {error}") from error

    def draft(self, anchors: Anchors, depth: int) -> Drafts:
        if self._drafter is None:
            raise BackendError("no drafter is loaded")
        hidden = np.ascontiguousarray(anchors.hidden)
        try:
            return Drafts(*self._drafter.draft(anchors.slots, anchors.positions, anchors.tokens, hidden, depth))
        except ValueError as error:
            raise BackendError(f"anchors the caches cannot take: {error}") from error

    def truncate(self, slot: int, length: int) -> None:
        try:
            self._target.truncate(slot, length)
        except ValueError as error:
            raise BackendError(str(error)) from error


def default_threads() -> int:
    """Physical cores this process may run on: hyper-threads share the units that the kernels saturate."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = set()
    for cpu in allowed:
        try:
            with open(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") as file:
                cores.add(file.read().strip())
        except OSError:
            cores.add(str(cpu))
    return max(1, len(cores))
