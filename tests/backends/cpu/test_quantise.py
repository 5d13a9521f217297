"""Quantisation of floats: its error is near the least there is, and grids that weights already lie on are found."""

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from paceline import _cpu
from paceline.quant.bf16 import Floats, from_bf16, to_bf16
from paceline.quant.lattice import lies_on_q4_0
from tests.fixtures import reference_formats as reference

Doubles = NDArray[np.float64]

GROUP = 32
IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float64)
GRIDS = {"Q4_0": np.arange(-8.0, 8.0), "Q5_0": np.arange(-16.0, 16.0), "IQ4_NL": IQ4}
RANGES = {"Q4_1": 15, "Q5_1": 31, "Q4_K": 15, "Q5_K": 31}
WRITTEN = ("Q8_0", "Q4_0", "Q5_0", "Q4_1", "Q5_1", "IQ4_NL", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")
# The search tries few scales; scales of 256-column blocks are numbers of six or eight bits besides.
NEAR = {"Q4_K": 1.08, "Q5_K": 1.11, "Q6_K": 1.06}


def weights(rows: int, columns: int, seed: int) -> Floats:
    """Weights of a heavier tail than the normal distribution's, as real ones are, of rows of many sizes."""
    generator = np.random.default_rng(seed)
    sizes = 10.0 ** generator.uniform(-2, 0, (rows, 1))
    return (generator.standard_t(5, (rows, columns)) * sizes).astype(np.float32)


def values_of(x: Floats, element: str, importance: Floats | None = None) -> Floats:
    return _cpu.dequantise(_cpu.quantise(x, element, importance), element, x.shape[1])


def least_on_grid(x: Doubles, weight: Doubles, grid: Doubles) -> float:
    """The least error of a group with any scale: a dense scan."""
    top, best = np.abs(x).max(), np.inf
    middles = (grid[1:] + grid[:-1]) / 2
    for scale in np.concatenate([sign * top / np.linspace(0.5, 1.2, 300) / np.abs(grid).max() for sign in (1, -1)]):
        q = grid[np.searchsorted(middles, x / scale)]
        best = min(best, float((weight * (x - scale * q) ** 2).sum()))
    return best


def least_on_range(x: Doubles, weight: Doubles, most: int, negative: bool) -> float:
    """The least error of a group with any scale and minimum, which may have to be at most zero: a dense scan."""
    low, high, best = x.min(), x.max(), np.inf
    for below in np.linspace(-0.1, 0.25, 30):
        minimum = low + below * (high - low)
        minimum = min(minimum, 0.0) if negative else minimum
        for above in np.linspace(-0.1, 0.25, 30):
            scale = (high - above * (high - low) - minimum) / most
            q = np.clip(np.rint((x - minimum) / scale), 0, most)
            best = min(best, float((weight * (x - scale * q - minimum) ** 2).sum()))
    return best


def least_error(x: Floats, element: str, importance: Floats) -> float:
    part = 16 if element == "Q6_K" else GROUP
    total, weight = 0.0, importance.astype(np.float64).reshape(-1, part)
    for row in x.astype(np.float64):
        for group, w in zip(row.reshape(-1, part), weight, strict=True):
            if element in RANGES:
                total += least_on_range(group, w, RANGES[element], element.endswith("_K"))
            else:
                grid = np.arange(-32.0, 32.0) if element == "Q6_K" else GRIDS.get(element, IQ4)
                total += least_on_grid(group, w, grid)
    return total


@pytest.mark.parametrize("weighted", [False, True], ids=["alike", "by importance"])
@pytest.mark.parametrize("element", sorted(set(WRITTEN) - {"Q8_0"}))
def test_error_is_near_the_least_of_a_dense_scan(element: str, weighted: bool) -> None:
    x = weights(6, 512, 1)
    importance = np.ones(512, np.float32)
    if weighted:
        importance = np.random.default_rng(2).lognormal(0, 1.5, 512).astype(np.float32)
    miss = values_of(x, element, importance).astype(np.float64) - x
    error = float((importance * miss**2).sum())
    assert error <= NEAR.get(element, 1.05) ** 2 * least_error(x, element, importance)


@pytest.mark.parametrize("element", sorted(set(WRITTEN) - {"Q8_0"}))
def test_importance_moves_error_to_other_columns(element: str) -> None:
    x = weights(64, 512, 3)
    importance = np.where(np.arange(512) % 4 == 0, 30, 0.1).astype(np.float32)
    heavy = importance > 1
    alike, by_importance = values_of(x, element) - x, values_of(x, element, importance) - x
    assert np.square(by_importance[:, heavy]).sum() < 0.9 * np.square(alike[:, heavy]).sum()
    np.testing.assert_array_equal(_cpu.quantise(x, element, np.ones(512, np.float32)), _cpu.quantise(x, element))


def test_q8_0_is_rounded_to_nearest_as_others_do() -> None:
    x = weights(20, 640, 4)
    np.testing.assert_array_equal(_cpu.quantise(x, "Q8_0"), gguf.quants.quantize(x, gguf.GGMLQuantizationType.Q8_0))


def on_grid(q: Doubles, scales: str, seed: int) -> Floats:
    """Numbers [groups, GROUP] times scales, as bfloat16 has them."""
    scale = np.float32(np.random.default_rng(seed).lognormal(-6, 0.7, (len(q), 1)))
    scale = from_bf16(to_bf16(scale)) if scales == "bfloat16" else np.float32(np.float16(scale))
    return from_bf16(to_bf16((q * scale).astype(np.float32)))


@pytest.mark.parametrize("scales", ["bfloat16", "fp16"])
@pytest.mark.parametrize("most_used", [1.0, 0.6], ids=["all numbers", "small numbers more often"])
@pytest.mark.parametrize(("element", "low"), [("Q4_0", -7), ("Q4_0", -8), ("Q5_0", -15), ("Q5_0", -16)])
def test_weights_that_lie_on_a_grid_are_recovered(element: str, low: int, most_used: float, scales: str) -> None:
    """Checkpoints trained for Q4_0 hold scale * q in bfloat16, rounded."""
    generator = np.random.default_rng(5)
    top = 7 if element == "Q4_0" else 15
    q = np.rint(generator.uniform(low, top, (8000, GROUP)) * generator.uniform(most_used, 1, (8000, GROUP)))
    x = on_grid(q, scales, 6)
    values = values_of(x.reshape(-1, 512), element).reshape(-1, GROUP)
    assert np.all(from_bf16(to_bf16(values)) == x, axis=1).mean() >= 0.999
    if scales == "bfloat16":  # found themselves, not others that round alike
        assert np.all(np.abs(values - x) <= np.abs(x) * 2.0**-8, axis=1).all()


def test_checkpoints_trained_for_q4_0_are_told_from_others() -> None:
    q = np.rint(np.random.default_rng(7).normal(0, 3, (200 * 16, GROUP))).clip(-8, 7)
    grid = on_grid(q, "bfloat16", 8).reshape(200, 512)
    assert lies_on_q4_0(grid)
    half = grid.copy()
    half[::2] = from_bf16(to_bf16(weights(100, 512, 9)))
    for others in (weights(200, 512, 10), half, np.zeros((4, 64), np.float32), grid[:, :40], grid[:0]):
        assert not lies_on_q4_0(others)


@pytest.mark.parametrize("element", sorted(set(WRITTEN) - {"Q6_K", "IQ4_XS", "Q4_K", "Q5_K"}))
def test_zeros_and_constants_are_exact(element: str) -> None:
    x = np.repeat(np.array([[0.0], [0.5], [-0.25]], np.float32), 64, axis=1)
    error = np.abs(values_of(x, element) - x)
    assert not error[0].any()
    assert error.max() <= 2.0**-10


@pytest.mark.parametrize("element", WRITTEN)
def test_damaged_weights_give_finite_values(element: str) -> None:
    x = weights(8, 256, 6)
    x[0], x[1], x[2] = np.nan, np.inf, -3e38
    x[3, ::7], x[4, ::7], x[5, ::7] = np.nan, -np.inf, 1e-42
    x[6], x[7, :32] = 1e-42, 0
    damaged = np.array([np.nan, np.inf, -1.0, 0.0] * 64, np.float32)
    for importance in (None, damaged):
        assert np.all(np.isfinite(values_of(x, element, importance)))


@pytest.mark.parametrize("element", WRITTEN)
@pytest.mark.parametrize("columns", [256, 768, 1280])
def test_rows_do_not_depend_on_each_other(element: str, columns: int) -> None:
    x = weights(5, columns, 7)
    whole = _cpu.quantise(x, element)
    for row in range(5):
        np.testing.assert_array_equal(_cpu.quantise(x[row : row + 1], element)[0], whole[row])
    blocks = columns // reference.block_size(element)[0]
    half = x[:, : columns // blocks].copy()
    np.testing.assert_array_equal(_cpu.quantise(half, element), whole[:, : whole.shape[1] // blocks])


def test_packing_takes_importance_of_a_matrix_of_any_width() -> None:
    x = weights(20, 320, 8)
    importance = np.random.default_rng(9).lognormal(0, 1.5, 320).astype(np.float32)
    padded, beside = np.zeros((20, 512), np.float32), np.ones(512, np.float32)
    padded[:, :320], beside[:320] = x, importance
    matrix = _cpu.Matrix("q4_k", 20, 320)
    matrix.pack(x, importance=importance)
    expected = values_of(padded, "Q4_K", beside)[:, :320]
    np.testing.assert_array_equal(np.stack([matrix.row(i) for i in range(20)]), expected)


def test_bad_arguments_are_refused() -> None:
    x = np.zeros((2, 64), np.float32)
    with pytest.raises(ValueError, match="nothing is quantised to Q2_K"):
        _cpu.quantise(x, "Q2_K")
    with pytest.raises(ValueError, match="nothing is quantised to F32"):
        _cpu.quantise(x, "F32")
    with pytest.raises(ValueError, match="Q4_K"):
        _cpu.quantise(x, "Q4_K")
    with pytest.raises(ValueError, match="rows of 32 columns where 64 belong"):
        _cpu.quantise(x, "Q4_0", np.ones(32, np.float32))
    with pytest.raises(ValueError, match="rows of 63 columns where 64 belong"):
        _cpu.Matrix("q4_0", 2, 64).pack(x, importance=np.ones(63, np.float32))
