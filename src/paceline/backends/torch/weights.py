"""Where the weights on a device come from: a checkpoint, or random numbers for measurements."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from paceline.checkpoint import Tensors
from paceline.checkpoint.names import TOKEN_ORDERING, expected_tensors
from paceline.config import DrafterConfig, TargetConfig
from paceline.models.matrix import PLAIN, Matrix, pack, plain_format, random, stack


@dataclass(frozen=True)
class CheckpointSource:
    """Reads a checkpoint's tensors one at a time; see `models.gemma4.TensorSource`.

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

    @property
    def dtype(self) -> torch.dtype:
        return PLAIN[plain_format(self.fmt)]

    def matrix(self, *names: str, precise: bool = False) -> Matrix:
        fmt = plain_format(self.fmt) if precise else self.fmt
        return stack(pack(self._read(name).flatten(0, -2), fmt) for name in names)

    def vector(self, name: str) -> Tensor:
        self.progress(self.tensors.refs[name].bytes)
        return torch.from_numpy(self.tensors.vector(name)).to(self.device)

    def _read(self, name: str) -> Tensor:
        ref = self.tensors.refs[name]
        values = np.array(ref.read())  # a copy: files are mapped read-only
        tensor = torch.from_numpy(values).to(self.device)
        self.progress(ref.bytes)
        return tensor.view(torch.bfloat16) if values.dtype == np.uint16 else tensor


class RandomSource:
    """Random matrices in an official shape, and constant norms; see `models.gemma4.TensorSource`.

    Speed does not depend on the values. The norms after each block are small, so that rows stay as different as their
    tokens: a mixture of experts then sends them to experts that have little in common, the expensive case.
    """

    def __init__(self, config: TargetConfig | DrafterConfig, fmt: str, device: torch.device) -> None:
        self.device, self._fmt, self._shapes = device, fmt, expected_tensors(config)

    @property
    def dtype(self) -> torch.dtype:
        return PLAIN[plain_format(self._fmt)]

    def matrix(self, *names: str, precise: bool = False) -> Matrix:
        fmt = plain_format(self._fmt) if precise else self._fmt
        shapes = [self._shapes[name] for name in names]
        return stack(random(math.prod(shape[:-1]), shape[-1], fmt, self.device) for shape in shapes)

    def vector(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if name == TOKEN_ORDERING:
            return torch.arange(*shape, device=self.device)
        value = 0.05 if "post_" in name and "norm" in name else 1.0
        return torch.full(shape, value, device=self.device)
