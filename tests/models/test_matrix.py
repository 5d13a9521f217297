"""Weights on a device have the values of the blocks that a file holds or the native quantiser makes, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline import _cpu
from paceline.backends.torch import ops
from paceline.backends.torch.device_sampler import on_device, pack_settings, unpack_settings
from paceline.models import matrix
from paceline.models.matrix import EXACT, FORMATS, GRIDS, Matrix, empty, pack, widest
from paceline.quant.bf16 import from_bf16, to_bf16
from paceline.types import SamplingParams
from tests.fixtures.reference_formats import QUANTISED, pad_columns, random_blocks, round_trip, values_of


@settings(max_examples=50, deadline=None)
@given(
    fmt=st.sampled_from([*FORMATS]),
    rows=st.integers(1, 40),
    columns=st.sampled_from([16, 32, 64, 96, 200]),
    kind=st.sampled_from(["float32", "float16", "uint16"]),
    seed=st.integers(0, 1 << 30),
    scale=st.sampled_from([0.0, 1e-6, 1.0, 300.0]),
)
def test_floats(fmt: str, rows: int, columns: int, kind: str, seed: int, scale: float) -> None:
    random = np.random.default_rng(seed)
    weights = (random.standard_normal((rows, columns)) * scale).astype(np.float32)
    weights[random.random(weights.shape) < 0.1] = 0
    given = to_bf16(weights) if kind == "uint16" else weights.astype(kind)
    exact = from_bf16(given) if kind == "uint16" else given.astype(np.float32)
    if fmt in GRIDS:
        blocks = _cpu.quantise(pad_columns(exact), fmt.upper())
        expected = values_of(blocks, fmt.upper())[:, :columns]
        if scale >= 1:  # fp16 scales hold no smaller numbers
            assert np.abs(expected - exact).max() <= np.abs(exact).max() / (100 if fmt == "q8_0" else 6)
    else:
        expected = round_trip(exact, fmt)
    assert_values(pack(given, fmt), expected)


@settings(max_examples=50, deadline=None)
@given(
    fmt=st.sampled_from([*FORMATS]),
    element=st.sampled_from([fmt.upper() for fmt in QUANTISED]),
    rows=st.integers(1, 40),
    blocks=st.integers(1, 3),
    seed=st.integers(0, 1 << 30),
)
def test_blocks(fmt: str, element: str, rows: int, blocks: int, seed: int) -> None:
    """A format that holds them exactly has the file's values, any other those of their dequantised values."""
    given = random_blocks(rows, 256 * blocks if "K" in element or "XS" in element else 32 * blocks, element, seed)
    values = values_of(given, element)
    packed = pack(given, fmt, element)
    if fmt == EXACT.get(element) or fmt == "f32" or (fmt, element) in {("q8_0", "Q4_0"), ("bf16", "MXFP4")}:
        assert_values(packed, values)
    else:
        same = pack(values, fmt)
        assert torch.equal(packed.values, same.values)
        assert fmt not in GRIDS or torch.equal(packed.scales, same.scales)


def assert_values(packed: Matrix, expected: np.ndarray) -> None:
    rows, columns = expected.shape
    assert packed.outputs == rows
    np.testing.assert_array_equal(packed.rows(torch.arange(rows), columns).float().numpy(), expected)
    picked = torch.tensor([rows - 1, 0, rows // 2])
    np.testing.assert_array_equal(packed.rows(picked, columns).float().numpy(), expected[picked.numpy()])


@pytest.mark.parametrize("fmt", FORMATS)
def test_matrices_are_filled_in_parts(fmt: str) -> None:
    parts = [np.random.default_rng(rows).standard_normal((rows, 96), np.float32) for rows in (7, 40, 16)]
    whole, made = pack(np.concatenate(parts), fmt), empty(63, 96, fmt, torch.device("cpu"))
    for first, part in zip((0, 7, 47), parts, strict=True):
        made.put(first, pack(part, fmt))
    assert made.outputs == 63
    assert made.nbytes == whole.nbytes
    assert torch.equal(made.values, whole.values)
    x = torch.randn(16, 96).to(torch.float32 if fmt == "f32" else torch.bfloat16)
    assert torch.equal(ops.matmul(x, *made), ops.matmul(x, *whole))


def test_the_widest_of_formats() -> None:
    assert [widest(("q4_0", fmt, "q4_0")) for fmt in FORMATS] == [*FORMATS]


def test_other_formats_are_refused() -> None:
    with pytest.raises(ValueError, match="no q4_k matrices in PyTorch; it has f32, bf16, q8_0, q4_0"):
        pack(np.ones((4, 256), np.float32), "q4_k")


@pytest.mark.parametrize("fmt", FORMATS)
def test_random_matrices_keep_the_variance(fmt: str) -> None:
    made = matrix.random(256, 1024, fmt, torch.device("cpu"))
    assert (made.outputs, made.fmt) == (256, fmt)
    assert made.nbytes == pack(np.zeros((256, 1024), np.float32), fmt).nbytes
    products = ops.scores(torch.randn(64, 1024).to(torch.float32 if fmt == "f32" else torch.bfloat16), *made, 0.0)
    assert 0.7 < products.std() < 1.4


@given(
    temperature=st.floats(0.125, 8, width=32),
    top_k=st.integers(0, 1 << 31),
    shares=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    seed=st.integers(0, 2**64 - 1),
)
def test_settings_survive_as_words(temperature: float, top_k: int, shares: tuple, seed: int) -> None:
    params = SamplingParams(temperature, min(top_k, 2**31 - 1), *shares, seed=seed)
    words = pack_settings([SamplingParams(), params], 4)
    assert unpack_settings(words[1]) == params
    assert unpack_settings(words[3]) == SamplingParams(seed=0, top_p=0.0)


def test_what_devices_sample() -> None:
    assert on_device(SamplingParams())
    assert on_device(SamplingParams(1.0))
    assert on_device(SamplingParams(1.0, top_k=64, top_p=0.9))
    assert not on_device(SamplingParams(1.0, top_p=0.9))  # of the whole vocabulary
    assert not on_device(SamplingParams(1.0, top_k=1000))
