"""Perplexity and KL divergence against transformers, on a random checkpoint that transformers wrote."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from paceline.bench.evaluation import ROWS, LogitsFile, compare, cut, record
from tests.fixtures.backends import any_backend
from tests.fixtures.pairs import VOCABULARY, write_pair
from tests.models.test_parity import read_pair


@torch.no_grad()
def test_scores(tmp_path: Path) -> None:
    """Windows longer than a pass and than the sliding window, the last one shorter."""
    target, drafter = write_pair(tmp_path, "e2b", seed=3)
    reference = read_pair(target, drafter).hf_target
    text = np.random.default_rng(1).integers(3, VOCABULARY, 150).tolist()
    windows = cut([text], 2, 150, 2 * ROWS)
    assert [window.positions for window in windows] == [63, 63, 24]
    with LogitsFile(VOCABULARY, 150) as kept:
        ours = record(any_backend(target, None, "f32", max_rows=ROWS), windows, kept, lambda _: None)
        rough = compare(any_backend(target, None, "q4", max_rows=ROWS), windows, kept, lambda _: None)
        kept.rewind()
        logits = [reference(input_ids=torch.tensor([window.tokens])).logits[0, :-1].double() for window in windows]
        targets = torch.tensor([token for window in windows for token in window.tokens[1:]])
        theirs = torch.cat(logits)
        assert np.abs(kept.read(150) - theirs.numpy()).max() <= 1e-4 * theirs.abs().max()
    assert np.mean(ours.loss) == pytest.approx(float(cross_entropy(theirs, targets)), rel=1e-5)
    # q4 is measured against our logits in f32; against those of transformers the figures are the same
    with LogitsFile(VOCABULARY, 150) as kept:
        kept.write(theirs.numpy())
        again = compare(any_backend(target, None, "q4", max_rows=ROWS), windows, kept, lambda _: None)
    assert np.mean(again.kl) == pytest.approx(np.mean(rough.kl), rel=1e-3)
    assert np.mean(rough.kl) > 1e-3
    backend = any_backend(target, None, "q4", max_rows=ROWS)
    with LogitsFile(VOCABULARY, 150) as kept:
        record(backend, windows, kept, lambda _: None)
        kept.rewind()
        q4 = torch.from_numpy(kept.read(150).copy()).double()
    expected = kl_div(log_softmax(q4, -1), log_softmax(theirs, -1), log_target=True, reduction="batchmean")
    assert np.mean(again.kl) == pytest.approx(float(expected), rel=1e-6)
