"""A model pair on the CPU: the three verbs over the native code.

Holds slots and turns native complaints into `BackendError`. The KV cache is bf16, or f32 with f32 weights, which makes
that the format to compare with a reference.
"""

from __future__ import annotations

import os

import numpy as np
from numpy.typing import NDArray

from paceline import _cpu
from paceline.backends import native_sampler
from paceline.backends.cpu.load import load_drafter, load_target
from paceline.backends.cpu.weights import Weights
from paceline.config import DrafterConfig, TargetConfig, check_pair
from paceline.errors import BackendError
from paceline.types import CONFIDENCE_BINS, Anchors, Batch, Drafts, Output, Row, SamplingParams


class CpuBackend:
    """A loaded model pair and its KV memory; see `backends.base.Backend` for the verbs."""

    def __init__(
        self,
        target: tuple[TargetConfig, Weights],
        drafter: tuple[DrafterConfig, Weights] | None = None,
        *,
        threads: int,
        context: int,
        slots: int = 1,
        max_rows: int = 256,
        isa: str = "",
    ) -> None:
        """Load the weights.

        Args:
            target: settings and weights.
            drafter: the same of the drafter, or None for plain decoding.
            threads: worker threads, the caller's included.
            context: positions a slot can hold.
            slots: sequences held at once.
            max_rows: most rows of one slot in one batch; sliding rings are that much longer than the window.
            isa: instruction set, empty for the best one.

        Raises:
            BackendError: an instruction set or a width that cannot be used here.
            PairError: the drafter is another target's.
            CheckpointError: a file ended early.
        """
        config, weights = target
        if drafter:
            check_pair(config, drafter[0])
        if isa not in ("", *_cpu.usable_isas()):
            raise BackendError(f"no {isa} kernels on this processor; usable here: {', '.join(_cpu.usable_isas())}")
        self.vocab_size = config.vocab_size
        self.context = context
        self.max_rows = max_rows
        self.slots = slots
        loaded = load_target(config, weights)
        try:
            self._target = _cpu.Target(
                loaded,
                isa=isa,
                threads=threads,
                slots=slots,
                context=context,
                max_rows=max_rows,
                bf16_cache=weights.quant != "f32",
            )
        except RuntimeError as error:  # std::system_error
            raise BackendError(f"cannot start {threads} threads ({error}); use fewer") from error
        self._drafter = _cpu.Drafter(load_drafter(*drafter), self._target) if drafter else None
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

    stops_early = True

    def draft(self, anchors: Anchors) -> Drafts:
        if self._drafter is None:
            raise BackendError("no drafter is loaded")
        depth = max(plan.depth for plan in anchors.plans)
        floors = acceptance = None
        if any(plan.floors for plan in anchors.plans):
            floors = np.zeros((len(anchors.plans), depth), np.float32)
            acceptance = np.ones((len(anchors.plans), CONFIDENCE_BINS), np.float32)
            for row, plan in enumerate(anchors.plans):
                if plan.floors:
                    floors[row, : plan.depth] = plan.floors
                    acceptance[row] = plan.acceptance
                floors[row, plan.depth - 1 :] = 2  # no chance is that good: the end
        settings = [
            native_sampler.native_draw(s, stream) for s, stream in zip(anchors.samplings, anchors.streams, strict=True)
        ]
        try:
            tokens, confidence, lengths, logits = self._drafter.draft(
                anchors.slots,
                anchors.positions,
                anchors.tokens,
                np.ascontiguousarray(anchors.hidden),
                depth,
                settings,
                floors,
                acceptance,
                anchors.with_logits,
            )
        except ValueError as error:
            raise BackendError(f"anchors the caches cannot take: {error}") from error
        return Drafts(tokens, confidence, lengths, logits if anchors.with_logits else None)

    def draw(self, logits: Row, sampling: SamplingParams, position: int) -> int:
        return native_sampler.draw(logits, sampling, position)

    def allowed(self, logits: Row, sampling: SamplingParams) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        return native_sampler.allowed(logits, sampling)

    def save(self, slot: int) -> _cpu.Snapshot:
        return self._target.save(slot)

    def restore(self, slot: int, snapshot: _cpu.Snapshot) -> None:
        self._target.restore(slot, snapshot)

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
