"""A model pair on the CPU: slots over the native code, which runs a step in one call (`csrc/cpu/model/round.cpp`).

The KV cache is bf16 unless another format is asked for, or f32 with f32 weights, which makes that the format to compare
with a reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from paceline import _cpu
from paceline.backends.cpu.head_index import indexed
from paceline.backends.cpu.weights import Weights
from paceline.checkpoint.sizes import cache_bytes
from paceline.config import DrafterConfig, TargetConfig, check_pair
from paceline.errors import BackendError
from paceline.types import BackendInfo, Result, Work


class CpuBackend:
    """A loaded model pair and its KV cache; see `backends.base.Backend` for the methods."""

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
        kv: str = "auto",
    ) -> None:
        """Load the weights.

        Args:
            target: config and weights.
            drafter: the same of the drafter, or None for plain decoding.
            threads: worker threads, including the calling one.
            context: positions a slot holds.
            slots: sequences held at once.
            max_rows: most rows of one slot in one pass; sliding rings are that much longer than the window.
            isa: instruction set, empty for the best one.
            kv: format of the KV cache, or auto: f32 with f32 weights, else bf16.

        Raises:
            BackendError: an instruction set or a width that cannot be used here, or tensors that do not fit the config.
            PairError: the drafter is another target's.
        """
        config, weights = target
        self.weights = weights
        self._with_isa = partial(
            CpuBackend, target, drafter, threads=threads, context=context, slots=slots, max_rows=max_rows, kv=kv
        )
        if drafter:
            check_pair(config, drafter[0])
        if isa not in ("", *_cpu.usable_isas()):
            raise BackendError(f"no {isa} kernels on this processor; usable here: {', '.join(_cpu.usable_isas())}")
        if kv == "auto":
            kv = "f32" if weights.is_f32 else "bf16"
        try:
            self._decoder = _cpu.Decoder(
                config,
                weights.tensors,
                indexed(drafter[0]) if drafter else None,
                drafter[1].tensors if drafter else {},
                isa=isa,
                threads=threads,
                slots=slots,
                context=context,
                max_rows=max_rows,
                kv=kv,
            )
        except ValueError as error:
            raise BackendError(str(error)) from error
        except MemoryError as error:
            gigabytes = slots * cache_bytes(config, context + max_rows, kv) / 1e9
            raise BackendError(
                f"not enough memory for {slots} x {context} positions of KV cache ({gigabytes:.1f} GB) beside the "
                f"weights; use a shorter context or fewer slots{'' if kv == 'q8' else ', or --kv q8'}"
            ) from error
        except RuntimeError as error:  # std::system_error
            raise BackendError(f"cannot start {threads} threads ({error}); use fewer") from error
        self._free = list(range(slots))[::-1]
        self.pass_bytes = weights.pass_bytes(config)  # that a pass of one row reads
        self.info = BackendInfo(
            vocab_size=config.vocab_size,
            context=context,
            slots=slots,
            max_rows=max_rows,
            has_drafter=drafter is not None,
            stops_early=True,
            quant=weights.quant,
            kv=kv,
            weight_bytes=weights.nbytes,
            device=self._decoder.isa,
        )

    @property
    def threads(self) -> int:
        return self._decoder.threads

    @threads.setter
    def threads(self, count: int) -> None:
        self._decoder.threads = count

    def open_slot(self) -> int:
        if not self._free:
            raise BackendError("all cache slots are taken; finish or cancel a sequence first")
        return self._free.pop()

    def close_slot(self, slot: int) -> None:
        self._decoder.clear(slot)
        self._free.append(slot)

    def run(self, works: Sequence[Work]) -> list[Result]:
        try:
            return [Result(*parts) for parts in self._decoder.run(works)]
        except ValueError as error:
            raise BackendError(f"a step that the KV cache cannot take: {error}") from error

    def truncate(self, slot: int, length: int) -> None:
        try:
            self._decoder.truncate(slot, length)
        except ValueError as error:
            raise BackendError(str(error)) from error

    def save(self, slot: int) -> _cpu.Snapshot:
        return self._decoder.save(slot)

    def restore(self, slot: int, snapshot: _cpu.Snapshot) -> None:
        self._decoder.restore(slot, snapshot)

    def with_isa(self, isa: str) -> CpuBackend:
        """The same packed weights with the kernels of another instruction set, and a cache of its own."""
        return self._with_isa(isa=isa)

    def fill_random(self, slot: int, length: int) -> None:
        """Continue a slot's cache with random rows up to a length, for measurements after long contexts."""
        self._decoder.fill_random(slot, length)

    def simulate_routing(self, overlap: float) -> None:
        """From now on, send rows to the target's experts so that neighbours have that share in common."""
        self._decoder.simulate_routing(overlap)

    def states(self) -> NDArray[np.float32]:
        """The target's states [rows, hidden] at the rows that the last step sampled after."""
        return self._decoder.states()

    def best(self, count: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Tokens and logits [rows, count] of the same rows: the best ones, best first.

        Raises:
            BackendError: logits that are no numbers.
        """
        try:
            tokens, logits = self._decoder.best(count)
        except ValueError as error:
            raise BackendError(str(error)) from error
        return tokens, logits

    def keys_values(self, layer: int, slot: int, first: int, count: int) -> NDArray[np.float32]:
        """Keys, then values, of a layer that has its own: [2, kv_heads, count, head_dim].

        Raises:
            ValueError: positions that the cache does not hold (any more).
        """
        return self._decoder.keys_values(layer, slot, first, count)

    def observe(self) -> None:
        """From now on, sum up the squares of what the pair's matrices are multiplied with."""
        self._decoder.observe()

    def seen(self, matrix: _cpu.Matrix) -> tuple[int, NDArray[np.float64]]:
        """Rows that a matrix was multiplied with since `observe`, and the sums of the squares of their columns."""
        rows, squares = self._decoder.seen(matrix)
        return rows, squares
