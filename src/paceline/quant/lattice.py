"""Weights that lie on a grid of Q4_0 already: those of checkpoints trained for it, stored in bfloat16."""

from __future__ import annotations

import numpy as np

from paceline import _cpu
from paceline.quant.bf16 import Floats, from_bf16, to_bf16
from paceline.quant.formats import GROUP

SAMPLE = 64  # rows that are looked at
SHARE = 0.99  # of groups that lie on a grid


def lies_on_q4_0(rows: Floats) -> bool:
    """Whether Q4_0 holds these weights [rows, columns] exactly, to bfloat16's precision; at most SAMPLE rows are read.

    Groups of zeros, which lie on any grid, are not counted.
    """
    if rows.shape[1] % GROUP or not len(rows):
        return False
    x = np.ascontiguousarray(rows[:: -(-len(rows) // SAMPLE)], np.float32)
    groups = from_bf16(to_bf16(np.nan_to_num(x))).reshape(-1, GROUP)
    stored = from_bf16(to_bf16(_cpu.dequantise(_cpu.quantise(x, "Q4_0"), "Q4_0", x.shape[1]))).reshape(-1, GROUP)
    counted = groups.any(axis=1)
    return bool(counted.any()) and bool(np.all(groups == stored, axis=1)[counted].mean() >= SHARE)
