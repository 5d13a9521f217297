"""Native matrix kernels against the NumPy oracle, on every instruction set this processor has."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline import _cpu
from tests.fixtures import reference_formats

ISAS = _cpu.usable_isas()
SHAPES = st.tuples(st.integers(1, 70), st.integers(1, 200))


def random_matrix(rows: int, cols: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    # Columns of very different size, so that a scale taken from the wrong group shows.
    return (generator.standard_normal((rows, cols)) * 10.0 ** generator.integers(-3, 3, cols)).astype(np.float32)


def packed(weights: np.ndarray, fmt: str) -> _cpu.Matrix:
    matrix = _cpu.Matrix(fmt, *weights.shape)
    for first in range(0, len(weights), 16):  # in slices, as the loader does
        matrix.pack(weights[first : first + 16], first)
    return matrix


def times(matrix: _cpu.Matrix, x: np.ndarray, isa: str = "", threads: int = 1) -> np.ndarray:
    out = np.full((len(x), matrix.shape[0] + -matrix.shape[0] % 16), np.nan, np.float32)
    _cpu.matmul(matrix, x, out, isa, threads)
    return out[:, : matrix.shape[0]]


@pytest.mark.parametrize("fmt", reference_formats.FORMATS)
@settings(max_examples=30, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 99))
def test_packed_bytes_are_the_oracles(fmt: str, shape: tuple[int, int], seed: int) -> None:
    weights = random_matrix(*shape, seed)
    assert packed(weights, fmt).packed().tobytes() == reference_formats.pack(weights, fmt)


@pytest.mark.parametrize("fmt", reference_formats.FORMATS)
@settings(max_examples=30, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 99))
def test_rows_come_back_as_stored(fmt: str, shape: tuple[int, int], seed: int) -> None:
    weights = random_matrix(*shape, seed)
    matrix = packed(weights, fmt)
    rows = np.stack([matrix.row(i) for i in range(shape[0])])
    np.testing.assert_array_equal(rows, reference_formats.round_trip(weights, fmt))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("fmt", reference_formats.FORMATS)
@settings(max_examples=25, deadline=None)
@given(shape=SHAPES, rows=st.integers(1, 20), seed=st.integers(0, 99))
def test_product_agrees_with_the_oracle(fmt: str, isa: str, shape: tuple[int, int], rows: int, seed: int) -> None:
    weights, x = random_matrix(*shape, seed), random_matrix(rows, shape[1], seed + 1)
    exact = reference_formats.matmul(weights, x, fmt)
    # Rounding grows with the sum of magnitudes, not with the result, in which terms may cancel.
    scale = np.abs(x).astype(np.float64) @ np.abs(reference_formats.round_trip(weights, fmt)).T.astype(np.float64)
    error = np.abs(times(packed(weights, fmt), x, isa) - exact)
    assert np.all(error <= 1e-5 * scale + 1e-30)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("fmt", reference_formats.FORMATS)
@settings(max_examples=25, deadline=None)
@given(shape=SHAPES, rows=st.integers(2, 20), seed=st.integers(0, 99), threads=st.integers(1, 3))
def test_a_row_does_not_depend_on_its_company(
    fmt: str, isa: str, shape: tuple[int, int], rows: int, seed: int, threads: int
) -> None:
    matrix, x = packed(random_matrix(*shape, seed), fmt), random_matrix(rows, shape[1], seed + 1)
    together = times(matrix, x, isa, threads)
    for count in range(1, rows):
        np.testing.assert_array_equal(times(matrix, x[:count], isa), together[:count])
    np.testing.assert_array_equal(times(matrix, x[::-1].copy(), isa), together[::-1])


@pytest.mark.parametrize("fmt", ["q8_0", "q4_0"])
def test_empty_and_extreme_groups(fmt: str) -> None:
    weights = np.zeros((3, 96), np.float32)
    weights[1, :32], weights[2, 40] = 1e-42, -6e4
    x = np.zeros((2, 96), np.float32)
    x[1] = 1e-35
    assert np.all(np.isfinite(times(packed(weights, fmt), x)))
    np.testing.assert_array_equal(np.stack([packed(weights, fmt).row(i) for i in range(3)])[0], 0)


@pytest.mark.parametrize("dtype", ["float16", "bf16"])
def test_checkpoint_types_pack_like_their_values(dtype: str) -> None:
    values = random_matrix(20, 40, 0)
    if dtype == "bf16":
        raw, exact = reference_formats.to_bf16(values), reference_formats.from_bf16(reference_formats.to_bf16(values))
    else:
        raw = values.astype(np.float16)
        exact = raw.astype(np.float32)
    matrix = _cpu.Matrix("q8_0", 20, 40)
    matrix.pack(raw)
    assert matrix.packed().tobytes() == reference_formats.pack(exact, "q8_0")


def test_bad_arguments_are_refused() -> None:
    matrix = _cpu.Matrix("q4_0", 16, 32)
    with pytest.raises(ValueError, match="unknown weight format"):
        _cpu.Matrix("q1", 16, 32)
    with pytest.raises(ValueError, match="columns"):
        matrix.pack(np.zeros((16, 31), np.float32))
    with pytest.raises(ValueError, match="rows"):
        matrix.pack(np.zeros((17, 32), np.float32))
    with pytest.raises(ValueError, match="expected float32"):
        matrix.pack(np.zeros((16, 32), np.float64))
    with pytest.raises(ValueError, match="unknown instruction set"):
        times(matrix, np.zeros((1, 32), np.float32), "mmx")
