"""Which recipe weights are held by, whatever the backend."""

from __future__ import annotations

from paceline.checkpoint import Checkpoint, Tensors
from paceline.checkpoint.names import PLE_TABLE
from paceline.errors import SettingsError
from paceline.quant.recipes import DEFAULT, RECIPES

SMALL = 256 << 20  # bytes of matrices in the files, up to which nothing is gained by making them smaller


def check_quant(quant: str) -> None:
    """Raise `SettingsError` unless this is a recipe or auto."""
    if quant not in (*RECIPES, "auto"):
        raise SettingsError(f"unknown quantisation {quant!r}; use one of {', '.join(RECIPES)} or auto")


def choose_quant(checkpoint: Checkpoint, tensors: Tensors) -> str:
    """The recipe that `auto` stands for.

    It depends on the files alone, not on the machine, so that every start makes the same choice: a GGUF stays what it
    is, small models keep their precision, and others are held by the default recipe.
    """
    matrices = [ref for name, ref in tensors.refs.items() if len(ref.shape) > 1 and name != PLE_TABLE]
    if checkpoint.is_gguf:
        return "file"
    if sum(ref.bytes for ref in matrices) > SMALL:
        return DEFAULT
    types = {ref.dtype for ref in matrices}
    return "f32" if "F32" in types else "bf16" if types == {"BF16"} else "file"


def drafter_quant(drafter: Checkpoint, quant: str) -> str:
    """The recipe of a drafter beside a target of recipe `quant`. A GGUF stays what it is."""
    return "file" if drafter.is_gguf else RECIPES[quant].drafter
