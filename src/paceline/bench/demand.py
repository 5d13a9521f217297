"""What a pass must do at least: bytes to read and multiply-adds, and which of the two limits its time.

The bytes are those of the weights, once for all rows, and of the keys and values that the rows see; the multiply-adds
those with weights and of attention. The rest (norms, sampling, packing of activations) is not counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from paceline import _cpu
from paceline.backends.cpu.weights import EMBEDDING, Weights
from paceline.bench.shapes import in_prompt
from paceline.config import Experts, Layer, TargetConfig
from paceline.quant.cache_formats import row_bytes

ATTENTION = "f32"  # the format whose dot product attention takes


@dataclass
class Demand:
    """Bytes to read, and multiply-adds by the weight format whose dot product they take."""

    nbytes: float = 0
    products: Counter[str] = field(default_factory=Counter)

    @property
    def multiply_adds(self) -> int:
        return self.products.total()


@dataclass(frozen=True)
class TargetDemand:
    """What a target's passes demand.

    Args:
        config: the target's.
        weights: its matrices.
        kv: format of the KV cache.
        overlap: share of their experts that neighbouring rows have in common; 0: as many as by chance.
    """

    config: TargetConfig
    weights: Weights
    kv: str
    overlap: float = 0

    def decode(self, rows: int, context: int) -> Demand:
        """A pass of so many rows after `context` tokens, with a token sampled from each."""
        demand = self._matrices(rows, lambda name: name != EMBEDDING or self.config.tied_head)
        for layer in self.config.layers:
            visible = min(context, self.config.sliding_window) if layer.sliding else context
            demand.nbytes += self._cache_bytes(layer, visible)
            demand.products[ATTENTION] += self._attention(layer, rows * visible)
        return demand

    def prompt(self, tokens: int, chunk: int) -> Demand:
        """A prompt in passes of `chunk` rows: the layers up to the last with K/V of its own."""
        counts = in_prompt(self.config)
        demand = self._matrices(tokens, counts)
        demand.nbytes = self._matrices(min(tokens, chunk), counts).nbytes * -(-tokens // chunk)
        for index, layer in enumerate(self.config.layers):
            if not counts(f"layers.{index}."):
                break
            window = min(tokens, self.config.sliding_window) if layer.sliding else tokens
            visible = window * (window + 1) // 2 + (tokens - window) * window  # of all rows together
            demand.products[ATTENTION] += self._attention(layer, visible)
        return demand

    def _matrices(self, rows: int, counts: Callable[[str], bool]) -> Demand:
        demand = Demand()
        for name, tensor in self.weights.tensors.items():
            if not counts(name):
                continue
            if isinstance(tensor, list) and self.config.experts:
                _add(demand, tensor[0], experts_read(self.config.experts, rows, self.overlap))
                demand.products[tensor[0].format] += _products(tensor[0]) * self.config.experts.active * rows
            elif isinstance(tensor, _cpu.Matrix):
                _add(demand, tensor, 1)
                demand.products[tensor.format] += _products(tensor) * rows
        return demand

    def _cache_bytes(self, layer: Layer, visible: int) -> int:
        return 2 * visible * layer.kv_heads * row_bytes(self.kv, layer.head_dim)

    def _attention(self, layer: Layer, visible: int) -> int:
        """Multiply-adds for so many keys and values, of all rows together."""
        return 2 * visible * self.config.heads * layer.head_dim


def _add(demand: Demand, matrix: _cpu.Matrix, times: float) -> None:
    demand.nbytes += matrix.nbytes * times


def _products(matrix: _cpu.Matrix) -> int:
    rows, columns = matrix.shape
    return int(rows * columns)


def experts_read(experts: Experts, rows: int, overlap: float) -> float:
    """How many experts so many neighbouring rows are sent to, on average: see `csrc/cpu/model/simulated_routing.hpp`.

    Args:
        experts: how many there are, and how many a row is sent to.
        rows: of one pass.
        overlap: share of its experts that a row has in common with the one before; by chance it is active / count.
    """
    choices = experts.count // experts.active  # of each of a row's places
    if choices == 1:
        return experts.active
    renewal = min((1 - overlap) * choices / (choices - 1), 1)
    unread = (1 - 1 / choices) * (1 - renewal / choices) ** (rows - 1)  # chance of each expert
    return experts.active * choices * (1 - unread)


def compared(ms: float, demand: Demand, read_gb_s: float, peaks: Mapping[str, float] | None) -> dict[str, Any]:
    """A time beside the machine's two limits.

    Args:
        ms: what was measured.
        demand: what had to be done in it.
        read_gb_s: what memory gives.
        peaks: multiply-adds a second by weight format, or None where they are not known.

    Returns:
        `bandwidth_fraction` and `peak_fraction` are the times that reading and arithmetic take at the machine's limits,
        as shares of `ms`; the larger of them is the `bound`, and says how near the measured time is to it.
    """
    memory_ms = demand.nbytes / read_gb_s / 1e6
    compute_ms = sum(count / peaks[fmt] for fmt, count in demand.products.items()) * 1e3 if peaks else None
    memory_binds = compute_ms is None or memory_ms >= compute_ms
    bound_ms = memory_ms if memory_binds else compute_ms
    assert bound_ms is not None
    return {
        "ms": ms,
        "gb_s": demand.nbytes / ms / 1e6,
        "bandwidth_fraction": memory_ms / ms,
        "multiply_adds_per_s": demand.multiply_adds / ms * 1e3,
        "peak_fraction": compute_ms / ms if compute_ms is not None else None,
        "bound": "memory" if memory_binds else "compute",
        "bound_ms": bound_ms,
        "bound_fraction": bound_ms / ms,
    }
