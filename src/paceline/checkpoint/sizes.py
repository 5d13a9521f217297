"""How large a model is: parameters, and memory per weight format. Computed from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from paceline.checkpoint.names import PLE_TABLE, TOKEN_IDS, expected_tensors
from paceline.config import DrafterConfig, TargetConfig
from paceline.quant.cache_formats import row_bytes
from paceline.quant.formats import FORMATS
from paceline.quant.recipes import RECIPES, Stored, mean_bits

BF16: Mapping[str, str] = {}


@dataclass(frozen=True)
class Parameters:
    """Parameters of a text model."""

    total: int
    effective: int  # without the per-layer-embedding table, which stays on disk
    active: int  # of the effective ones, those that one token uses: all but the experts it is not sent to


def count_parameters(config: TargetConfig | DrafterConfig) -> Parameters:
    sizes = {name: math.prod(shape) for name, shape in expected_tensors(config).items() if name not in TOKEN_IDS}
    total = sum(sizes.values())
    effective = active = total - sizes.get(PLE_TABLE, 0)
    if isinstance(config, TargetConfig) and config.experts:
        experts = sum(size for name, size in sizes.items() if ".experts." in name)
        active -= experts * (config.experts.count - config.experts.active) // config.experts.count
    return Parameters(total, effective, active)


def weight_bytes(config: TargetConfig | DrafterConfig, quant: str, elements: Mapping[str, str] = BF16) -> int:
    """Memory of the packed weights: matrices by the recipe, vectors in f32, token ids in int32.

    Args:
        config: the model's.
        quant: a recipe.
        elements: types of the tensors in the files, by canonical name; bf16 where none is given.

    Not counted are the per-layer-embedding table, which stays in its file and is read by row, and the index of a large
    dense draft head on the CPU, a thirtieth of it.
    """
    matrices = _matrices(config, elements)
    formats = RECIPES[quant].formats(matrices)
    total = sum(4 * shape[0] for shape in expected_tensors(config).values() if len(shape) == 1)
    for name, stored in matrices.items():
        total += int(math.prod(stored.shape) * FORMATS[formats[name]].bits_per_weight) // 8
    return total


def bits_per_weight(config: TargetConfig | DrafterConfig, quant: str, elements: Mapping[str, str] = BF16) -> float:
    """Of the matrices in memory, scales included; see `weight_bytes`."""
    matrices = _matrices(config, elements)
    return mean_bits(matrices, RECIPES[quant].formats(matrices))


def _matrices(config: TargetConfig | DrafterConfig, elements: Mapping[str, str]) -> dict[str, Stored]:
    shapes = {name: shape for name, shape in expected_tensors(config).items() if len(shape) > 1 and name != PLE_TABLE}
    return {name: Stored(shape, elements.get(name, "BF16")) for name, shape in shapes.items()}


def cache_bytes(config: TargetConfig, positions: int, kv: str = "bf16") -> int:
    """Memory of one sequence's keys and values; sliding layers keep their window, full layers everything."""
    total = 0
    for index, layer in enumerate(config.layers):
        if layer.kv_source == index:
            kept = min(positions, config.sliding_window) if layer.sliding else positions
            total += 2 * layer.kv_heads * row_bytes(kv, layer.head_dim) * kept
    return total
