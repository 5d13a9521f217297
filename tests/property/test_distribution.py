"""What is drawn has the target's distribution, drafts or none: chi-square tests over 200,000 continuations each.

Text that does not depend on the drafter (`test_sampled_exactness`) says nothing about the draw itself, and the
rejection rule promises a distribution only. Here every continuation of three tokens of a toy model has a known
probability: a product of three softmaxes, computed from plain passes over all prefixes by a few lines that share
nothing with `decode/sampler.py`. Seeds are fixed, so a test that passes goes on passing.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from paceline.decode.rules import Coupled
from paceline.decode.sampler import gumbel, uniform_bits
from paceline.types import SamplingParams
from tests.parity import fixtures
from tests.property.sampled import Count, Job, ManySeeds, Mirror, contexts, in_parallel
from tests.support import NATIVE, Recorder, any_backend, only_native, run, sequence

COUNT = 200_000 if NATIVE else 4_000
LEAST_P = 1e-3
WORKERS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

FULL = SamplingParams(temperature=1.0)
CUT = SamplingParams(temperature=1.3, top_k=10, top_p=0.9)


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory):
    """Pairs by vocabulary, drafter head and seed, and the target's logits behind all short contexts."""
    root = tmp_path_factory.mktemp("toys")

    @cache
    def get(vocabulary: int, head: str, seed: int) -> tuple[tuple[Path, Path], list[np.ndarray]]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fixtures, "VOCABULARY", vocabulary)
            folders = fixtures.write_pair(root / f"{vocabulary}-{head}-{seed}", "12b", seed, head)
        return folders, contexts(folders)

    return get


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


def report(what: str, drawn: Count, p: np.ndarray) -> float:
    value = p_value(drawn.continuations, p)
    shares = " ".join(f"{n / drawn.rounds:.3f}" for n in drawn.accepted)
    print(f"{what}: p = {value:.4f}; accepted by depth {shares} of {drawn.rounds} rounds")
    return value


def assert_distributed(job: Job, tables: list[np.ndarray]) -> Count:
    drawn = in_parallel(job, COUNT, WORKERS)
    assert drawn.continuations.sum() == COUNT
    p = chances(tables, job.sampling)
    assert report(f"{job.rule}, {job.sampling}", drawn, p) > LEAST_P
    # And it would have been noticed, had it been drawn a little too hot or too cold, or with a little less of the tail.
    for other in (1.03, 0.97) if NATIVE else ():
        wrong = chances(tables, replace(job.sampling, temperature=job.sampling.temperature * other))
        assert p_value(drawn.continuations, wrong) < 1e-9
    return drawn


@pytest.mark.parametrize("sampling", [FULL, CUT], ids=["full", "cut"])
@pytest.mark.parametrize("rule", ["coupled", "rejection"])
def test_drafts_of_a_good_drafter_leave_the_distribution_alone(toy, rule: str, sampling: SamplingParams) -> None:
    folders, tables = toy(16, "dense", 1)
    drawn = assert_distributed(Job(folders, rule, sampling, 3, tables[1:]), tables)
    assert 0.5 < drawn.accepted[0] / drawn.rounds < 0.85
    assert drawn.accepted[2] > 0.05 * drawn.rounds


def test_drafts_of_the_native_drafter_leave_the_distribution_alone(toy) -> None:
    """A centroid head, which looks at 8 of 32 tokens; a high temperature, so that some of its drafts are accepted."""
    folders, tables = toy(32, "centroid", 10)
    drawn = assert_distributed(Job(folders, "rejection", SamplingParams(temperature=2.5, top_p=0.95), 2), tables)
    assert drawn.accepted[0] > 0.1 * drawn.rounds


@only_native
@pytest.mark.parametrize("mistake", ["shared noise", "arg max"])
def test_mistakes_are_found_out(toy, mistake: str) -> None:
    """The ratio test needs drafts drawn as it is told, by noise of their own; a fifth of the draws shows it."""
    folders, tables = toy(16, "dense", 1)
    drawn = in_parallel(Job(folders, mistake, FULL, 3, tables[1:]), COUNT // 5, WORKERS)
    assert report(mistake, drawn, chances(tables, FULL)) < 1e-9


@only_native
def test_the_test_itself_is_right_about_multinomials() -> None:
    """Its p values are uniform for what has the distribution, and small for what has not."""
    random = np.random.default_rng(0)
    p = random.dirichlet(np.full(1000, 0.3))
    values = [p_value(random.multinomial(20_000, p), p) for _ in range(200)]
    assert 0.4 < np.mean(values) < 0.6
    assert 0.03 < np.mean(np.array(values) < 0.1) < 0.2
    assert p_value(random.multinomial(COUNT, 0.98 * p + 0.02 / 1000), p) < 1e-9
    impossible = np.zeros(4)
    impossible[:2] = 0.5
    assert p_value(np.array([50, 50, 0, 0]), impossible) > LEAST_P
    assert p_value(np.array([50, 49, 1, 0]), impossible) == 0


@pytest.mark.parametrize("noise", [uniform_bits, gumbel])
def test_noise_of_many_seeds_is_the_noise_of_each(noise) -> None:
    """It is what makes these tests fast enough."""
    seeds = [*range(3000), 2**63 + 5, 2**64 - 1]
    many, ids = ManySeeds(noise, seeds, 32), np.array([0, 7, 16, 31], np.int32)
    for seed in (*seeds[::101], *seeds[-2:]):
        for stream, position in ((0, 6), (1, 7), (2, 8)):
            np.testing.assert_array_equal(many(seed, stream, position, ids), noise(seed, stream, position, ids))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("mirrors")
    return cache(lambda shape: any_backend(*fixtures.write_pair(root, shape, seed=1), slots=4))


@pytest.mark.parametrize("temperature", [0.0, 0.3, 0.7, 1.0, 1.5, 3.0])
@pytest.mark.parametrize("truncation", ["", "top_k", "top_p", "min_p", "all"])
@pytest.mark.parametrize("shape", ["e2b", "26b"])
def test_a_drafter_that_is_the_target_is_always_right(pairs, shape: str, temperature: float, truncation: str) -> None:
    """Noise shared by token loses nothing: what draws from the same distribution draws the same tokens."""
    backend = pairs(shape)
    cuts = {"top_k": 40, "top_p": 0.9, "min_p": 0.05}
    sampling = SamplingParams(temperature, **{name: cut for name, cut in cuts.items() if truncation in (name, "all")})
    mirror = Mirror(backend)
    sequences = [
        sequence(
            mirror,
            [seed, 7, 100],
            rule=Recorder(Coupled(replace(sampling, seed=seed), backend.draw)),
            draft_tokens=depth,
            max_tokens=40,
        )
        for seed, depth in enumerate((1, 3, 5, 8))
    ]
    for finished in run(mirror, sequences):
        assert finished.statistics.accepted == finished.statistics.drafted > 0
