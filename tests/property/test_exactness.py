"""The contract: text and logits do not depend on drafts, chunks, threads or the rest of the batch. Bit for bit."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from paceline import _cpu
from paceline.checkpoint.location import ASSETS
from paceline.engine.prefix_cache import PrefixCache
from paceline.engine.scheduler import Scheduler
from paceline.engine.sequence import Sequence
from paceline.engine.step import step
from paceline.errors import BackendError
from paceline.quant.recipes import RECIPES
from tests.fixtures.backends import (
    NATIVE,
    KnowingProposer,
    Run,
    any_backend,
    examples,
    proposers_of,
    run,
    sequence,
    unplaced,
)
from tests.fixtures.pairs import SHAPES, VOCABULARY, WINDOW, write_pair

TOKENS = 3 * WINDOW
SEEDS = (0, 1)

prompts = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=5 * WINDOW)
anything = settings(max_examples=examples(20), deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory):
    """Checkpoints by shape, seed and drafter head, written once."""
    root = tmp_path_factory.mktemp("pairs")

    @cache
    def get(shape: str, seed: int, head: str) -> tuple[Path, Path]:
        return write_pair(root / f"{seed}-{head}", shape, seed=seed, head=head)

    return get


def generate(folders: tuple[Path, Path], quant: str, prompt: list[int], *, depth: int, chunk: int, **other) -> Run:
    backend = any_backend(*folders, quant, **other)
    return run(backend, [sequence(backend, prompt, draft_tokens=depth, max_tokens=TOKENS)], chunk)[0]


def assert_same(one: Run, other: Run) -> None:
    assert one.tokens == other.tokens
    np.testing.assert_array_equal(one.logits.view(np.uint32), other.logits.view(np.uint32))  # bits, not values


@pytest.mark.parametrize("quant", RECIPES)
@anything
@given(
    shape=st.sampled_from(SHAPES),
    seed=st.sampled_from(SEEDS),
    head=st.sampled_from(["centroid", "dense"]),
    prompt=prompts,
    depth=st.integers(1, 8),
    chunk=st.integers(1, 32),
    threads=st.integers(1, 2),
    kv=st.sampled_from(["auto", "q8"]),
)
def test_drafts_chunks_and_threads(
    pairs,
    quant: str,
    shape: str,
    seed: int,
    head: str,
    prompt: list[int],
    depth: int,
    chunk: int,
    threads: int,
    kv: str,
) -> None:
    folders = pairs(shape, seed, head)
    plain = generate(folders, quant, prompt, depth=0, chunk=32, kv=kv)
    assert_same(plain, generate(folders, quant, prompt, depth=depth, chunk=chunk, threads=threads, kv=kv))


@pytest.mark.parametrize("quant", RECIPES)
@anything
@given(
    shape=st.sampled_from(SHAPES),
    prompt=prompts,
    depth=st.integers(1, 8),
    honesty=st.sampled_from([0.3, 0.7, 0.9, 1.0]),
    seed=st.integers(0, 999),
)
def test_any_pattern_of_acceptance(
    pairs, quant: str, shape: str, prompt: list[int], depth: int, honesty: float, seed: int
) -> None:
    """Random drafters are never right; one that knows the text and lies now and then makes every kind of round."""
    backend = any_backend(*pairs(shape, 0, "dense"), quant, threads=2)
    (plain,) = run(backend, [sequence(backend, prompt, max_tokens=TOKENS)])
    knowing = KnowingProposer(honesty, seed, VOCABULARY)
    one = sequence(backend, prompt, max_tokens=TOKENS, draft_tokens=depth)
    knowing.texts[one] = [*prompt, *plain.tokens]
    (drafted,) = run(backend, [one], proposers=[knowing])
    assert_same(plain, drafted)
    if honesty == 1.0:
        assert drafted.statistics.accepted == drafted.statistics.drafted > 0


@pytest.mark.parametrize("quant", RECIPES)
@anything
@given(
    shape=st.sampled_from(SHAPES),
    requests=st.lists(st.tuples(prompts, st.integers(0, 8)), min_size=2, max_size=4),
    chunk=st.integers(1, 32),
    kv=st.sampled_from(["auto", "q8"]),
)
def test_batch_invariance(
    pairs, quant: str, shape: str, requests: list[tuple[list[int], int]], chunk: int, kv: str
) -> None:
    folders = pairs(shape, 0, "dense")
    backend = any_backend(*folders, quant, slots=4, threads=2, kv=kv)
    together = run(backend, [sequence(backend, prompt, draft_tokens=depth) for prompt, depth in requests], chunk)
    for (prompt, _), mine in zip(requests, together, strict=True):
        assert_same(run(backend, [sequence(backend, prompt)], chunk=32)[0], mine)


@pytest.mark.parametrize("isa", _cpu.usable_isas() if NATIVE else [""])
@pytest.mark.parametrize("quant", RECIPES)
def test_every_depth_on_every_instruction_set(pairs, quant: str, isa: str) -> None:
    prompt = list(range(3, 3 + 2 * WINDOW))
    runs = [generate(pairs("e2b", 0, "centroid"), quant, prompt, depth=depth, chunk=8, isa=isa) for depth in range(9)]
    for other in runs[1:]:
        assert_same(runs[0], other)


def test_truncating_too_far_is_refused(pairs) -> None:
    backend = any_backend(*pairs("e2b", 0, "dense"), max_rows=16)
    s = sequence(backend, list(range(3, 103)))
    while s.in_prefill:
        step(backend, (), [s], 16)
    with pytest.raises(BackendError, match="sliding rings hold only"):
        backend.truncate(s.slot, 20)
    with pytest.raises(BackendError, match="cannot truncate"):
        backend.truncate(s.slot, 500)
    backend.truncate(s.slot, 95)


@pytest.mark.parametrize("quant", RECIPES)
@pytest.mark.parametrize("threads", [1, 2])
def test_bundled_pair_at_every_depth(quant: str, threads: int) -> None:
    """A trained pair accepts long lines, on a prompt longer than the sliding window, in chunks of any size."""
    folders = ASSETS / "tiny-python", ASSETS / "tiny-python-assistant"
    backend = any_backend(*folders, quant, threads=threads, context=512, max_rows=64)
    prompt = [*list(np.random.default_rng(0).integers(6, 4096, 150)), 10, 20, 30, 40]
    runs = [
        run(backend, [sequence(backend, prompt, draft_tokens=depth, max_tokens=40)], chunk=64 - 7 * depth)[0]
        for depth in range(9)
    ]
    for other in runs[1:]:
        assert_same(runs[0], other)
    assert max(other.statistics.acceptance_length for other in runs) > 1.2


@pytest.mark.parametrize("head", ["centroid", "dense"])
def test_drafter_with_damaged_weights(pairs, tmp_path: Path, head: str) -> None:
    target, drafter = pairs("e2b", 0, head)
    damaged = tmp_path / "damaged"
    shutil.copytree(drafter, damaged)
    tensors = load_file(damaged / "model.safetensors")
    tensors["pre_projection.weight"][0, 0] = np.nan
    save_file(tensors, damaged / "model.safetensors")
    prompt = list(range(3, 30))
    plain = generate((target, drafter), "f32", prompt, depth=0, chunk=32)
    assert_same(plain, generate((target, damaged), "f32", prompt, depth=4, chunk=32))


@pytest.mark.parametrize("kv", ["auto", "f32", "q8"])
def test_long_contexts(pairs, kv: str) -> None:
    """Attention of few rows to many positions is shared by all threads, and that of a whole chunk is not."""
    folders = pairs("e2b", 0, "centroid")
    prompt = [int(token) for token in np.random.default_rng(1).integers(3, VOCABULARY, 4500)]
    most = {"context": 5000, "max_rows": 256, "kv": kv}

    def logits(chunk: int, threads: int, depth: int) -> Run:
        backend = any_backend(*folders, "q4", threads=threads, **most)
        return run(backend, [sequence(backend, prompt, draft_tokens=depth, max_tokens=6)], chunk)[0]

    plain = logits(chunk=256, threads=1, depth=0)
    assert_same(plain, logits(chunk=5, threads=2, depth=3))
    assert_same(plain, logits(chunk=100, threads=4, depth=1))


@pytest.mark.parametrize(("quant", "kv"), [("f32", "auto"), ("q4", "auto"), ("q4", "q8")])
@anything
@given(
    shape=st.sampled_from(SHAPES),
    first=prompts,
    common=st.integers(0, 60),
    own=prompts,
    depth=st.integers(0, 8),
    chunk=st.integers(1, 32),
)
def test_cached_prefixes(
    pairs, quant: str, kv: str, shape: str, first: list[int], common: int, own: list[int], depth: int, chunk: int
) -> None:
    folders = pairs(shape, 0, "centroid")
    backend = any_backend(*folders, quant, slots=2, kv=kv)
    scheduler = Scheduler(backend, proposers_of(backend), chunk, prefix_cache=PrefixCache(backend, 1 << 30))
    before = queued(scheduler, first * 3, depth)
    prompt = [*before.tokens[:common], *own]  # a branch anywhere: in the prompt, in its text, or right behind it
    for _ in range(3):  # the second and third time, more and more is kept
        other = queued(scheduler, prompt, depth)
        expected = generate(folders, quant, prompt, depth=0, chunk=chunk, kv=kv)
        assert_same(Run(other.generated, np.array(other.rows), other.statistics), expected)
    assert len(prompt) < 20 or other.statistics.cached_tokens > 0


def queued(scheduler: Scheduler, prompt: list[int], depth: int) -> Sequence:
    """Run one sequence through a scheduler to its end."""
    one = unplaced(scheduler.backend, prompt, draft_tokens=depth, max_tokens=TOKENS)
    scheduler.submit(one)
    while scheduler.busy:
        scheduler.tick()
    return one
