"""Recipes keep their budgets on every official shape, and spend them where a weight gains most."""

from __future__ import annotations

import pytest

from paceline.bench.shapes import TARGETS, official_drafter, official_target
from paceline.checkpoint.names import PLE_TABLE, expected_tensors
from paceline.config import DrafterConfig, TargetConfig
from paceline.quant.formats import FORMATS
from paceline.quant.recipes import RECIPES, Stored, mean_bits

MIXES = ("q6", "q5", "q4")


def matrices(config: TargetConfig | DrafterConfig, element: str = "BF16") -> dict[str, Stored]:
    shapes = expected_tensors(config).items()
    return {name: Stored(shape, element) for name, shape in shapes if len(shape) > 1 and name != PLE_TABLE}


@pytest.mark.parametrize("shape", TARGETS)
@pytest.mark.parametrize("quant", MIXES)
def test_a_mix_stays_within_its_budget(quant: str, shape: str) -> None:
    recipe = RECIPES[quant]
    for config in (official_target(shape), official_drafter(shape)):
        stored = matrices(config)
        formats = recipe.formats(stored)
        assert formats.keys() == stored.keys()
        assert mean_bits(stored, formats) <= recipe.budget
        least = FORMATS[recipe.base].bits_per_weight
        assert all(FORMATS[fmt].bits_per_weight >= least for fmt in formats.values())


def test_values_come_first() -> None:
    """A budget that is not enough for all goes to values, then keys, which are small and cost most."""
    stored = matrices(official_target("e2b"))
    formats = RECIPES["q4"].formats(stored)
    assert {fmt for name, fmt in formats.items() if "v_proj" in name or "k_proj" in name} == {"q6_k"}
    assert formats["embed_tokens.weight"] == "q4_k"
    assert "q5_k" in formats.values()
    assert set(formats.values()) == {"q4_k", "q5_k", "q6_k"}


def test_what_is_small_enough_is_not_rounded_again() -> None:
    stored = {"v_proj.weight": Stored((32, 256), "Q4_0"), "o_proj.weight": Stored((32, 256), "Q6_K")}
    assert RECIPES["q8"].formats(stored) == {"v_proj.weight": "q4_0", "o_proj.weight": "q6_k"}
    assert RECIPES["q4"].formats(stored)["v_proj.weight"] == "q4_0"
    assert RECIPES["q4"].formats(stored)["o_proj.weight"] != "q6_k"


@pytest.mark.parametrize("quant", RECIPES)
def test_a_router_keeps_its_precision(quant: str) -> None:
    formats = RECIPES[quant].formats(matrices(official_target("26b")))
    routers = {fmt for name, fmt in formats.items() if "router" in name}
    assert routers == {"f32" if quant == "f32" else "bf16"}


@pytest.mark.parametrize(("element", "fmt"), [("Q4_K", "q4_k"), ("Q3_K", "q3_k"), ("MXFP4", "mxfp4"), ("F16", "f16")])
def test_a_file_keeps_its_formats(element: str, fmt: str) -> None:
    stored = {"a": Stored((32, 256), element), "b": Stored((32, 256), "Q8_0")}
    assert RECIPES["file"].formats(stored) == {"a": fmt, "b": "q8_0"}
