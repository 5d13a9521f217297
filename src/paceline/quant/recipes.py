"""What users choose by `--quant`: a recipe says in which format each tensor of a model is held.

The formats of q4, q5 and q6 were chosen by what they cost on a real model (docs/models.md). This module imports
neither NumPy nor native code.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from paceline.quant.formats import FORMATS, native_format

ROUTER = "router.proj.weight"  # decides what runs, so it keeps its precision


class Stored(NamedTuple):
    """A matrix, or list of them, in a model's files."""

    shape: tuple[int, ...]
    element: str  # type of its elements


@dataclass(frozen=True)
class Recipe:
    """Which format of `quant.formats` each matrix of a model takes.

    Attributes:
        name: what users and pack files call it.
        summary: ends the sentence "weights in memory: f32 ...".
        cost: what users are told that it loses, against f32 (docs/models.md).
        drafter: the recipe of a drafter beside a target of this one. A drafter is small, and its mistakes cost rounds,
            so it is never below q8.
        base: the format of a matrix.
        upgrades: better formats of matrices whose names match an expression, the most worthwhile first; each is taken
            if the matrices' mean stays within the budget.
        budget: bits a weight.
        uniform: the format of every matrix, where a backend holds them all alike.
    """

    name: str
    summary: str
    drafter: str
    base: str
    uniform: str
    cost: str = "the files' own precision"
    upgrades: tuple[tuple[str, str], ...] = ()
    budget: float = math.inf

    def formats(self, matrices: Mapping[str, Stored]) -> dict[str, str]:
        """The format of each matrix of a model, by name.

        A recipe that quantises leaves a matrix alone that is quantised to as few bits already.
        """
        own = {name: native_format(stored.element) for name, stored in matrices.items()}
        if self.name == "file":
            return own
        router = "f32" if self.base == "f32" else "bf16"
        chosen = {name: router for name in matrices if name.endswith(ROUTER)}
        chosen |= {name: fmt for name, fmt in own.items() if self._is_as_small(fmt) and name not in chosen}
        free = [name for name in matrices if name not in chosen]
        chosen |= dict.fromkeys(free, self.base)
        for pattern, better in self.upgrades:
            upgraded = {name: better for name in free if re.search(pattern, name)}
            if mean_bits(matrices, chosen | upgraded) <= self.budget:
                chosen |= upgraded
        return chosen

    @property
    def quantises(self) -> bool:
        return FORMATS[self.base].quantised

    def _is_as_small(self, fmt: str) -> bool:
        small = FORMATS[fmt].bits_per_weight <= FORMATS[self.base].bits_per_weight
        return self.quantises and FORMATS[fmt].quantised and small


def mean_bits(matrices: Mapping[str, Stored], formats: Mapping[str, str]) -> float:
    """Bits a weight of a model's matrices, scales included."""
    sizes = {name: math.prod(stored.shape) for name, stored in matrices.items()}
    return sum(FORMATS[formats[name]].bits_per_weight * size for name, size in sizes.items()) / sum(sizes.values())


def _upgrades(keys: str, others: str) -> tuple[tuple[str, str], ...]:
    """Better formats of keys and values, then of other matrices, by what a weight of each loses."""
    parts = ("v_proj", "k_proj", "up_proj", "gate_proj", "gate_up_proj", "down_proj", "q_proj", "o_proj")
    return tuple((rf"{part}(\.|$)", keys if part in ("v_proj", "k_proj") else others) for part in parts)


# As the file has it, then from the most precise to the smallest.
RECIPES = {
    r.name: r
    for r in (
        Recipe("file", "each tensor as the file holds it", drafter="file", base="bf16", uniform="bf16"),
        Recipe("f32", "as the reference", drafter="f32", base="f32", uniform="f32"),
        Recipe("bf16", "in half of f32", drafter="bf16", base="bf16", uniform="bf16"),
        Recipe(
            "q8",
            "in 8.5 bits a weight",
            drafter="q8",
            base="q8_0",
            uniform="q8_0",
            cost="KL 0.003 and 97 % same top token on Gemma 3 270M",
        ),
        Recipe(
            "q6",
            "in 6.6 to 7.2",
            drafter="q8",
            base="q6_k",
            uniform="q8_0",
            cost="KL 0.009 and 94 % same top token on Gemma 3 270M",
            upgrades=_upgrades("q8_0", "q8_0"),
            budget=7.2,
        ),
        Recipe(
            "q5",
            "in 5.6 to 6",
            drafter="q8",
            base="q5_k",
            uniform="q8_0",
            cost="KL 0.027 and 91 % same top token on Gemma 3 270M",
            upgrades=_upgrades("q6_k", "q6_k"),
            budget=6.0,
        ),
        Recipe(
            "q4",
            "in 4.6 to 5",
            drafter="q8",
            base="q4_k",
            uniform="q4_0",
            cost="KL 0.11 and 79 % same top token on Gemma 3 270M",
            upgrades=_upgrades("q6_k", "q5_k"),
            budget=5.0,
        ),
    )
}
METAVAR = "|".join(RECIPES)
DEFAULT = "q4"
