"""Where the weights on a device come from: a checkpoint, or nowhere, for measurements."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from paceline.backends.torch.matrix import BLOCK, FORMATS, Matrix, pack, plain_format, stack
from paceline.checkpoint import Tensors
from paceline.checkpoint.names import TOKEN_ORDERING, expected_tensors
from paceline.config import DrafterConfig, TargetConfig


@dataclass(frozen=True)
class CheckpointSource:
    """Reads a checkpoint's tensors one at a time; see `layers.Source`.

    Args:
        tensors: of one model.
        fmt: that matrices are held in.
        device: where they go.
        progress: told the file bytes of each tensor read.
    """

    tensors: Tensors
    fmt: str
    device: torch.device
    progress: Callable[[int], None] = lambda _: None

    def matrix(self, *names: str) -> Matrix:
        return stack(pack(self._read(name).flatten(0, -2), self.fmt) for name in names)

    def plain(self, name: str) -> Matrix:
        return pack(self._read(name), plain_format(self.fmt))

    def vector(self, name: str) -> Tensor:
        return self._read(name).to(FORMATS[plain_format(self.fmt)])

    def number(self, name: str) -> float:
        return float(self.vector(name))

    def ordered_head(self, centroids: int) -> tuple[Matrix, Tensor]:
        tokens = self._read(TOKEN_ORDERING).view(centroids, -1)
        table = self._read("embed_tokens.weight")[tokens.flatten()]
        return pack(table, plain_format(self.fmt)), tokens

    def _read(self, name: str) -> Tensor:
        ref = self.tensors.refs[name]
        values = np.array(ref.read())  # a copy: files are mapped read-only
        tensor = torch.from_numpy(values).to(self.device)
        self.progress(ref.bytes)
        return tensor.view(torch.bfloat16) if values.dtype == np.uint16 else tensor


class RandomSource:
    """Random matrices in a shape, and norms of one; see `layers.Source`.

    Speed does not depend on the values. The norms behind each block are small, so that rows stay as different as their
    tokens: a mixture of experts then sends them to experts that have little in common, the dear case.
    """

    def __init__(self, config: TargetConfig | DrafterConfig, fmt: str, device: torch.device) -> None:
        self.device, self._fmt, self._shapes = device, fmt, expected_tensors(config)

    def matrix(self, *names: str) -> Matrix:
        return stack(self._random(name, self._fmt) for name in names)

    def plain(self, name: str) -> Matrix:
        return self._random(name, plain_format(self._fmt))

    def vector(self, name: str) -> Tensor:
        value = 0.05 if "post_" in name and "norm" in name else 1.0
        return torch.full(self._shapes[name], value, dtype=FORMATS[plain_format(self._fmt)], device=self.device)

    def number(self, name: str) -> float:
        return 1.0

    def ordered_head(self, centroids: int) -> tuple[Matrix, Tensor]:
        head = self.plain("embed_tokens.weight")
        return head, torch.arange(head.outputs, device=self.device).view(centroids, -1)

    def _random(self, name: str, fmt: str) -> Matrix:
        *outer, columns = self._shapes[name]
        rows = math.prod(outer)
        if fmt not in ("q8", "q4"):
            values = torch.empty((rows, columns), dtype=FORMATS[fmt], device=self.device)
            return Matrix(values.normal_(std=columns**-0.5), None, rows, columns)
        blocks = -(-columns // BLOCK)
        bytes_ = torch.randint(
            -128,
            128,
            (blocks, rows, BLOCK if fmt == "q8" else BLOCK // 2),
            dtype=torch.int8,
            device=self.device,
        )
        deviation = 74 if fmt == "q8" else 4.6  # of evenly spread numbers
        scales = torch.full((blocks, rows, 2), columns**-0.5 / deviation, dtype=torch.float16, device=self.device)
        return Matrix(bytes_.view(FORMATS[fmt]), scales, rows, columns)
