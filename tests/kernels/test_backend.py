"""Whole models on the kernels: against transformers, and bit for bit against themselves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from paceline.decode.sampler import draw
from paceline.types import Batch, SamplingParams
from tests.parity.test_native import Case, anchors, assert_close, case, feed, prompt  # noqa: F401
from tests.support import torch_backend


@torch.no_grad()
def test_logits(case: Case) -> None:  # noqa: F811
    backend = torch_backend(case.target, None)
    tokens = prompt(16)
    ours = feed(backend, backend.open_slot(), tokens).logits
    assert_close(np.asarray(ours), case.hf_target(input_ids=torch.from_numpy(tokens).long()[None]).logits[0])


def test_a_round_checks_what_it_drafted_with_the_bits_of_single_steps(folders) -> None:
    backend = torch_backend(*folders("e2b"), "q4", slots=2)
    first, second = backend.open_slot(), backend.open_slot()
    tokens = prompt(9)
    feed(backend, second, tokens[:2])
    feed(backend, first, tokens)
    hidden = feed(backend, second, tokens[2:], 2).hidden[-1:]
    at = np.array([second], np.int32), np.array([9], np.int32)
    sampling = SamplingParams(temperature=0.9, top_k=40, top_p=0.95, seed=4)
    plan = anchors(at, 7, hidden, 2)
    drafts = backend.draft(replace(plan, samplings=(sampling,)))
    line = np.array([7, *drafts.tokens[0]], np.int32)
    assert line[1:].max() < 0  # stand-ins
    batch = Batch(np.repeat(at[0], 3), 9 + np.arange(3, dtype=np.int32), line, np.ones(3, np.bool_), (sampling,) * 3)
    together = backend.forward(batch).logits
    rows = np.array(together)  # the next pass overwrites them
    guesses = drafts.settled().tokens[0].tolist()
    assert len(guesses) == 2
    assert min(guesses) >= 0
    for row, token in enumerate([7, *guesses]):
        (alone,) = feed(backend, first, np.array([token], np.int32), 9 + row).logits
        assert np.array_equal(np.asarray(alone).view(np.uint32), rows[row].view(np.uint32))
        assert backend.draw(together[row], sampling, 10 + row) == draw(np.asarray(alone), sampling, 10 + row)


def test_tall_passes_give_the_same_bits(folders, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    for tallest in (16, 32):
        backend = torch_backend(folders("26b")[0], None, "bf16")
        monkeypatch.setattr(backend, "_tallest", tallest)
        rows.append(np.asarray(feed(backend, backend.open_slot(), prompt(20)).logits))
    assert np.array_equal(rows[0].view(np.uint32), rows[1].view(np.uint32))
