"""Weights made in memory, without meaning, to measure speed on official shapes. Speed does not depend on the values."""

from __future__ import annotations

import zlib

import numpy as np

from paceline import _cpu
from paceline.backends.cpu.weights import Tensor, Weights, choose_formats, embedding_scales, native_shapes
from paceline.checkpoint.names import DRAFT_TOKENS, PLE_TABLE
from paceline.config import DrafterConfig, TargetConfig


def random_weights(config: TargetConfig | DrafterConfig, quant: str) -> Weights:
    """Random matrices in a shape, and norms of one.

    The norms after each block are small, so that rows stay as different as their tokens: a mixture of experts sends
    them to experts that have little in common, which is the expensive case for verifying several rows.
    The per-layer-embedding table reads as zeros and takes no memory, where a real one costs a page from disk a token.
    """
    weights = Weights(quant, embedding_scales(config, lambda _: True))
    formats = choose_formats(config, quant)
    for name, shape in native_shapes(config).items():
        if name == PLE_TABLE:
            tensor: Tensor = _cpu.Table(np.zeros(shape, np.uint16))
        elif name in ("ordered_head.tokens", DRAFT_TOKENS):
            tokens = np.arange(shape[0], dtype=np.int32)
            tensor = np.where(tokens < config.vocab_size, tokens, np.int32(-1))
        elif len(shape) == 3:
            tensor = [_random(f"{name}.{expert}", shape[1:], formats[name]) for expert in range(shape[0])]
        elif len(shape) == 2:
            tensor = _random(name, shape, formats[name])
        else:
            tensor = np.full(shape, 0.05 if "post_" in name and "norm" in name else 1.0, np.float32)
        weights.tensors[name] = tensor
    return weights


def _random(name: str, shape: tuple[int, ...], fmt: str) -> _cpu.Matrix:
    matrix = _cpu.Matrix(fmt, *shape)
    matrix.fill_random(zlib.crc32(name.encode()))
    return matrix
