"""Dense draft heads of which only some lists of tokens are scored: what is scored is right, and the text the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import paceline
from paceline import _cpu
from paceline.backends.cpu import head_index
from paceline.backends.cpu.backend import CpuBackend
from paceline.backends.cpu.convert import convert
from paceline.backends.cpu.head_index import LIST, build_index, indexed
from paceline.bench.shapes import TARGETS, official_drafter
from paceline.checkpoint import TensorRef
from paceline.quant.bf16 import from_bf16, to_bf16
from paceline.types import GREEDY, Draft, SamplingParams, Work
from tests.fixtures.backends import assert_drafts_change_nothing, cpu_backend
from tests.fixtures.pairs import VOCABULARY, write_pair

ABSENT = -3e38
PROMPT = [5, 6, 7, 300]
LISTS = VOCABULARY // LIST
PARAMS = [GREEDY, SamplingParams(temperature=1.2, seed=1), SamplingParams(temperature=1.0, top_k=20, seed=4)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_pair(tmp_path_factory.mktemp("pair"), "31b", seed=3, head="dense", text=True)


@pytest.fixture
def small_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even tiny heads get an index."""
    monkeypatch.setattr(head_index, "LEAST_TOKENS", VOCABULARY)


def draft(backend: CpuBackend, length: int = 1, params: SamplingParams = GREEDY) -> tuple[tuple[int, ...], np.ndarray]:
    """Tokens drafted after the prompt, and the logits of the last step."""
    slot = backend.open_slot()
    try:
        (first,) = backend.run([Work(slot, 0, PROMPT, params)])
        (result,) = backend.run([Work(slot, len(PROMPT), first.sampled, params, Draft(length=length))])
        return result.drafted, backend._decoder.last_draft_step(0)[0]
    finally:
        backend.close_slot(slot)


