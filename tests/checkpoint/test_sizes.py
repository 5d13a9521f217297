"""Sizes of the official models against published figures."""

import pytest

from paceline.checkpoint import target_tensors
from paceline.checkpoint.config_json import drafter_config, target_config
from paceline.checkpoint.sizes import bits_per_weight, cache_bytes, count_parameters, weight_bytes
from tests.fixtures import shapes

# Published, in units of 1e9: text parameters (without vision and audio), used per token; and the drafter's, 1e6.
PUBLISHED = {
    "E2B": (4.63, 2.28, 77.7),
    "E4B": (7.46, 4.65, 78.5),
    "12B": (11.9, 11.9, 422.9),
    "26B-A4B": (25.2, 3.8, 419.7),
    "31B": (30.7, 30.7, 469.5),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters(name: str) -> None:
    total, active, drafter = PUBLISHED[name]
    counted = count_parameters(target_config(shapes.target(name)))
    assert counted.total / 1e9 == pytest.approx(total, rel=0.005)
    assert counted.active / 1e9 == pytest.approx(active, rel=0.01)
    assert count_parameters(drafter_config(shapes.drafter(name))).total / 1e6 == pytest.approx(drafter, abs=0.06)


def test_weight_bytes() -> None:
    config = target_config(shapes.target("26B-A4B"))
    parameters = count_parameters(config).total
    vectors = sum(shape[0] for shape in target_tensors(config).values() if len(shape) == 1)
    assert weight_bytes(config, "f32") == 4 * parameters
    assert weight_bytes(config, "bf16") == 2 * parameters + 2 * vectors
    routers = 30 * 128 * 2816  # in bf16
    quantised = parameters - vectors - routers
    assert weight_bytes(config, "q8") == quantised * 34 // 32 + 2 * routers + 4 * vectors
    bits = bits_per_weight(config, "q8")
    assert bits == pytest.approx((8.5 * quantised + 16 * routers) / (quantised + routers))
    experts = dict.fromkeys((name for name in target_tensors(config) if "experts" in name), "Q4_0")
    assert weight_bytes(config, "file", experts) < 0.4 * weight_bytes(config, "file")


def test_the_mapped_table_costs_no_memory() -> None:
    config = target_config(shapes.target("E2B"))
    parameters = count_parameters(config)
    assert parameters.total - parameters.effective == 262144 * 35 * 256
    assert weight_bytes(config, "f32") == 4 * parameters.effective


def test_cache_bytes() -> None:
    e2b = target_config(shapes.target("E2B"))
    # 12 sliding layers and 3 full ones have K/V of their own: 2 tensors of 2 bytes, 1 head of 256 or 512.
    assert cache_bytes(e2b, 1) == 4 * (12 * 256 + 3 * 512)
    assert cache_bytes(e2b, 4096) == 4 * (12 * 256 * 512 + 3 * 512 * 4096)
    assert cache_bytes(e2b, 4096, "f32") == 2 * cache_bytes(e2b, 4096)
    assert cache_bytes(e2b, 4096, "q8") == cache_bytes(e2b, 4096) // 64 * 34  # a scale of 16 bits for 32 numbers of 8
