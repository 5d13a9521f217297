"""A drafter's GGUF says what its folder says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tools.dequantise import values_of
from tools.drafter_gguf import write_drafter

import paceline
from paceline.checkpoint import Checkpoint, drafter_tensors, resolve
from paceline.checkpoint.config_json import drafter_config
from paceline.checkpoint.names import DRAFT_TOKENS
from paceline.errors import CheckpointError
from paceline.train.export import write_model
from paceline.train.shape import first_weights, new_config, official_json
from paceline.types import SamplingParams
from tests.fixtures import checkpoints
from tests.fixtures.gemma3 import write_gemma3
from tests.fixtures.gguf_files import write_gguf
from tests.fixtures.pairs import tiny_tokenizer, write_pair, write_tokenizer


def folders(root: Path, part: int | None) -> tuple[Path, Path]:
    """A Gemma 3 target and a drafter with that many tokens in its head."""
    target = write_gemma3(root / "target")
    write_tokenizer(tiny_tokenizer(), target)
    settings = Checkpoint.open(target).target_config()
    config = new_config(settings, 32, 64, part)
    weights = first_weights({n: s for n, s in drafter_tensors(config).items() if n != DRAFT_TOKENS}, 0)
    if part:
        weights[DRAFT_TOKENS] = torch.randperm(settings.vocab_size)[:part].sort().values.int()
    (root / "drafter").mkdir()
    write_model(root / "drafter", official_json(config, settings), weights)
    return target, root / "drafter"


def assert_alike(folder: Path, file: Path) -> None:
    ours, theirs = Checkpoint.open(folder), Checkpoint.open(file)
    config = ours.drafter_config()
    assert theirs.drafter_config() == config
    found, expected = resolve(theirs, config), resolve(ours, config)
    assert found.refs.keys() == expected.refs.keys()
    for name, ref in expected.refs.items():
        if len(ref.shape) == 1:
            np.testing.assert_array_equal(found.vector(name), expected.vector(name))
        else:
            assert found[name].dtype == "Q8_0"
            values = expected.vector(name)
            blocks = np.abs(values.reshape(len(values), -1, 32)).max(2, keepdims=True)
            missed = np.abs(values_of(found, name) - values).reshape(len(values), -1, 32)
            assert (missed <= 0.57 * blocks / 127 + 1e-9).all()  # half a step, and its size is a float16


@pytest.mark.parametrize("part", [None, 48])
def test_a_new_drafter(tmp_path: Path, part: int | None) -> None:
    target, folder = folders(tmp_path, part)
    file = tmp_path / "drafter.gguf"
    write_drafter(folder, file)
    assert_alike(folder, file)
    settings = {"sampling": SamplingParams(temperature=1, seed=3), "max_tokens": 30}
    engine = paceline.load(str(target), drafter=str(file), quant="f32", threads=1)
    plain, drafted = (engine.generate("Hello", **settings, draft_tokens=count) for count in (0, 4))
    assert plain.tokens == drafted.tokens
    assert drafted.statistics.drafted
    assert [path.name for path in tmp_path.iterdir() if "part" in path.name] == []


def test_centroids(tmp_path: Path) -> None:
    _, folder = write_pair(tmp_path, "e2b", text=True)
    write_drafter(folder, tmp_path / "drafter.gguf")
    assert_alike(folder, tmp_path / "drafter.gguf")


def test_a_part_of_an_unknown_vocabulary(tmp_path: Path) -> None:
    """A file with such a tensor, and without the size."""
    shapes = drafter_tensors(drafter_config(checkpoints.DRAFTER))
    weights = {name: np.ones(shape, np.float32) for name, shape in shapes.items() if "masked" not in name}
    tokens = {DRAFT_TOKENS: np.arange(len(weights["embed_tokens.weight"]), dtype=np.int32)}
    file = write_gguf(tmp_path / "d.gguf", checkpoints.DRAFTER, weights, dialect="gemma4-assistant", tensors=tokens)
    with pytest.raises(CheckpointError, match=r"says nothing of gemma4-assistant.vocab_size"):
        Checkpoint.open(file)
