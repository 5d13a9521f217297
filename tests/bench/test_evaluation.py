"""Windows, scores and their slow twins, on a backend without a model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from math import exp, log
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.backends.base import Backend
from paceline.bench import evaluation
from paceline.bench.evaluation import (
    ROWS,
    Choice,
    LogitsFile,
    Scores,
    Window,
    choose,
    compare,
    cut,
    decode_tokens_per_s,
    figures,
    log_softmax,
    record,
    share_out,
)
from paceline.cli.main import run
from paceline.errors import BackendError, SettingsError
from paceline.types import GREEDY, Work
from tests.fixtures.checkpoints import TARGET, target_weights, write
from tests.fixtures.scripted_backend import ScriptedBackend

VOCABULARY = 64
RANDOM = np.random.default_rng(0)
LENGTHS = (2, ROWS + 1, ROWS + 2, 3 * ROWS)  # one position; a whole pass; one more; several passes
WINDOWS = [Window(text, RANDOM.integers(0, VOCABULARY, length).tolist()) for text, length in enumerate(LENGTHS)]


def warmer(by: float) -> Backend:
    """A backend whose logits are those of the others times a number, and more for token 7."""

    def change(row: np.ndarray, tokens: list[int]) -> np.ndarray:
        return row * np.float32(by) + np.float32(2.5) * (np.arange(VOCABULARY) == 7)

    return ScriptedBackend(VOCABULARY, max_rows=ROWS, logits=change)


def slow_rows(backend: Backend, window: Window) -> list[list[float]]:
    """Logits one token at a time, as plain decoding gives them."""
    slot = backend.open_slot()
    rows = []
    for position, token in enumerate(window.tokens[:-1]):
        [result] = backend.run([Work(slot, position, [token], GREEDY, logits=True)])
        rows.append([float(logit) for logit in result.logits[0]])
    backend.close_slot(slot)
    return rows


def softmax(row: list[float]) -> list[float]:
    return [exp(logit) / sum(map(exp, row)) for logit in row]


# -- windows -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), st.integers(1, 300))
def test_positions_are_shared_out(available: list[int], positions: int) -> None:
    shares = share_out(available, positions)
    assert sum(shares) == min(positions, sum(available))
    assert all(0 <= share <= there for share, there in zip(shares, available, strict=True))
    rest = [share for share, there in zip(shares, available, strict=True) if share < there]
    assert not rest or max(shares) - min(rest) <= 1  # whoever could give more gives as much as anyone


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=4),
    st.one_of(st.none(), st.just(0)),
    st.integers(1, 120),
    st.integers(2, 20),
)
def test_windows_predict_each_token_once(lengths: list[int], bos: int | None, positions: int, context: int) -> None:
    texts = [[1000 * text + i + 1 for i in range(length)] for text, length in enumerate(lengths)]
    windows = cut(texts, bos, positions, context)
    first = 0 if bos is not None else 1
    assert sum(window.positions for window in windows) == min(positions, sum(length - first for length in lengths))
    for text, tokens in enumerate(texts):
        mine = [window for window in windows if window.text == text]
        predicted = [token for window in mine for token in window.tokens[1:]]
        assert predicted == tokens[first : first + len(predicted)]
        for window in mine:
            assert 2 <= len(window.tokens) <= context
            before = tokens[tokens.index(window.tokens[1]) - 1]
            assert window.tokens[0] == (before if bos is None else bos)


# -- scores ------------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_the_slow_twin() -> None:
    reference, candidate, seen = ScriptedBackend(VOCABULARY, max_rows=ROWS), warmer(1.7), []
    positions = sum(window.positions for window in WINDOWS)
    with LogitsFile(VOCABULARY, positions) as kept:
        ours = record(reference, WINDOWS, kept, seen.append)
        theirs = compare(candidate, WINDOWS, kept, seen.append)
        again = compare(candidate, WINDOWS, kept, lambda _: None)  # the file can be read more than once
    assert again == theirs
    assert seen == [1, 33, 65, 66, 98, 130, 161] * 2
    expected, found = Scores(), Scores()
    for window in WINDOWS:
        pairs = zip(window.tokens[1:], slow_rows(reference, window), slow_rows(candidate, window), strict=True)
        for target, first, second in pairs:
            p, q = softmax(first), softmax(second)
            expected.loss.append(-log(p[target]))
            found.loss.append(-log(q[target]))
            found.kl.append(sum(a * log(a / b) for a, b in zip(p, q, strict=True)))
            found.same.append(p.index(max(p)) == q.index(max(q)))
    assert ours.loss == pytest.approx(expected.loss, rel=1e-12)
    assert theirs.loss == pytest.approx(found.loss, rel=1e-12)
    assert theirs.kl == pytest.approx(found.kl, rel=1e-9)
    assert theirs.same == found.same
    assert 0 < sum(found.same) < positions
    assert (ours.kl, ours.same) == ([], [])


def test_a_model_is_like_itself() -> None:
    backend = ScriptedBackend(VOCABULARY, max_rows=ROWS)
    with LogitsFile(VOCABULARY, 200) as kept:
        record(backend, WINDOWS, kept, lambda _: None)
        scores = compare(backend, WINDOWS, kept, lambda _: None)
    assert set(scores.kl) == {0.0}
    assert all(scores.same)
    assert backend.open_slot() == 0  # slots are free again


def test_large_logits() -> None:
    row = np.array([3e38, -3e38, 0, 3e38], np.float32)
    assert log_softmax(row).tolist() == pytest.approx([-log(2), -6e38, -3e38, -log(2)])
    shifted = np.array([1e4, 1e4 + 1, 1e4 - 2], np.float32)
    assert log_softmax(shifted) == pytest.approx(log_softmax(shifted - 10000), abs=1e-12)


def test_figures_over_some_positions() -> None:
    scores = Scores([1.0, 2.0, 6.0], [0.0, 0.1, 0.5], [True, False, True])
    every = figures(scores, np.array([True, True, True]))
    assert every["perplexity"] == pytest.approx(exp(3))
    assert (every["kl_mean"], every["same_top_token"]) == pytest.approx((0.2, 2 / 3))
    assert every["kl_99_percent"] == pytest.approx(0.492)  # interpolated between the last two
    some = figures(scores, np.array([True, False, True]))
    assert (some["positions"], some["kl_mean"], some["same_top_token"]) == (2, 0.25, 1)
    assert figures(Scores([1e4]), np.array([True]))["perplexity"] is None  # JSON has no infinity


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_no_numbers(value: float) -> None:
    def damage(row: np.ndarray, tokens: list[int]) -> np.ndarray:
        row[5] = value if len(tokens) == 40 else row[5]
        return row

    backend = ScriptedBackend(VOCABULARY, max_rows=ROWS, logits=damage)
    with LogitsFile(VOCABULARY, 200) as kept, pytest.raises(BackendError, match="no numbers"):
        record(backend, WINDOWS, kept, lambda _: None)
    assert backend.open_slot() == 0


def test_speed_is_of_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    times = np.cumsum([0, 100] + [0, 0.25] * (evaluation.TIMED - 1)).tolist()
    monkeypatch.setattr(evaluation.time, "perf_counter", lambda: times.pop(0))
    works = []
    backend = ScriptedBackend(VOCABULARY, max_rows=ROWS, context=ROWS + 1, watch=works.extend)
    assert decode_tokens_per_s(backend, WINDOWS[3].tokens) == 4
    monkeypatch.undo()
    assert [len(work.tokens) for work in works] == [ROWS] + [1] * evaluation.TIMED
    assert {work.position for work in works[1:]} == {ROWS}
    assert backend.open_slot() == 0


# -- the file ----------------------------------------------------------------------------------------------------------


def test_no_file_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "cache"))
    with LogitsFile(4, 2) as kept:
        kept.write(np.ones((2, 4), np.float32))
        kept.rewind()
        assert kept.read(2).tolist() == [[1, 1, 1, 1]] * 2
        assert kept.nbytes == 32
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("kind", ["full", "file"])
def test_no_room(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "cache"))
    if kind == "full":
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    else:
        (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(SettingsError, match=r"cannot hold the reference's 1\.00 GB of logits \(.*fewer --positions"):
        LogitsFile(250_000, 1000)


# -- what is compared --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Folders of a checkpoint in f32, in bf16, and packed."""
    import torch
    from safetensors.torch import save_file

    root = tmp_path_factory.mktemp("stored")
    weights = target_weights()
    write(root / "f32", TARGET, weights)
    write(root / "bf16", TARGET, weights)
    halves = {name: torch.from_numpy(value).bfloat16() for name, value in weights.items()}
    save_file(halves, root / "bf16" / "model.safetensors")
    assert run(["convert", str(root / "bf16"), str(root / "packed")]) == 0
    return lambda name: str(root / name)


