"""Every kernel against its plain form in PyTorch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from paceline.backends.torch import ops
from paceline.backends.torch.device_sampler import pack_settings, sample_rows
from paceline.backends.torch.kernels import matmul as matmul_kernels
from paceline.decode.sampler import sample as reference_sample
from paceline.models.matrix import EXACT, pack
from paceline.types import SamplingParams
from tests.fixtures.reference_formats import random_blocks

FORMATS = ("f32", "bf16", "q8_0", "q4_0")
DTYPES = (torch.float32, torch.bfloat16)
EPS = 1e-6
anything = settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def twin(operation: Any, *arguments: Any) -> Any:
    """What the plain form gives."""
    with operation.set_kernel_enabled("cpu", enabled=False):
        return operation(*arguments)


def close(ours: Tensor, theirs: Tensor, like: torch.dtype | None = None) -> None:
    """Equal but for rounding to the type and the order of sums."""
    tolerance = 2e-5 if (like or theirs.dtype) == torch.float32 else 3e-2
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max().clamp(max=10)))


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def dtype_of(fmt: str) -> torch.dtype:
    return torch.float32 if fmt == "f32" else torch.bfloat16


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("m", "n", "k"), [(16, 48, 64), (16, 70, 96), (32, 33, 1088), (16, 9000, 32)])
def test_matmul(fmt: str, m: int, n: int, k: int) -> None:
    x, weights = random(m, k, dtype=dtype_of(fmt)), pack((random(n, k, seed=1) / k**0.5).numpy(), fmt)
    close(ops.matmul(x, *weights), twin(ops.matmul, x, *weights))
    for cap in (0.0, 3.0):
        close(ops.scores(x, *weights, cap), twin(ops.scores, x, *weights, cap), dtype_of(fmt))


@pytest.mark.parametrize("element", EXACT)
def test_blocks_of_files(element: str) -> None:
    """Any numbers, -128 too, and scales of both signs and many sizes."""
    weights = pack(random_blocks(70, 96, element, seed=1), EXACT[element], element)
    x = random(16, 96) / 1000  # products of which gelu's tails do not magnify the rounding
    close(ops.matmul(x, *weights), twin(ops.matmul, x, *weights))
    close(ops.gate_up(x, *weights), twin(ops.gate_up, x, *weights))


@pytest.mark.parametrize("fmt", FORMATS)
def test_products_are_batch_invariant(fmt: str) -> None:
    x, weights = random(48, 160, dtype=dtype_of(fmt)), pack(random(40, 160, seed=1).numpy(), fmt)
    whole = ops.matmul(x, *weights)
    for rows in ([0], [17, 3], [47, 20, 5, 11], list(range(30, 46))):
        padded = torch.full((16, 160), 7.0, dtype=x.dtype)
        padded[: len(rows)] = x[rows]
        assert torch.equal(ops.matmul(padded, *weights)[: len(rows)], whole[rows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [24, 64, 2112])
def test_norm_and_join(dtype: torch.dtype, size: int) -> None:
    x, branch = (random(5, size, dtype=dtype, seed=seed) for seed in range(2))
    first, second = (random(size, dtype=dtype, seed=seed) for seed in range(2, 4))
    close(ops.norm(x, first, EPS), twin(ops.norm, x, first, EPS))
    for following, scale in ((second, torch.tensor([0.75], dtype=dtype)), (second, None), (None, None)):
        ours = ops.join(x, branch, first, following, scale, EPS)
        theirs = twin(ops.join, x, branch, first, following, scale, EPS)
        close(ours[0], theirs[0])
        if following is not None:
            close(ours[1], theirs[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gated(dtype: torch.dtype) -> None:
    both = random(4, 2 * 1100, dtype=dtype) * 5
    gate, up = both.chunk(2, dim=-1)
    close(ops.gated(gate, up), twin(ops.gated, gate, up))


@pytest.mark.parametrize("fmt", FORMATS)
def test_gate_up(fmt: str) -> None:
    x, weights = random(32, 96, dtype=dtype_of(fmt)), pack((random(2 * 70, 96, seed=1) / 5).numpy(), fmt)
    close(ops.gate_up(x, *weights), twin(ops.gate_up, x, *weights))


@pytest.mark.parametrize("active", [1, 3, 8])
def test_choose(active: int) -> None:
    scores, scale = random(7, 20) * 2, random(20, seed=1).abs()
    ours, theirs = ops.choose(scores, scale, active), twin(ops.choose, scores, scale, active)
    close(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("rows", [16, 32])
def test_experts(fmt: str, rows: int) -> None:
    down_fmt = {"q4_0": "q8_0"}.get(fmt, fmt)  # the two may differ
    count, hidden, width, active = 6, 96, 40, 2
    x = random(rows, hidden, dtype=dtype_of(fmt))
    gate_up = pack((random(count * 2 * width, hidden, seed=1) / hidden**0.5).numpy(), fmt)
    down = pack((random(count * hidden, width, seed=2) / width**0.5).numpy(), down_fmt)
    weights = random(rows, active, seed=3).abs()
    chosen = torch.stack([torch.randperm(4)[:active] for _ in range(rows)]).int()  # two experts rest
    arguments = x, weights, chosen, *gate_up, *down, count
    close(ops.experts(*arguments), twin(ops.experts, *arguments))
    alone = x.clone(), weights.clone(), chosen.clone(), *arguments[3:]
    alone[2][1:] = 5  # others choose otherwise
    assert torch.equal(ops.experts(*alone)[0], ops.experts(*arguments)[0])


def memory(slots: int, kv_heads: int, ring: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return random(slots, kv_heads, ring, size, dtype=dtype), random(slots, kv_heads, ring, size, dtype=dtype, seed=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value_norm", [True, False])
@pytest.mark.parametrize(("stores", "has_values"), [(True, True), (True, False), (False, True)])
def test_heads(dtype: torch.dtype, stores: bool, has_values: bool, value_norm: bool) -> None:
    count, kv_heads, size, rows = 6, 2, 32, 5
    total = count + (kv_heads * (1 + has_values) if stores else 0)
    x = random(rows, total * size, dtype=dtype)
    norms = random(size, dtype=dtype, seed=2), random(size, dtype=dtype, seed=3) if stores else None
    angles = random(rows, size // 2, seed=4)
    rotate = angles.cos().to(dtype), angles.sin().to(dtype)
    slots, positions = torch.tensor([2, 2, 0, 0, 0]), torch.tensor([9, 10, 3, -1, -1])
    kept = [memory(3, kv_heads, 8, size, dtype) for _ in range(2)]
    at = slots, positions, count, EPS, value_norm
    close(ops.heads(x, *norms, *rotate, *kept[0], *at), twin(ops.heads, x, *norms, *rotate, *kept[1], *at))
    for ours, theirs in zip(*kept, strict=True):
        close(ours, theirs)
    assert stores == (not torch.equal(kept[0][0], memory(3, kv_heads, 8, size, dtype)[0]))


@st.composite
def batches(draw: Any) -> tuple[Tensor, Tensor]:
    """Slots and positions of 16 or 32 rows: a few runs of neighbouring positions, then padding."""
    height = draw(st.sampled_from([16, 32]))
    slots, positions = [], []
    for slot in draw(st.permutations(range(3))):
        start = draw(st.integers(0, 300))
        count = draw(st.integers(0, min(16, height - len(slots))))
        slots += [slot] * count
        step = draw(st.sampled_from([1, 1, 7]))  # rows that are kept of a run may lie apart
        positions += range(start, start + count * step, step)
    padding = height - len(slots)
    return torch.tensor(slots + [0] * padding), torch.tensor(positions + [-1] * padding)


@anything
@given(
    at=batches(),
    heads=st.sampled_from([(4, 1), (4, 4), (6, 2), (8, 4)]),
    size=st.sampled_from([16, 32]),
    window=st.sampled_from([3, 130, 1 << 30]),
    dtype=st.sampled_from(DTYPES),
)
def test_attend(at: tuple, heads: tuple, size: int, window: int, dtype: torch.dtype) -> None:
    slots, positions = at
    ring = 512 if window > 1000 else window + 128
    kept = memory(3, heads[1], ring, size, dtype)
    queries = random(len(slots), heads[0] * size, dtype=dtype, seed=5) * size**-0.5
    ours = ops.attend(queries, *kept, slots, positions, window, 512)
    close(ours, twin(ops.attend, queries, *kept, slots, positions, window, 512))
    real = (positions >= 0).nonzero()[:, 0].tolist()
    for row in real[:1] + real[-1:]:  # alone, and told to look further back
        mine = torch.full_like(slots, 0), torch.full_like(positions, -1)
        mine[0][0], mine[1][0] = slots[row], positions[row]
        one = torch.zeros_like(queries)
        one[0] = queries[row]
        assert torch.equal(ops.attend(one, *kept, *mine, window, 2048)[0], ours[row])


def test_attention_over_long_caches_goes_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    from paceline.backends.torch.kernels import attention

    kept = memory(1, 1, 512, 16, torch.float32)
    queries, positions = random(48, 32), torch.arange(300, 348)
    arguments = queries, *kept, torch.zeros_like(positions), positions, 1 << 30, 512
    whole = ops.attend(*arguments)
    monkeypatch.setattr(attention, "MOST_BYTES", 1)
    assert torch.equal(ops.attend(*arguments), whole)


@pytest.mark.parametrize("dtype", DTYPES)
def test_centroid_scores(dtype: torch.dtype) -> None:
    state, head = random(4, 48, dtype=dtype), random(60, 48, dtype=dtype, seed=1)
    chosen = torch.tensor([[0, 4], [3, 1], [2, 0], [1, 2]])
    arguments = state, chosen, head, torch.randperm(60).view(5, 12), torch.tensor([3, 9, -1, 0])
    real = [0, 1, 3]
    close(ops.centroid_scores(*arguments)[real], twin(ops.centroid_scores, *arguments)[real], dtype)


@anything
@given(
    vocabulary=st.sampled_from([5, 100, 1500, 3000]),
    seed=st.integers(0, 2**64 - 1),
    scale=st.sampled_from([0.0, 0.5, 4.0, 1e30]),
    coarse=st.booleans(),
    samplings=st.lists(
        st.builds(
            SamplingParams,
            temperature=st.sampled_from([0.0, 1e-4, 0.3, 0.7, 1.0, 3.0]),
            top_k=st.sampled_from([0, 1, 2, 64, 128]),
            top_p=st.sampled_from([0.0, 0.1, 0.5, 0.95, 1.0]),
            min_p=st.sampled_from([0.0, 0.01, 0.5, 1.0]),
        ).map(lambda s: s if s.top_k else SamplingParams(s.temperature, min_p=s.min_p)),
        min_size=1,
        max_size=4,
    ),
)
def test_sampled_tokens_are_the_references(
    vocabulary: int, seed: int, scale: float, coarse: bool, samplings: list[SamplingParams]
) -> None:
    random = np.random.default_rng(seed)
    logits = (random.standard_normal((16, vocabulary)) * scale).astype(np.float32)
    if coarse:  # many equals
        logits = np.round(logits)
    logits[random.random(logits.shape) < 0.05] = -np.inf
    samplings = [SamplingParams(s.temperature, s.top_k, s.top_p, s.min_p, seed=seed) for s in samplings]
    packed = pack_settings(samplings, 16)
    positions = random.integers(0, 2**20, 16)
    positions[len(samplings) :] = -1
    ranked = any(s.temperature and s.top_k for s in samplings)
    tokens, confidence = ops.sample(
        torch.from_numpy(logits), torch.from_numpy(packed), torch.from_numpy(positions), ranked
    )
    expected, likely = sample_rows(logits, packed, positions)
    assert tokens.tolist() == expected.tolist()
    np.testing.assert_allclose(confidence.numpy(), likely, rtol=1e-4, atol=1e-6)
    for row, (s, token) in enumerate(zip(samplings, tokens.tolist(), strict=False)):
        assert token == reference_sample(logits[row], s, int(positions[row]))


def test_narrow_strips_where_outputs_are_few() -> None:
    shapes = [matmul_kernels.shape_of(outputs, 0, torch.bfloat16)["N"] for outputs in (256, 4096, 262144)]
    assert shapes == sorted(shapes)
