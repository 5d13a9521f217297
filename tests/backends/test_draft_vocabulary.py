"""Draft heads with a part of the vocabulary: what they score is right on both backends, and the text is the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import paceline
from paceline.backends.base import Backend
from paceline.backends.cpu.convert import convert
from paceline.checkpoint.names import DRAFT_TOKENS
from paceline.errors import CheckpointError
from paceline.types import GREEDY, Draft, SamplingParams, Work
from tests.fixtures.backends import assert_drafts_change_nothing, cpu_backend, torch_backend
from tests.fixtures.pairs import VOCABULARY, write_pair

ABSENT = -3e38
PROMPT = [5, 6, 7, 300]
IDS = np.random.default_rng(2).permutation(VOCABULARY)[:100]
PARAMS = [GREEDY, SamplingParams(temperature=1.0, top_k=20, seed=4)]


def restricted(drafter: Path, out: Path, ids: np.ndarray = IDS, **settings: object) -> Path:
    """A copy of a dense drafter with these tokens in its head."""
    shutil.copytree(drafter, out)
    path = out / "model.safetensors"
    weights = load_file(path)
    name = "model.embed_tokens.weight"
    weights[name] = weights[name][torch.from_numpy(ids % VOCABULARY)].contiguous()
    save_file(weights | {DRAFT_TOKENS: torch.from_numpy(ids.astype(np.int64))}, path, {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"draft_vocab_size": len(ids)} | settings))
    return out


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_pair(tmp_path_factory.mktemp("pair"), "12b", seed=3, head="dense", text=True)


@pytest.fixture(scope="module")
def drafter(pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return restricted(pair[1], tmp_path_factory.mktemp("restricted") / "drafter")


def draft(backend: Backend, length: int = 1, params: SamplingParams = GREEDY) -> tuple[int, ...]:
    slot = backend.open_slot()
    try:
        (first,) = backend.run([Work(slot, 0, PROMPT, params)])
        (result,) = backend.run([Work(slot, len(PROMPT), first.sampled, params, Draft(length=length))])
        return result.drafted
    finally:
        backend.close_slot(slot)


@pytest.mark.parametrize("quant", ["f32", "bf16", "q8", "q4"])
def test_it_scores_its_tokens_as_the_whole_head_does(pair: tuple[Path, Path], drafter: Path, quant: str) -> None:
    whole, part = cpu_backend(*pair, quant), cpu_backend(pair[0], drafter, quant)
    for backend in (whole, part):
        draft(backend)
    expected, found = (backend._decoder.last_draft_step(0)[0] for backend in (whole, part))
    np.testing.assert_array_equal(found[IDS].view(np.uint32), expected[IDS].view(np.uint32))
    assert set(np.flatnonzero(found > ABSENT)) == set(IDS)


@pytest.mark.parametrize("params", PARAMS)
def test_both_backends_draft_the_same(pair: tuple[Path, Path], drafter: Path, params: SamplingParams) -> None:
    native, torched = (make(pair[0], drafter) for make in (cpu_backend, torch_backend))
    drafted = draft(native, 6, params)
    assert set(drafted) <= set(IDS.tolist())
    assert draft(torched, 6, params) == drafted


@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("make", [cpu_backend, torch_backend])
def test_the_text_is_the_same(pair: tuple[Path, Path], drafter: Path, make: type, params: SamplingParams) -> None:
    backend = make(pair[0], drafter, "q8", slots=2)
    prompts = [PROMPT, [9, 8, 7]]
    assert_drafts_change_nothing(backend, prompts, params)


def test_converted_folders_keep_it(pair: tuple[Path, Path], drafter: Path, tmp_path: Path) -> None:
    convert(pair[0], drafter, tmp_path / "out", "q8", threads=2)
    backend = paceline.load(str(tmp_path / "out"), context=64).backend
    assert draft(backend, 5) == draft(cpu_backend(pair[0], drafter, "q8"), 5)


@pytest.mark.parametrize(
    ("ids", "settings", "message"),
    [
        (np.array([3, 4, 3]), {}, "names a token twice"),
        (np.array([3, VOCABULARY]), {}, "names a token twice, or one that does not exist"),
        (np.array([3, -1]), {}, "names a token twice, or one that does not exist"),
        (IDS, {"draft_vocab_size": VOCABULARY + 1}, f"draft_vocab_size is {VOCABULARY + 1}; this head has 1 to"),
        (IDS, {"draft_vocab_size": 99}, r"has shape \[100\], but its settings call for \[99\]"),
        (IDS, {"use_ordered_embeddings": True}, f"this head has all {VOCABULARY} tokens"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "torch:cpu"])
def test_what_does_not_fit_is_refused(
    pair: tuple[Path, Path], tmp_path: Path, device: str, ids: np.ndarray, settings: dict[str, object], message: str
) -> None:
    drafter = restricted(pair[1], tmp_path / "drafter", ids, **settings)
    with pytest.raises(CheckpointError, match=message):
        paceline.load(str(pair[0]), drafter=str(drafter), context=64, device=device)
