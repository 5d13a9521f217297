"""Layers whose matrices have different formats, against float32 weights of the same values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from paceline.backends.cpu.backend import CpuBackend
from paceline.backends.cpu.weights import native_shapes, pack_checkpoint
from paceline.checkpoint import Checkpoint, resolve
from paceline.quant import blocks
from paceline.types import GREEDY, Work
from tests.unit.checkpoints import TARGET, target_weights, write

PROMPT, ROWS = 12, 24
PARTS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
Mix = tuple[str, str, str]


def format_of(name: str, mix: Mix) -> str | None:
    part = next((i for i, part in enumerate(PARTS) if part in name), None)
    return None if part is None else mix[part % len(mix)]


def logits(folder: Path, mix: Mix | None = None) -> np.ndarray:
    checkpoint = Checkpoint.open(folder)
    config = checkpoint.target_config()
    tensors = resolve(checkpoint, config)
    formats = {name: fmt for name in native_shapes(config) if mix and (fmt := format_of(name, mix))}
    weights = pack_checkpoint(tensors, config, "f32", formats=formats)
    backend = CpuBackend((config, weights), threads=2, context=64, max_rows=32)
    tokens = np.random.default_rng(0).integers(3, config.vocab_size, ROWS).tolist()
    slot = backend.open_slot()
    works = [Work(slot, 0, tokens[:PROMPT], GREEDY, logits=True)]
    works += [Work(slot, i, tokens[i : i + 1], GREEDY, logits=True) for i in range(PROMPT, ROWS)]
    return np.concatenate([backend.run([work])[0].logits for work in works])


@pytest.mark.parametrize(
    "mix", [("q8", "q4", "bf16"), ("f32", "q8", "q4"), ("bf16", "f32", "q8"), ("q4", "bf16", "f32")]
)
def test_each_matrix_gets_activations_of_its_format(tmp_path: Path, mix: Mix) -> None:
    weights = target_weights()
    write(tmp_path / "plain", TARGET, weights)
    stored = {
        name: blocks.round_trip(values, fmt) if (fmt := format_of(name, mix)) else values
        for name, values in weights.items()
    }
    write(tmp_path / "stored", TARGET, stored)
    mixed, exact = logits(tmp_path / "plain", mix), logits(tmp_path / "stored")
    assert np.std(mixed - exact) <= 0.06 * np.std(exact)  # activations are rounded; those of another format give 0.75