@pytest.mark.parametrize(
    ("model", "quants", "reference", "expected"),
    [
        ("bf16", [], None, (("bf16", "bf16"), ["q8", "q4"])),
        ("f32", [], None, (("f32", "f32"), ["bf16", "q8", "q4"])),
        ("bf16", [], "f32", (("bf16", "f32"), ["bf16", "q8", "q4"])),
        ("bf16", [], "q8", (("bf16", "q8"), ["q4"])),
        ("bf16", ["q4", "q8", "q4"], None, (("bf16", "bf16"), ["q4", "q8"])),
        ("bf16", [], "f32-folder", (("f32", "f32"), ["bf16", "q8", "q4"])),
        ("bf16", [], "packed-folder", (("packed", "auto"), ["bf16", "q8", "q4"])),
        ("packed", [], "bf16-folder", (("bf16", "bf16"), ["auto"])),
    ],
)
def test_what_is_compared(
    stored: Callable[[str], str], model: str, quants: list[str], reference: str | None, expected: tuple
) -> None:
    if reference and reference.endswith("-folder"):
        reference = stored(reference.removesuffix("-folder"))
    against, choices = choose(stored(model), quants, reference)
    (named, precision), chosen = expected
    assert against == Choice(stored(named), precision)
    listed = [choice.quant for choice in choices if choice.quant not in ("q6", "q5")]  # the ends of the list suffice
    assert listed == chosen
    assert {choice.model for choice in choices} == {stored(model)}


def test_nothing_to_compare(stored: Callable[[str], str]) -> None:
    with pytest.raises(SettingsError, match="holds packed weights alone; name the model to compare it with"):
        choose(stored("packed"), [], None)
    with pytest.raises(SettingsError, match="no format smaller than q4"):
        choose(stored("bf16"), [], "q4")
