"""Error-compensated rounding: blocks hold what was decided, and products are nearer than those of rounding alone."""

import numpy as np
import pytest

from paceline import _cpu
from paceline.quant.bf16 import Floats
from tests.fixtures import reference_formats as reference
from tools import error_compensation


def correlated_activations(rows: int, columns: int, seed: int) -> Floats:
    """Activations of a few directions and some noise, with columns of many sizes, as models have them."""
    generator = np.random.default_rng(seed)
    directions = generator.standard_normal((columns // 4, columns)) * generator.lognormal(0, 1, columns)
    mixed = generator.standard_normal((rows, columns // 4)) @ directions + generator.standard_normal((rows, columns))
    return mixed.astype(np.float32)


def missed(blocks: error_compensation.Bytes, element: str, weights: Floats, x: Floats) -> float:
    """Relative error of the products with activations x [rows, columns]."""
    exact = x.astype(np.float64) @ weights.T
    products = x.astype(np.float64) @ _cpu.dequantise(blocks, element, weights.shape[1]).T
    return float(np.linalg.norm(products - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize("element", error_compensation.GRIDS)
def test_scales_and_numbers_are_those_of_the_blocks(element: str) -> None:
    grid = error_compensation.GRIDS[element]
    blocks = reference.random_blocks(9, 512, element, 1)
    scales, minima = (np.repeat(x, grid.part, axis=1) for x in error_compensation.scales_of(blocks, element))
    values = reference.values_of(blocks, element)
    q = np.random.default_rng(2).integers(0, grid.top + 1, values.shape, dtype=np.uint8)
    expected = scales * q + minima
    changed = error_compensation.with_numbers(blocks, element, q)
    tolerance = 1e-6 * (np.abs(scales) * grid.top + np.abs(minima))
    assert np.all(np.abs(reference.values_of(changed, element) - expected) <= tolerance)
    own = np.rint(np.divide(values - minima, scales, out=np.zeros_like(values), where=scales != 0)).astype(np.uint8)
    nonzero = np.abs(scales) > 0
    back = error_compensation.with_numbers(blocks, element, own)
    np.testing.assert_array_equal(reference.values_of(back, element)[nonzero], values[nonzero])


@pytest.mark.parametrize("element", error_compensation.GRIDS)
def test_products_are_nearer_than_by_rounding_alone(element: str) -> None:
    """On activations that were not seen, too."""
    weights = np.random.default_rng(3).standard_normal((40, 512)).astype(np.float32)
    x = correlated_activations(6000, 512, 4)
    seen, others = x[:4000].astype(np.float64), x[4000:]
    moments = seen.T @ seen
    kept = weights.copy()
    compensated = error_compensation.round_compensated(weights, element, moments)
    np.testing.assert_array_equal(weights, kept)
    by_importance = _cpu.quantise(weights, element, error_compensation.importance_of(moments))
    alone = _cpu.quantise(weights, element)
    assert missed(compensated, element, weights, others) < 0.8 * missed(by_importance, element, weights, others)
    assert missed(by_importance, element, weights, others) < missed(alone, element, weights, others)


@pytest.mark.parametrize("element", error_compensation.GRIDS)
def test_columns_without_activations_are_rounded_alone(element: str) -> None:
    """Padding, and inputs that are always zero: nothing to compensate, no division by zero."""
    weights = np.random.default_rng(7).standard_normal((6, 512)).astype(np.float32)
    for moments in (np.zeros((512, 512)), np.diag(np.arange(512) % 2).astype(np.float64)):
        values = reference.values_of(error_compensation.round_compensated(weights, element, moments), element)
        assert np.linalg.norm(values - weights) < 0.15 * np.linalg.norm(weights)