@pytest.mark.parametrize("quant", ["f32", "bf16", "q8"])
def test_the_lists_with_the_best_means_have_the_whole_heads_logits(
    pair: tuple[Path, Path], quant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, whole = draft(cpu_backend(*pair, quant))
    assert (whole > ABSENT).all()
    monkeypatch.setattr(head_index, "LEAST_TOKENS", VOCABULARY)
    (drafted,), some = draft(cpu_backend(*pair, quant))
    scored = np.flatnonzero(some > ABSENT)
    assert len(scored) == LISTS // head_index.CHOSEN * LIST
    np.testing.assert_array_equal(some[scored].view(np.uint32), whole[scored].view(np.uint32))
    assert drafted == scored[some[scored].argmax()]
    if quant == "f32":
        head = TensorRef("x", "F32", (VOCABULARY, 32), *embedding(pair[1]))
        tokens = build_index(head).tokens
        best = np.argsort(-whole[tokens].mean(1))[: LISTS // head_index.CHOSEN]
        assert set(scored) == set(tokens[best].ravel())


def embedding(folder: Path) -> tuple[Path, int, int]:
    """Where a drafter's head stands: file, offset and bytes."""
    ref = paceline.checkpoint.Checkpoint.open(folder).tensors["model.embed_tokens.weight"]
    return ref.path, ref.offset, ref.bytes


@pytest.mark.parametrize("params", PARAMS)
def test_all_lists_are_the_whole_head(
    pair: tuple[Path, Path], params: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, logits = draft(cpu_backend(*pair, "q8"), 3, params)
    monkeypatch.setattr(head_index, "LEAST_TOKENS", VOCABULARY)
    monkeypatch.setattr(head_index, "CHOSEN", 1)
    others, other = draft(cpu_backend(*pair, "q8", threads=2), 3, params)
    assert tokens == others
    np.testing.assert_array_equal(logits.view(np.uint32), other.view(np.uint32))


@pytest.mark.usefixtures("small_heads")
@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("quant", ["f32", "q4"])
def test_the_text_is_the_same(pair: tuple[Path, Path], quant: str, params: SamplingParams) -> None:
    prompts = [PROMPT, [9, 8, 7], [400]]
    backend = cpu_backend(*pair, quant, slots=3, threads=2)
    assert_drafts_change_nothing(backend, prompts, params)


@pytest.mark.usefixtures("small_heads")
def test_a_row_of_a_batch_drafts_what_it_drafts_alone(pair: tuple[Path, Path]) -> None:
    backend = cpu_backend(*pair, "q8", slots=3, threads=2)
    prompts = [PROMPT, [9, 8, 7], [400, 2]]

    def drafts(prompts: list[list[int]]) -> list[tuple[int, ...]]:
        slots = [backend.open_slot() for _ in prompts]
        firsts = backend.run([Work(slot, 0, p, GREEDY) for slot, p in zip(slots, prompts, strict=True)])
        works = [
            Work(slot, len(p), first.sampled, GREEDY, Draft(length=4))
            for slot, p, first in zip(slots, prompts, firsts, strict=True)
        ]
        results = backend.run(works)
        for slot in slots:
            backend.close_slot(slot)
        return [result.drafted for result in results]

    assert drafts(prompts) == [drafts([p])[0] for p in prompts]


@pytest.mark.usefixtures("small_heads")
def test_converted_and_kept_files_hold_the_index(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "packs"))
    monkeypatch.setattr("paceline.backends.cpu.sources.LEAST_BYTES", 0)
    convert(*pair, tmp_path / "out", "q8", threads=2)
    given = {"drafter": str(pair[1]), "quant": "q8", "context": 64}
    first, again = (paceline.load(str(pair[0]), **given).backend for _ in range(2))
    assert any((tmp_path / "packs").iterdir())
    converted = paceline.load(str(tmp_path / "out"), context=64).backend
    tokens, logits = draft(first, 3)
    assert (logits == np.float32(ABSENT)).any()
    for backend in (again, converted):
        others, other = draft(backend, 3)
        assert others == tokens
        np.testing.assert_array_equal(other.view(np.uint32), logits.view(np.uint32))


def test_which_heads_get_an_index() -> None:
    for shape in TARGETS:
        config = official_drafter(shape)
        if config.centroids:
            assert indexed(config) is config
        else:
            assert (indexed(config).centroids, indexed(config).centroid_top_k) == (8192, 1024)
    dense = official_drafter("26b")
    others = [
        replace(dense, vocab_size=vocabulary, draft_vocab_size=vocabulary)
        for vocabulary in (1 << 15, 3 << 16, (1 << 16) + LIST, (1 << 16) + 1)
    ]
    for other in (*others, replace(dense, draft_vocab_size=1 << 16), replace(dense, hidden_size=4096)):
        assert indexed(other) is other


def stored(folder: Path, values: np.ndarray, element: str) -> TensorRef:
    """A tensor in a file of its own."""
    data = {
        "F32": lambda: values,
        "F16": lambda: values.astype(np.float16),
        "BF16": lambda: to_bf16(values),
        "Q8_0": lambda: _cpu.quantise(values, "Q8_0"),
    }[element]()
    path = folder / element
    path.write_bytes(data.tobytes())
    return TensorRef("head", element, values.shape, path, 0, data.nbytes)


@pytest.mark.parametrize("element", ["F32", "F16", "BF16", "Q8_0"])
def test_lists_hold_similar_rows_and_every_token_once(tmp_path: Path, element: str) -> None:
    dice = np.random.default_rng(5)
    groups, columns = 1024, 192
    centers = np.repeat(dice.standard_normal((groups, columns), np.float32), LIST, axis=0)
    rows = (centers + 0.5 * dice.standard_normal(centers.shape, np.float32))[dice.permutation(len(centers))]
    rows = from_bf16(to_bf16(rows))
    index = build_index(stored(tmp_path, rows, element))
    assert index.tokens.shape == (groups, LIST)
    np.testing.assert_array_equal(np.sort(index.tokens, axis=None), np.arange(len(rows)))
    means = rows[index.tokens].mean(1)
    assert index.centroids is not None
    np.testing.assert_allclose(index.centroids, means, atol=0.01 * np.abs(means).max())
    spread = float((rows[index.tokens] - means[:, None]).var())
    random = rows[dice.permutation(len(rows))].reshape(groups, LIST, columns)
    assert spread < 0.5 * float((random - random.mean(1, keepdims=True)).var())


def test_numbers_that_are_none_do_not_stop_a_start(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((4 * LIST, 64), np.float32)
    rows[7], rows[9, 3], rows[50] = np.nan, np.inf, 1e30
    with np.errstate(all="raise"):
        index = build_index(stored(tmp_path, rows, "F32"))
    assert np.isfinite(index.centroids).all()
    np.testing.assert_array_equal(np.sort(index.tokens, axis=None), np.arange(len(rows)))
