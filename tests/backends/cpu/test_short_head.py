"""Dense draft heads of which only some tokens are computed: what is computed is right, and the text the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from paceline.backends.cpu.backend import CpuBackend
from paceline.types import GREEDY, Draft, SamplingParams, Work
from tests.fixtures import pairs
from tests.fixtures.backends import cpu_backend, run, sequence
from tests.fixtures.pairs import VOCABULARY, write_pair

PANEL = 16
ABSENT = -3e38
PROMPT = [5, 6, 7, 300]


@pytest.fixture(scope="module", params=["f32", "q8"])
def backend(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CpuBackend:
    pair = write_pair(tmp_path_factory.mktemp("pair"), "31b", seed=3, head="dense")
    return cpu_backend(*pair, request.param, slots=3, threads=2)


def draft(backend: CpuBackend, length: int = 3, params: SamplingParams = GREEDY) -> tuple[tuple[int, ...], np.ndarray]:
    """Tokens drafted after the prompt, and the logits of the last step."""
    slot = backend.open_slot()
    try:
        (first,) = backend.run([Work(slot, 0, PROMPT, params)])
        (result,) = backend.run([Work(slot, len(PROMPT), first.sampled, params, Draft(length=length))])
        return result.drafted, backend._decoder.last_draft_step(0)[0]
    finally:
        backend.close_slot(slot)


def test_what_is_listed_has_the_whole_heads_logits(backend: CpuBackend) -> None:
    backend._decoder.shorten_head(VOCABULARY, 0)
    _, whole = draft(backend, length=1)
    assert (whole > ABSENT).all()
    backend._decoder.shorten_head(40, 9)
    _, some = draft(backend, length=1)
    listed = some > ABSENT
    assert 0 < listed.sum() < VOCABULARY
    np.testing.assert_array_equal(some[listed].view(np.uint32), whole[listed].view(np.uint32))


def test_a_list_of_all_tokens_is_the_whole_head(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, "31b", seed=3, head="dense")
    whole, listed = (cpu_backend(*pair, "q8") for _ in range(2))
    listed._decoder.shorten_head(VOCABULARY, 0)
    for params in (GREEDY, SamplingParams(temperature=1.0, top_k=20, seed=4)):
        (tokens, logits), (others, other) = (draft(one, params=params) for one in (whole, listed))
        assert tokens == others
        np.testing.assert_array_equal(logits.view(np.uint32), other.view(np.uint32))


def test_tokens_of_recent_texts_are_listed_by_panels(backend: CpuBackend) -> None:
    backend._decoder.shorten_head(20, 4)
    _, logits = draft(backend, length=1)
    listed = np.flatnonzero(logits > ABSENT)
    panels = set(listed // PANEL)
    assert {0, 1, 300 // PANEL} <= panels  # the frequent ones, and one of the prompt
    assert len(listed) == PANEL * len(panels)
    assert len(panels) <= 2 + 4


def test_old_panels_leave(backend: CpuBackend) -> None:
    backend._decoder.shorten_head(PANEL, 2)
    slot = backend.open_slot()
    tokens = [16 * panel for panel in (5, 6, 5, 7)]  # 5 was seen again
    backend.run([Work(slot, 0, tokens)])
    backend.close_slot(slot)
    slot = backend.open_slot()
    backend.run([Work(slot, 0, [1], GREEDY)])
    (result,) = backend.run([Work(slot, 1, [2], GREEDY, Draft(length=1))])
    backend.close_slot(slot)
    panels = set(np.flatnonzero(backend._decoder.last_draft_step(0)[0] > ABSENT) // PANEL)
    assert 0 in panels
    assert 6 not in panels
    assert len(panels) <= 3
    assert result.drafted[0] // PANEL in panels


@pytest.mark.parametrize("sizes", [(1, 0), (16, 1), (64, 8)])
@pytest.mark.parametrize("params", [GREEDY, SamplingParams(temperature=1.2, seed=1)])
def test_the_text_is_the_same(backend: CpuBackend, sizes: tuple[int, int], params: SamplingParams) -> None:
    prompts = [PROMPT, [9, 8, 7]]
    plain = run(backend, [sequence(backend, p, params=params) for p in prompts])
    backend._decoder.shorten_head(*sizes)
    drafted = run(backend, [sequence(backend, p, params=params, draft_tokens=4) for p in prompts])
    for one, other in zip(plain, drafted, strict=True):
        assert one.tokens == other.tokens
        np.testing.assert_array_equal(one.logits.view(np.uint32), other.logits.view(np.uint32))
        assert other.statistics.drafted


@pytest.mark.parametrize(("shape", "shortened"), [("26b", True), ("31b", False)])
def test_large_heads_beside_a_mixture_start_shortened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: str, shortened: bool
) -> None:
    monkeypatch.setattr(pairs, "VOCABULARY", 1 << 16)
    _, logits = draft(cpu_backend(*write_pair(tmp_path, shape, seed=3, head="dense"), "q8"), length=1)
    assert (logits[:8192] > ABSENT).all()
    assert (logits == np.float32(ABSENT)).any() == shortened


def test_heads_that_cannot_be_shortened(tmp_path: Path, backend: CpuBackend) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        backend._decoder.shorten_head(0, 0)
    pair = write_pair(tmp_path / "centroid", "e2b", seed=3, head="centroid")
    with pytest.raises(ValueError, match="centroids"):
        cpu_backend(*pair)._decoder.shorten_head(16, 16)
    with pytest.raises(ValueError, match="no drafter"):
        cpu_backend(pair[0], None)._decoder.shorten_head(16, 16)
