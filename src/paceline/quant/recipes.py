"""What users choose by `--quant`: a recipe says in which format each tensor of a model is held.

This module imports neither NumPy nor native code.
"""

from __future__ import annotations

from dataclasses import dataclass

from paceline.quant.formats import native_format


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

    def format_of(self, name: str, element: str) -> str:
        """The format of a matrix.

        Args:
            name: its native name. A router decides what runs, so it keeps its precision.
            element: the type of its elements in the file.
        """
        if self.name == "file":
            return native_format(element)
        return "bf16" if name.endswith("router.proj.weight") and self.uniform != "f32" else self.uniform


# As the file has it, then from the most precise to the smallest.
RECIPES = {
    r.name: r
    for r in (
        Recipe("file", "each tensor as the file holds it", drafter="file", uniform="bf16"),
        Recipe("f32", "as the reference", drafter="f32", uniform="f32"),
        Recipe("bf16", "in half of f32", drafter="bf16", uniform="bf16"),
        Recipe("q8", "in a quarter", drafter="q8", uniform="q8_0"),
        Recipe("q4", "in an eighth", drafter="q8", uniform="q4_0"),
    )
}
METAVAR = "|".join(RECIPES)
DEFAULT = "q4"
