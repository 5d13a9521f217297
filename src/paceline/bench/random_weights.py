"""Weights made in memory, without meaning, to measure speed on official shapes. Speed does not depend on the values."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paceline import _cpu
from paceline.checkpoint.names import expected_tensors
from paceline.config import DrafterConfig, TargetConfig


class RandomWeights:
    """A source of weights (see `backends.cpu.weights.Weights`) for a shape: random matrices, norms of one.

    The norms behind each block are small, so that rows stay as different as their tokens: a mixture of experts sends
    them to experts that have little in common, which is the dear case for checking several rows.
    The per-layer-embedding table reads as zeros and takes no memory, where a real one costs a page from disk a token.
    """

    def __init__(self, config: TargetConfig | DrafterConfig, quant: str) -> None:
        self.quant = quant
        self.nbytes = 0
        self._config = config
        self._shapes = expected_tensors(config)

    def matrix(self, name: str, quant: str | None = None) -> _cpu.Matrix:
        rows, columns = self._shapes[name]
        return self._random(name, rows, columns, quant)

    def experts(self, name: str, part: str) -> list[_cpu.Matrix]:
        count, rows, columns = self._shapes[name]
        rows = rows if part == "whole" else rows // 2
        return [self._random(f"{name}.{part}.{expert}", rows, columns) for expert in range(count)]

    def ordered_head(self) -> tuple[_cpu.Matrix, list[int]]:
        rows, columns = self._shapes["embed_tokens.weight"]
        return self._random("ordered_head", rows, columns), list(range(rows))

    def vector(self, name: str) -> NDArray[np.float32]:
        value = 0.05 if "post_" in name and "norm" in name else 1.0
        return np.full(self._shapes[name], value, np.float32)

    def table(self, name: str) -> NDArray[Any]:
        return np.zeros(self._shapes[name], np.uint16)

    def in_bf16(self, name: str) -> bool:
        return True

    def _random(self, name: str, rows: int, columns: int, quant: str | None = None) -> _cpu.Matrix:
        matrix = _cpu.Matrix(quant or self.quant, rows, columns)
        matrix.fill_random(zlib.crc32(name.encode()))
        self.nbytes += matrix.nbytes
        return matrix
