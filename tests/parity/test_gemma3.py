"""Gemma 3 on both backends and as plain functions against transformers, on random checkpoints that it wrote."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from torch import Tensor

from paceline.backends.base import Backend
from paceline.backends.torch.weights import CheckpointSource
from paceline.checkpoint import Checkpoint, resolve
from paceline.models import ops
from paceline.models.gemma4 import Target, load_target, logits
from paceline.train.sequences import Cache, states
from tests.fixtures.backends import all_logits, any_backend, run, sequence, torch_backend
from tests.fixtures.gemma3 import SHAPES, read_gemma3, write_gemma3
from tests.fixtures.pairs import VOCABULARY, WINDOW

ROWS = 5 * WINDOW


@dataclass(frozen=True)
class Case:
    folder: Path
    theirs: hf.PreTrainedModel


@pytest.fixture(scope="module", params=SHAPES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = write_gemma3(tmp_path_factory.mktemp("gemma3") / request.param, request.param, seed=1)
    return Case(folder, read_gemma3(folder))


def prompt(rows: int = ROWS) -> Tensor:
    return torch.randint(4, VOCABULARY, (1, rows), generator=torch.Generator().manual_seed(0))


def expected(case: Case) -> np.ndarray:
    with torch.no_grad():
        theirs = case.theirs(input_ids=prompt()).logits[0].numpy()
    assert theirs.std() > 0.5  # a degenerate model would agree with anything
    return theirs


def assert_close(ours: np.ndarray, theirs: np.ndarray, tolerance: float = 1e-4) -> None:
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


def our_target(folder: Path, fmt: str = "f32") -> Target:
    checkpoint = Checkpoint.open(folder)
    config = checkpoint.target_config()
    return load_target(config, CheckpointSource(resolve(checkpoint, config), fmt, torch.device("cpu")))


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 7, ROWS])
def test_functions(case: Case, chunk: int) -> None:
    target, cache = our_target(case.folder), Cache()
    hidden = torch.cat([states(target, part, cache) for part in prompt().split(chunk, dim=1)], dim=1)
    assert_close(logits(target, ops, hidden[0]).numpy(), expected(case))


@pytest.mark.parametrize("chunk", [1, 7, 16])
@pytest.mark.parametrize("make", [any_backend, torch_backend])
def test_logits(case: Case, make: type[Backend], chunk: int) -> None:
    backend = make(case.folder, None, max_rows=ROWS)
    slot, tokens = backend.open_slot(), prompt()[0].tolist()
    parts = [all_logits(backend, slot, tokens[i : i + chunk], i) for i in range(0, ROWS, chunk)]
    assert_close(np.concatenate(parts), expected(case))


@torch.no_grad()
@pytest.mark.parametrize("make", [any_backend, torch_backend])
def test_greedy_text(case: Case, make: type[Backend]) -> None:
    tokens, count = prompt(WINDOW - 3), 3 * WINDOW
    case.theirs.generation_config = hf.GenerationConfig(do_sample=False, pad_token_id=0)  # and no end token
    theirs = case.theirs.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=count)
    theirs = theirs[0, tokens.shape[1] :].tolist()
    assert len(set(theirs)) > WINDOW  # not one token over and over
    backend = make(case.folder, None, max_rows=16)
    (ours,) = run(backend, [sequence(backend, tokens[0].tolist(), max_tokens=count)], chunk=3)
    assert ours.tokens == theirs


@torch.no_grad()
def test_bfloat16_checkpoints(tmp_path: Path) -> None:
    """Official files are bf16: their norms are 1 + w in f32, and the embedding's factor is rounded to bf16."""
    folder = write_gemma3(tmp_path / "bf16", "large", seed=3, dtype=torch.bfloat16)
    exact = read_gemma3(folder, torch.bfloat16).float()  # bf16 weights and factor, f32 arithmetic
    theirs = exact(input_ids=prompt()).logits[0].numpy()
    backend = any_backend(folder, None, max_rows=ROWS)
    ours = all_logits(backend, backend.open_slot(), prompt()[0].tolist())
    assert_close(ours, theirs, 2e-3)


@torch.no_grad()
def test_bfloat16_norms_are_not_rounded(tmp_path: Path) -> None:
    folder = write_gemma3(tmp_path / "bf16", seed=3, dtype=torch.bfloat16)
    target, reference = our_target(folder, "bf16"), read_gemma3(folder, torch.bfloat16)
    weight = reference.model.norm.weight
    assert torch.equal(target.decoder.norm, 1 + weight.float())
    assert not torch.equal(target.decoder.norm.bfloat16().float(), target.decoder.norm)
    tokens = prompt()
    ours, theirs = logits(target, ops, states(target, tokens)[0]), reference(input_ids=tokens).logits[0].float()
    assert (ours - theirs).abs().mean(-1).median() < 0.05 * theirs.abs().mean()


def test_norms_that_include_one(tmp_path: Path) -> None:
    """A file whose norms are the values to multiply by says so, and gives the same numbers."""
    from safetensors.numpy import load_file, save_file

    folder = write_gemma3(tmp_path)
    tokens = prompt()[0].tolist()

    def ours() -> np.ndarray:
        backend = any_backend(folder, None, max_rows=ROWS)
        return all_logits(backend, backend.open_slot(), tokens)

    before = ours()
    weights = load_file(folder / "model.safetensors")
    weights |= {name: value + np.float32(1) for name, value in weights.items() if "norm" in name}
    save_file(weights, folder / "model.safetensors")
    assert not np.allclose(ours(), before, rtol=0.1)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"norms_include_one": True}))
    assert np.array_equal(ours(), before)
