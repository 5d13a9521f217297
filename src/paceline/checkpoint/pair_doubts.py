"""What the files of a pair say against it: why its drafter may be wrong more often than others.

Nothing here keeps a pair from running: it is told when few drafts are accepted (`engine.acceptance_monitor`).
"""

from __future__ import annotations

import math
import re

from paceline.checkpoint.checkpoint import Checkpoint
from paceline.checkpoint.location import is_qat
from paceline.checkpoint.tensors import INTEGER
from paceline.quant.formats import FORMATS, native_format

# Words of Google's own names, and those that say how a file was made; what else is in a name is somebody else's.
USUAL_WORDS = re.compile(
    r"gemma|\d|e?\d+[bm]|a4b|it|pt|instruct|qat|gguf|unquantized|assistant|mtp|text|ud|i?q\d\w*|k|[sml]|x[sl]|bf16|f16|f32"
)
FEW_BITS = 6.0  # a weight, below which a drafter is said to be coarse


def pair_doubts(target: Checkpoint, drafter: Checkpoint, quant: str) -> list[str]:
    """Sentences without a full stop, the likeliest cause first.

    Args:
        target: as published.
        drafter: likewise.
        quant: the recipe that the target's weights are held by.
    """
    doubts = []
    if strange := _strange_words(target):
        doubts.append(f"the model is named {_name(target)!r} ({', '.join(strange)}: is it fine-tuned?)")
    if is_qat(_name(target)) != is_qat(_name(drafter)):
        doubts.append("only one of the pair is named as QAT")
    if not target.is_gguf and quant == "q4":
        doubts.append("the model's weights were rounded to 4 bits here (try --quant q6 or q8)")
    matrices = [ref for ref in drafter.tensors.values() if len(ref.shape) == 2 and ref.dtype not in INTEGER]
    bits = min((FORMATS[native_format(ref.dtype)].bits_per_weight for ref in matrices), default=math.inf)
    if bits < FEW_BITS:
        doubts.append(f"the drafter's file holds weights in {bits:g} bits")
    return doubts


def _name(checkpoint: Checkpoint) -> str:
    """What its maker calls a model, as far as the files tell: in them, by the hub's repository, or by the path."""
    stated = str(checkpoint.config.get("_name_or_path") or "")
    repository = next((part for part in checkpoint.path.parts if part.startswith("models--")), "")
    return (
        repository.rpartition("--")[2]
        or stated.rstrip("/").rpartition("/")[2]
        or checkpoint.path.name.removesuffix(".gguf")
    )


def _strange_words(checkpoint: Checkpoint) -> list[str]:
    words = re.split(r"[^a-z0-9]+", _name(checkpoint).lower())
    return [word for word in words if word and not USUAL_WORDS.fullmatch(word)]
