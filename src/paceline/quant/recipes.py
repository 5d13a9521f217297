"""What users choose by `--quant`: a recipe says in which format each tensor of a model is held.

This module imports neither NumPy nor native code.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """Which format of `quant.formats` each matrix of a model takes.

    Attributes:
        name: what users and pack files call it.
        summary: ends the sentence "weights in memory: f32 ...".
        drafter: the recipe of a drafter beside a target of this one. A drafter is small, and its mistakes cost rounds,
            so it is never below q8.
        uniform: the format of every matrix, where a backend holds them all alike.
    """

    name: str
    summary: str
    drafter: str
    uniform: str

    def format_of(self, name: str) -> str:
        """The format of a matrix, by its native name. A router decides what runs, so it keeps its precision."""
        return "bf16" if name.endswith("router.proj.weight") and self.uniform != "f32" else self.uniform


# From the most precise to the smallest.
RECIPES = {
    r.name: r
    for r in (
        Recipe("f32", "as the reference", drafter="f32", uniform="f32"),
        Recipe("bf16", "as in the files", drafter="bf16", uniform="bf16"),
        Recipe("q8", "in half of that", drafter="q8", uniform="q8_0"),
        Recipe("q4", "in a quarter", drafter="q8", uniform="q4_0"),
    )
}
METAVAR = "|".join(RECIPES)
