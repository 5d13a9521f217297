"""Native matrix kernels against the NumPy oracle, on every instruction set this processor has."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline import _cpu
from paceline.quant.formats import FORMATS, native_format
from tests.fixtures import reference_formats as reference

ISAS = _cpu.usable_isas()
PLAIN = [fmt for fmt in FORMATS if fmt not in reference.QUANTISED]
WRITTEN = [fmt for fmt in reference.QUANTISED if FORMATS[fmt].quantises]
OUTPUTS, COLUMNS, SEEDS = st.integers(1, 70), st.integers(1, 200), st.integers(0, 99)


def random_matrix(rows: int, cols: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    # Columns of very different size, so that a scale taken from the wrong group shows.
    return (generator.standard_normal((rows, cols)) * 10.0 ** generator.integers(-3, 3, cols)).astype(np.float32)


def packed(rows: np.ndarray, fmt: str, element: str = "", cols: int = 0) -> _cpu.Matrix:
    matrix = _cpu.Matrix(fmt, len(rows), cols or rows.shape[1])
    for first in range(0, len(rows), 16):  # in slices, as the loader does
        matrix.pack(rows[first : first + 16], first, element)
    return matrix


def rows_of(matrix: _cpu.Matrix) -> np.ndarray:
    return np.stack([matrix.row(i) for i in range(matrix.shape[0])])


def times(matrix: _cpu.Matrix, x: np.ndarray, isa: str = "", threads: int = 1) -> np.ndarray:
    out = np.full((len(x), matrix.shape[0] + -matrix.shape[0] % 16), np.nan, np.float32)
    _cpu.matmul(matrix, x, out, isa, threads)
    return out[:, : matrix.shape[0]]


def any_matrix(fmt: str, outputs: int, cols: int, seed: int) -> tuple[_cpu.Matrix, np.ndarray, np.ndarray]:
    """A matrix of about that many columns, its values, and what rounding of them is relative to."""
    if fmt in PLAIN:
        weights = random_matrix(outputs, cols, seed)
        values = reference.round_trip(weights, fmt)
        return packed(weights, fmt), values, np.abs(values)
    element = FORMATS[fmt].element
    width, _ = reference.block_size(element)
    cols += -cols % width
    blocks = reference.random_blocks(outputs, cols, element, seed)
    matrix = packed(blocks, fmt, element, cols)
    return matrix, reference.values_of(blocks, element), reference.magnitudes(blocks, element)


def assert_same_bits(a: np.ndarray, b: np.ndarray) -> None:
    """Equal but for the bits of NaN."""
    np.testing.assert_array_equal(a, b)
    number = ~np.isnan(a)
    np.testing.assert_array_equal(a[number].view(np.uint32), b[number].view(np.uint32))


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow")
@pytest.mark.parametrize("element", [FORMATS[fmt].element for fmt in reference.QUANTISED])
@settings(max_examples=30, deadline=None)
@given(outputs=OUTPUTS, blocks=st.integers(1, 8), seed=SEEDS, finite=st.booleans())
def test_values_are_those_of_the_file(element: str, outputs: int, blocks: int, seed: int, finite: bool) -> None:
    """Of blocks of any bytes too, whose scales may be infinite or NaN."""
    width, size = reference.block_size(element)
    rows = reference.random_blocks(outputs, blocks * width, element, seed)
    if not finite:
        rows = np.random.default_rng(seed).integers(0, 256, (outputs, blocks * size), dtype=np.uint8)
    expected = reference.values_of(rows, element)
    assert_same_bits(_cpu.dequantise(rows, element, blocks * width), expected)
    table = _cpu.Table(rows, element)
    assert (table.shape, table.type) == (expected.shape, element)
    assert_same_bits(np.stack([table.row(i) for i in range(outputs)]), expected)
    assert_same_bits(rows_of(packed(rows, native_format(element), element, blocks * width)), expected)


@pytest.mark.parametrize("fmt", reference.QUANTISED)
@settings(max_examples=30, deadline=None)
@given(outputs=OUTPUTS, blocks=st.integers(1, 8), seed=SEEDS)
def test_blocks_are_repacked_by_bits(fmt: str, outputs: int, blocks: int, seed: int) -> None:
    element = FORMATS[fmt].element
    width, size = reference.block_size(element)
    rows = np.random.default_rng(seed).integers(0, 256, (outputs, blocks * size), dtype=np.uint8)
    matrix = packed(rows, fmt, element, blocks * width)
    assert matrix.packed().tobytes() == reference.pack_blocks(rows, element)


@pytest.mark.parametrize("fmt", PLAIN)
@settings(max_examples=30, deadline=None)
@given(outputs=OUTPUTS, cols=COLUMNS, seed=SEEDS)
def test_plain_formats(fmt: str, outputs: int, cols: int, seed: int) -> None:
    weights = random_matrix(outputs, cols, seed)
    matrix = packed(weights, fmt)
    assert matrix.packed().tobytes() == reference.pack_plain(weights, fmt)
    np.testing.assert_array_equal(rows_of(matrix), reference.round_trip(weights, fmt))


@pytest.mark.parametrize("fmt", WRITTEN)
@settings(max_examples=30, deadline=None)
@given(outputs=OUTPUTS, cols=st.integers(1, 800), seed=SEEDS)
def test_floats_are_quantised_at_any_width(fmt: str, outputs: int, cols: int, seed: int) -> None:
    """Formats of 256-column blocks too."""
    weights = 100 * random_matrix(outputs, cols, seed)  # fp16 scales of factors of scales hold no tiny weights
    error = np.linalg.norm(rows_of(packed(weights, fmt)) - weights, axis=1)
    assert np.all(error <= 8 * 2.0 ** -FORMATS[fmt].bits * np.linalg.norm(weights, axis=1))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("fmt", FORMATS)
@settings(max_examples=25, deadline=None)
@given(outputs=OUTPUTS, cols=COLUMNS, rows=st.integers(1, 20), seed=SEEDS)
def test_product_agrees_with_the_oracle(fmt: str, isa: str, outputs: int, cols: int, rows: int, seed: int) -> None:
    matrix, values, sizes = any_matrix(fmt, outputs, cols, seed)
    x = random_matrix(rows, matrix.shape[1], seed + 1)
    # Rounding grows with the sum of magnitudes, not with the result, in which terms may cancel.
    scale = np.abs(x).astype(np.float64) @ sizes.T.astype(np.float64)
    error = np.abs(times(matrix, x, isa) - reference.product(values, x, fmt))
    assert np.all(error <= 1e-5 * scale + 1e-30)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("fmt", reference.QUANTISED)
@settings(max_examples=25, deadline=None)
@given(outputs=OUTPUTS, rows=st.integers(1, 20), seed=SEEDS)
def test_sums_of_integers_are_exact(fmt: str, isa: str, outputs: int, rows: int, seed: int) -> None:
    """With scales of one and activations that are quantised to themselves, nothing is rounded."""
    element, generator = FORMATS[fmt].element, np.random.default_rng(seed)
    blocks = reference.random_blocks(outputs, 256, element, seed).reshape(outputs, -1, reference.block_size(element)[1])
    blocks[generator.random(blocks.shape) < 0.3] = 255  # the largest numbers side by side, and the smallest
    blocks[generator.random(blocks.shape) < 0.3] = 0
    if element == "MXFP4":
        blocks[..., 0] = 128
    else:
        reference.put_halves(blocks, reference.SCALES.get(element, 0), 1)
    if element in reference.MINIMA:
        reference.put_halves(blocks, reference.MINIMA[element], 1)
    if element in ("Q4_K", "Q5_K"):  # small factors, so that float32 holds the sums
        blocks[..., 4:16] &= np.array([0x03] * 8 + [0x33] * 4, np.uint8)
    elif element == "Q6_K":
        blocks[..., 192:208] = generator.integers(-3, 4, blocks[..., 192:208].shape).astype(np.uint8)
    elif element == "IQ4_XS":
        blocks[..., 2:4] = 0xAA
        blocks[..., 4:8] &= 0x11
    blocks = blocks.reshape(outputs, -1)
    x = generator.integers(-127, 128, (rows, 256)).astype(np.float32)
    x[generator.random(x.shape) < 0.5] = 127
    x[:, ::32] = -127
    assert 127 * reference.magnitudes(blocks, element).sum(-1).max() < 1 << 24
    expected = x.astype(np.float64) @ reference.values_of(blocks, element).T.astype(np.float64)
    np.testing.assert_array_equal(times(packed(blocks, fmt, element, 256), x, isa), expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("fmt", FORMATS)
@settings(max_examples=25, deadline=None)
@given(outputs=OUTPUTS, cols=COLUMNS, rows=st.integers(2, 20), seed=SEEDS, threads=st.integers(1, 3))
def test_a_row_does_not_depend_on_its_company(
    fmt: str, isa: str, outputs: int, cols: int, rows: int, seed: int, threads: int
) -> None:
    matrix, _, _ = any_matrix(fmt, outputs, cols, seed)
    x = random_matrix(rows, matrix.shape[1], seed + 1)
    together = times(matrix, x, isa, threads)
    for count in range(1, rows):
        np.testing.assert_array_equal(times(matrix, x[:count], isa), together[:count])
    np.testing.assert_array_equal(times(matrix, x[::-1].copy(), isa), together[::-1])


@pytest.mark.parametrize("fmt", WRITTEN)
def test_empty_and_extreme_groups(fmt: str) -> None:
    weights = np.zeros((3, 96), np.float32)
    weights[1, :32], weights[2, 40] = 1e-42, -6e4
    x = np.zeros((2, 96), np.float32)
    x[1] = 1e-35
    assert np.all(np.isfinite(times(packed(weights, fmt), x)))
    np.testing.assert_array_equal(rows_of(packed(weights, fmt))[0], 0)


@pytest.mark.parametrize("dtype", ["float16", "bf16"])
def test_checkpoint_types_pack_like_their_values(dtype: str) -> None:
    values = random_matrix(20, 40, 0)
    if dtype == "bf16":
        raw, exact = reference.to_bf16(values), reference.from_bf16(reference.to_bf16(values))
    else:
        raw = values.astype(np.float16)
        exact = raw.astype(np.float32)
    for fmt in (*PLAIN, *WRITTEN):
        assert packed(raw, fmt).packed().tobytes() == packed(exact, fmt).packed().tobytes()


@pytest.mark.parametrize("element", [FORMATS[fmt].element for fmt in reference.QUANTISED])
def test_blocks_of_another_type_are_quantised_from_their_values(element: str) -> None:
    blocks = reference.random_blocks(20, 512, element, 0)
    values = reference.values_of(blocks, element)
    for fmt in {*PLAIN, *WRITTEN} - {native_format(element)}:
        assert packed(blocks, fmt, element, 512).packed().tobytes() == packed(values, fmt).packed().tobytes()


@pytest.mark.parametrize("fmt", FORMATS)
def test_random_matrices_keep_the_size_of_what_they_multiply(fmt: str) -> None:
    matrix = _cpu.Matrix(fmt, 70, 1000)
    matrix.fill_random(7)
    rows = rows_of(matrix)
    assert 0.3 < np.sqrt(1000) * rows.std() < 3
    assert abs(rows.mean()) < 0.25 * rows.std()


def test_bad_arguments_are_refused() -> None:
    matrix = _cpu.Matrix("q4_0", 16, 32)
    blocks = np.zeros((16, 18), np.uint8)
    with pytest.raises(ValueError, match="unknown weight format"):
        _cpu.Matrix("q1", 16, 32)
    with pytest.raises(ValueError, match="columns"):
        matrix.pack(np.zeros((16, 31), np.float32))
    with pytest.raises(ValueError, match="rows"):
        matrix.pack(np.zeros((17, 32), np.float32))
    with pytest.raises(ValueError, match="expected float32"):
        matrix.pack(np.zeros((16, 32), np.float64))
    with pytest.raises(ValueError, match=f"unknown instruction set mmx .*{', .*'.join(_cpu.usable_isas())}"):
        times(matrix, np.zeros((1, 32), np.float32), "mmx")
    for rows, element, message in (
        (blocks, "", "without the type"),
        (blocks, "Q9_9", "unknown type of tensor elements Q9_9"),
        (blocks, "F16", "expected float32"),
        (np.zeros((16, 32), np.float32), "Q4_0", "expected float32"),
        (blocks[:, :17].copy(), "Q4_0", "17 bytes are no whole Q4_0 blocks of 18"),
        (np.zeros((16, 36), np.uint8), "Q4_0", "rows of 64 columns where 32 belong"),
        (np.zeros((16, 144), np.uint8), "Q4_K", "rows of 256 columns where 32 belong"),
    ):
        with pytest.raises(ValueError, match=message):
            matrix.pack(rows, 0, element)
    for fmt in {*reference.QUANTISED} - {*WRITTEN}:
        with pytest.raises(ValueError, match=f"nothing is quantised to {fmt}"):
            packed(np.zeros((16, 256), np.float32), fmt)
    with pytest.raises(ValueError, match="whole Q4_0 blocks"):
        _cpu.Table(blocks[:, :17].copy(), "Q4_0")
    with pytest.raises(ValueError, match="rows of 32 columns where 64 belong"):
        _cpu.dequantise(blocks, "Q4_0", 64)
    with pytest.raises(IndexError, match="no row 16 of 16"):
        _cpu.Table(blocks, "Q4_0").row(16)
    with pytest.raises(ValueError, match="no weight format holds tensors of type IQ1_S"):
        native_format("IQ1_S")
