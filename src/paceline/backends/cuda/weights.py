"""A checkpoint's tensors as PyTorch's, by the names that the readable models give them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from paceline.checkpoint import Tensors


def target_weights(tensors: Tensors) -> dict[str, Tensor]:
    """Weights of a target."""
    return {name: _tensor(ref.read()) for name, ref in tensors.refs.items()}


def drafter_weights(tensors: Tensors) -> dict[str, Tensor]:
    """Weights of a drafter, whose layers are a model of their own there."""
    own = ("pre_projection.", "post_projection.", "masked_embedding.")
    return {name if name.startswith(own) else f"model.{name}": _tensor(r.read()) for name, r in tensors.refs.items()}


def _tensor(values: NDArray[Any]) -> Tensor:
    tensor = torch.from_numpy(np.array(values))  # a copy: files are mapped read-only
    return tensor.view(torch.bfloat16) if values.dtype == np.uint16 else tensor
