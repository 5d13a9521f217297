"""Weights on a device lie on the grids of `tests.fixtures.reference_formats`, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.backends.torch import ops
from paceline.backends.torch.device_sampler import on_device, pack_settings, unpack_settings
from paceline.models import matrix
from paceline.models.matrix import FORMATS, pack, stack
from paceline.types import SamplingParams
from tests.fixtures.reference_formats import round_trip


@settings(max_examples=50, deadline=None)
@given(
    fmt=st.sampled_from([*FORMATS]),
    rows=st.integers(1, 40),
    columns=st.sampled_from([16, 32, 64, 96, 200]),
    seed=st.integers(0, 1 << 30),
    scale=st.sampled_from([0.0, 1e-6, 1.0, 300.0]),
)
def test_values_are_those_of_the_oracle(fmt: str, rows: int, columns: int, seed: int, scale: float) -> None:
    random = np.random.default_rng(seed)
    weights = (random.standard_normal((rows, columns)) * scale).astype(np.float32)
    weights[random.random(weights.shape) < 0.1] = 0
    if fmt != "f32" and rows > 3:
        weights[1] = np.round(weights[1])  # equals
        weights[2] = 0
    expected = round_trip(weights, fmt)
    packed = pack(torch.from_numpy(weights), fmt)
    picked = torch.from_numpy(random.integers(0, rows, 5))
    np.testing.assert_array_equal(packed.rows(torch.arange(rows), columns).float().numpy(), expected)
    np.testing.assert_array_equal(packed.rows(picked, columns).float().numpy(), expected[picked.numpy()])


def test_matrices_can_be_stacked_and_quantised_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [torch.randn(rows, 96) for rows in (7, 40, 16)]
    for fmt in ("bf16", "q8_0", "q4_0"):
        whole = pack(torch.cat(parts), fmt)
        with monkeypatch.context() as patch:
            patch.setattr(matrix, "SLICE", 16)
            pieces = stack(pack(part, fmt) for part in parts)
        assert pieces.outputs == 63
        assert pieces.nbytes == whole.nbytes
        assert torch.equal(pieces.values, whole.values)
        x = torch.randn(16, 96).bfloat16()
        assert torch.equal(ops.matmul(x, *pieces), ops.matmul(x, *whole))


def test_one_matrix_has_one_format() -> None:
    with pytest.raises(ValueError, match="different formats in one: q4_0, q8_0"):
        stack([pack(torch.ones(4, 64), fmt) for fmt in ("q8_0", "q4_0")])


def test_other_formats_are_refused() -> None:
    with pytest.raises(ValueError, match="no q4_k matrices in PyTorch; it has f32, bf16, q8_0, q4_0"):
        pack(torch.ones(4, 256), "q4_k")


@pytest.mark.parametrize("fmt", FORMATS)
def test_random_matrices_keep_the_variance(fmt: str) -> None:
    made = matrix.random(256, 1024, fmt, torch.device("cpu"))
    assert (made.outputs, made.fmt) == (256, fmt)
    assert made.nbytes == pack(torch.zeros(256, 1024), fmt).nbytes
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
