"""Sampled tokens have the target's distribution: chi-square tests over many continuations of one prompt.

That text does not depend on drafts (`test_sampled_exactness`) says nothing about the sampling itself. Here every
continuation of three tokens of a toy model has a known probability: a product of three softmaxes, computed from plain
passes over all prefixes by a few lines that share nothing with `decode/sampler.py`. Seeds are fixed.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from paceline.backends.base import Backend
from paceline.types import Draft, SamplingParams, Work
from tests.fixtures import pairs
from tests.fixtures.backends import NATIVE, all_logits, any_backend, only_native

COUNT = 60_000 if NATIVE else 4_000
LEAST_P = 1e-3
LENGTH = 3  # tokens of a continuation
SLOTS = 128
PROMPT = [3, 1, 4, 1, 5, 9]

FULL = SamplingParams(temperature=1.0)
CUT = SamplingParams(temperature=1.3, top_k=10, top_p=0.9)
HOT = SamplingParams(temperature=2.5, top_p=0.95)


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory):
    """Backends by vocabulary and drafter head."""
    root = tmp_path_factory.mktemp("toys")

    @cache
    def get(vocabulary: int, head: str) -> Backend:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pairs, "VOCABULARY", vocabulary)
            folders = pairs.write_pair(root / f"{vocabulary}-{head}", "12b", 1, head)
        return any_backend(*folders, slots=SLOTS)

    return get


def contexts(backend: Backend) -> list[np.ndarray]:
    """The target's logits after PROMPT and 0, 1 and 2 tokens more: [V], [V, V], [V, V, V]."""
    vocabulary = range(backend.info.vocab_size)
    slot = backend.open_slot()
    none = all_logits(backend, slot, PROMPT)[-1]
    one, two = [], []
    for first in vocabulary:
        for second in vocabulary:
            backend.truncate(slot, len(PROMPT))
            rows = all_logits(backend, slot, [first, second], len(PROMPT))
            two.append(rows[1])
        one.append(rows[0])
    backend.close_slot(slot)
    return [none, np.array(one), np.array(two).reshape(len(vocabulary), len(vocabulary), -1)]


def continuations(backend: Backend, params: SamplingParams, draft: Draft) -> tuple[np.ndarray, int]:
    """How often each continuation [V] * LENGTH comes for seeds 0, 1, ..., and how many drafted tokens were accepted."""
    counts = np.zeros((backend.info.vocab_size,) * LENGTH, np.int64)
    slots = [backend.open_slot() for _ in range(SLOTS)]
    backend.run([Work(slot, 0, PROMPT[:-1]) for slot in slots])
    accepted = 0
    for start in range(0, COUNT, SLOTS):
        texts: dict[int, list[int]] = {slot: [] for slot in slots[: COUNT - start]}
        while running := [slot for slot in texts if len(texts[slot]) < LENGTH]:
            works = []
            for slot in running:
                tokens = [*PROMPT, *texts[slot]]
                seeded = replace(params, seed=start + slots.index(slot))
                used = draft if texts[slot] else Draft()
                works.append(Work(slot, len(tokens) - 1, tokens[-1:], seeded, used))
            for slot, result in zip(running, backend.run(works), strict=True):
                texts[slot] += result.sampled
                accepted += result.accepted
        for slot, tokens in texts.items():
            counts[tuple(tokens[:LENGTH])] += 1
            backend.truncate(slot, len(PROMPT) - 1)
    for slot in slots:
        backend.close_slot(slot)
    return counts, accepted


def softmax(logits: np.ndarray, s: SamplingParams) -> np.ndarray:
    """Probabilities [..., vocabulary] by the definitions of temperature, top-k and top-p, in float64."""
    p = np.exp((logits.astype(np.float64) - logits.max(-1, keepdims=True)) / s.temperature)
    ranks = np.argsort(np.argsort(-p, axis=-1, kind="stable"), axis=-1)
    if s.top_k:
        p = np.where(ranks < s.top_k, p, 0)
    p /= p.sum(-1, keepdims=True)
    order = np.argsort(-p, axis=-1, kind="stable")
    before = np.cumsum(np.take_along_axis(p, order, -1), axis=-1) - np.take_along_axis(p, order, -1)
    p = np.where(np.take_along_axis(before, ranks, -1) < s.top_p, p, 0)
    return p / p.sum(-1, keepdims=True)


def chances(tables: list[np.ndarray], s: SamplingParams) -> np.ndarray:
    """The probability of each continuation [vocabulary] * LENGTH."""
    first, second, third = (softmax(table, s) for table in tables)
    return first[:, None, None] * second[:, :, None] * third


def p_value(counts: np.ndarray, p: np.ndarray) -> float:
    """Of Pearson's chi-square test; cells of less than 5 are put together until they are not."""
    counts, expected = counts.ravel().astype(np.float64), p.ravel() * counts.sum()
    if counts[expected == 0].any():
        return 0.0
    counts, expected = counts[expected > 0], expected[expected > 0]
    small = expected < 5
    group = (expected[small].cumsum() / 10).astype(np.int64)  # each has at least 10 - 5, but for the last
    group = np.minimum(group, max(0, group.max(initial=0) - 1))
    pooled = [np.bincount(group, values[small]) for values in (counts, expected)] if small.any() else [[], []]
    seen, due = np.append(counts[~small], pooled[0]), np.append(expected[~small], pooled[1])
    statistic = float(((seen - due) ** 2 / due).sum())
    halves = torch.tensor([(len(due) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(halves[0], halves[1]))


@pytest.mark.parametrize(
    ("params", "vocabulary", "head"), [(FULL, 16, "dense"), (CUT, 16, "dense"), (HOT, 32, "centroid")]
)
def test_sampled_text_has_the_targets_distribution(toy, params: SamplingParams, vocabulary: int, head: str) -> None:
    """While the pair's drafter drafts; a high temperature, or a small vocabulary, so that some drafts are accepted."""
    backend = toy(vocabulary, head)
    tables = contexts(backend)
    counts, accepted = continuations(backend, params, Draft(length=2))
    assert counts.sum() == COUNT
    assert accepted > 0.01 * COUNT
    assert p_value(counts, chances(tables, params)) > LEAST_P
    # And a little more or less temperature would have been noticed.
    for other in (1.1, 0.9) if NATIVE else ():
        wrong = chances(tables, replace(params, temperature=params.temperature * other))
        assert p_value(counts, wrong) < 1e-9


@only_native
def test_p_values_are_right_about_multinomials() -> None:
    """They are uniform for what has the distribution, and small for what has not."""
    random = np.random.default_rng(0)
    p = random.dirichlet(np.full(1000, 0.3))
    values = [p_value(random.multinomial(20_000, p), p) for _ in range(200)]
    assert 0.4 < np.mean(values) < 0.6
    assert 0.03 < np.mean(np.array(values) < 0.1) < 0.2
    assert p_value(random.multinomial(200_000, 0.98 * p + 0.02 / 1000), p) < 1e-9
    impossible = np.zeros(4)
    impossible[:2] = 0.5
    assert p_value(np.array([50, 50, 0, 0]), impossible) > LEAST_P
    assert p_value(np.array([50, 49, 1, 0]), impossible) == 0
