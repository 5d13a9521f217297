"""Tensors in the native code: each in a format of its own, found by name and checked against the config."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from paceline import _cpu
from paceline.backends.cpu.backend import CpuBackend
from paceline.backends.cpu.weights import native_shapes, pack_checkpoint
from paceline.checkpoint import Checkpoint, resolve
from paceline.errors import BackendError
from paceline.types import GREEDY, Work
from tests.fixtures import reference_formats
from tests.fixtures.checkpoints import TARGET, target_weights, write
from tests.fixtures.native import as_stored

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
    "mix", [("q8_0", "q4_0", "bf16"), ("f32", "q8_0", "q4_0"), ("bf16", "f32", "q8_0"), ("q4_0", "bf16", "f32")]
)
def test_each_matrix_gets_activations_of_its_format(tmp_path: Path, mix: Mix) -> None:
    weights = target_weights()
    write(tmp_path / "plain", TARGET, weights)
    stored = {
        name: as_stored(values, fmt) if (fmt := format_of(name, mix)) else values for name, values in weights.items()
    }
    write(tmp_path / "stored", TARGET, stored)
    mixed, exact = logits(tmp_path / "plain", mix), logits(tmp_path / "stored")
    assert np.std(mixed - exact) <= 0.06 * np.std(exact)  # activations are rounded; those of another format give 0.75


@pytest.mark.parametrize("element", ["Q8_0", "Q5_1", "MXFP4"])
def test_tables_are_read_in_the_type_of_the_file(tmp_path: Path, element: str) -> None:
    checkpoint = Checkpoint.open(write(tmp_path / "model", TARGET, target_weights()))
    config = checkpoint.target_config()
    weights = pack_checkpoint(resolve(checkpoint, config), config, "f32")
    blocks = reference_formats.random_blocks(416, 160, element, seed=0)
    tokens, results = list(range(3, 19)), []
    for table in (_cpu.Table(blocks, element), _cpu.Table(reference_formats.values_of(blocks, element))):
        weights.tensors["embed_tokens_per_layer.weight"] = table
        backend = CpuBackend((config, weights), threads=2, context=64)
        results.append(backend.run([Work(backend.open_slot(), 0, tokens, GREEDY, logits=True)])[0].logits)
    np.testing.assert_array_equal(*results)
    assert np.all(np.isfinite(results[0]))


@pytest.mark.parametrize(
    ("name", "tensor", "complaint"),
    [
        ("layers.1.mlp.up_proj.weight", None, "is missing"),
        ("layers.1.mlp.up_proj.weight", ("q8_0", 64, 64), r"shape \[64, 64\] where \[64, 32\]"),
        ("layers.0.self_attn.q_norm.weight", np.ones(17, np.float32), r"shape \[17\] where \[16\]"),
        ("norm.weight", ("f32", 1, 32), "another kind"),
        ("embed_tokens_per_layer.weight", np.zeros((416, 32), np.uint16), r"where \[416, 160\]"),
        ("norm.weight", "text", "no known kind"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(tmp_path: Path, name: str, tensor: object, complaint: str) -> None:
    checkpoint = Checkpoint.open(write(tmp_path / "model", TARGET, target_weights()))
    config = checkpoint.target_config()
    weights = pack_checkpoint(resolve(checkpoint, config), config, "q8")
    del weights.tensors[name]
    if tensor is not None:
        weights.tensors[name] = _cpu.Matrix(*tensor) if isinstance(tensor, tuple) else tensor
    with pytest.raises(BackendError, match=f"{re.escape(name)}.*{complaint}"):
        CpuBackend((config, weights), threads=1, context=64)
