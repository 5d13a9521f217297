"""Checkpoint files: locating and downloading them, and reading their configs and tensors."""

from paceline.checkpoint.checkpoint import Checkpoint
from paceline.checkpoint.location import locate, locate_drafter, unless_asked
from paceline.checkpoint.names import Tensors, drafter_tensors, resolve, target_tensors
from paceline.checkpoint.pair_doubts import pair_doubts
from paceline.checkpoint.safetensors import read_header
from paceline.checkpoint.tensors import TensorRef

__all__ = [
    "Checkpoint",
    "TensorRef",
    "Tensors",
    "drafter_tensors",
    "locate",
    "locate_drafter",
    "pair_doubts",
    "read_header",
    "resolve",
    "target_tensors",
    "unless_asked",
]
