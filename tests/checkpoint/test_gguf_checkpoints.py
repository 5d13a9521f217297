"""GGUF files by their path, and the real one."""

from __future__ import annotations

import os
from pathlib import Path

import gguf
import numpy as np
import pytest

from paceline.checkpoint import Checkpoint, resolve, target_tensors
from paceline.checkpoint.config_json import target_config
from paceline.errors import CheckpointError
from tests.fixtures import checkpoints
from tests.fixtures.gguf_files import write_gguf
from tests.fixtures.real_gguf import real_gguf


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shapes = target_tensors(target_config(checkpoints.TARGET))
    weights = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    return write_gguf(tmp_path_factory.mktemp("small") / "model.gguf", checkpoints.TARGET, weights)


def put(small: Path, folder: Path, *names: str) -> None:
    for name in names:
        os.link(small, folder / name)


def test_a_file_by_its_path(small: Path) -> None:
    checkpoint = Checkpoint.open(small)
    assert checkpoint.path == small
    assert checkpoint.packed is None
    assert checkpoint.chat_template_path is None
    assert not checkpoint.has_chat_template
    resolve(checkpoint, checkpoint.target_config())


def test_names_have_no_meaning(small: Path, tmp_path: Path) -> None:
    put(small, tmp_path, "sha256-0123")  # a blob of Ollama's
    assert Checkpoint.open(tmp_path / "sha256-0123").path.name == "sha256-0123"


def test_a_model_folder_stays_one(small: Path, tmp_path: Path) -> None:
    folder = checkpoints.write_target(tmp_path)
    put(small, folder, "model.gguf")
    assert Checkpoint.open(folder).path == folder


def test_a_model_in_parts(tmp_path: Path) -> None:
    shapes = target_tensors(target_config(checkpoints.TARGET))
    weights = {name: np.full(shape, 3, np.float32) for name, shape in shapes.items()}
    write_gguf(tmp_path / "m.gguf", checkpoints.TARGET, weights, shard_tensors=20)
    parts = sorted(path.name for path in tmp_path.glob("*.gguf"))
    assert len(parts) > 3
    checkpoint = Checkpoint.open(tmp_path / parts[0])
    resolve(checkpoint, checkpoint.target_config())
    assert {ref.path.name for ref in checkpoint.tensors.values()} == set(parts)


def test_other_files(tmp_path: Path) -> None:
    folder = checkpoints.write_target(tmp_path)
    with pytest.raises(CheckpointError, match=r"config.json: is not a GGUF file; give a .gguf file or a model folder"):
        Checkpoint.open(folder / "config.json")
    with pytest.raises(CheckpointError, match="no such folder; give a model folder, a GGUF or a hub id"):
        Checkpoint.open(tmp_path / "none")


@pytest.mark.slow  # the reference reader takes its time
def test_the_real_file() -> None:
    """All of Gemma 3 270M: settings, and the bytes of every tensor as llama.cpp's own reader has them."""
    path = real_gguf()
    checkpoint = Checkpoint.open(path)
    config = checkpoint.config
    assert (config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]) == (640, 2048, 4)
    assert [i for i, kind in enumerate(config["layer_types"]) if kind == "full_attention"] == [5, 11, 17]
    assert (config["eos_token_id"], config["bos_token_id"]) == ([1, 106], 2)
    assert len(checkpoint.tensors) == 236
    read = {ref.name: ref for ref in checkpoint.tensors.values()}
    for tensor in gguf.GGUFReader(path).tensors:
        ref = read[tensor.name]
        assert (ref.dtype, ref.shape) == (tensor.tensor_type.name, tuple(reversed(tensor.shape.tolist())))
        np.testing.assert_array_equal(ref.map(), tensor.data)
