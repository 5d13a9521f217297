"""Whole models on the kernels: against transformers, and bit for bit against themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from paceline.decode.sampler import sample
from paceline.types import Draft, SamplingParams, Work
from tests.fixtures.backends import torch_backend
from tests.parity.test_transformers import Case, assert_close, case, feed, prompt  # noqa: F401


@torch.no_grad()
def test_logits(case: Case) -> None:  # noqa: F811
    backend = torch_backend(case.target, None)
    tokens = prompt(16)
    ours = feed(backend, backend.open_slot(), tokens)
    assert_close(ours, case.hf_target(input_ids=torch.from_numpy(tokens).long()[None]).logits[0])


def test_a_round_gives_the_bits_of_single_steps(folders) -> None:
    backend = torch_backend(*folders("e2b"), "q4", slots=2)
    first, second = backend.open_slot(), backend.open_slot()
    tokens = prompt(9)
    params = SamplingParams(temperature=0.9, top_k=40, top_p=0.95, seed=4)
    backend.run([Work(second, 0, tokens[:2].tolist()), Work(first, 0, tokens.tolist())])
    backend.run([Work(second, 2, tokens[2:].tolist(), params)])
    (round,) = backend.run([Work(second, 9, [7], params, Draft(length=2, simulated=2), logits=True)])
    assert len(round.drafted) == 2
    for row, token in enumerate([7, *round.drafted]):
        alone = feed(backend, first, np.array([token]), 9 + row)[0]
        assert np.array_equal(alone.view(np.uint32), round.logits[row].view(np.uint32))
    assert round.sampled == (*round.drafted, sample(alone, params, 12))


def test_tall_passes_give_the_same_bits(folders, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    for tallest in (16, 32):
        backend = torch_backend(folders("26b")[0], None, "bf16", slots=2)
        monkeypatch.setattr(backend, "_tallest", tallest)
        drafts = [Draft(tuple(prompt(9, seed).tolist()), simulated=9) for seed in range(2)]
        works = [Work(backend.open_slot(), 0, [7], SamplingParams(), draft, logits=True) for draft in drafts]
        rows.append(np.array([result.logits for result in backend.run(works)]))
    assert np.array_equal(rows[0].view(np.uint32), rows[1].view(np.uint32))
