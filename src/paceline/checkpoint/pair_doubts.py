"""What the files of a pair say against it: why its drafter may be wrong more often than others.

Nothing here keeps a pair from running: it is told when few drafts are accepted (`engine.acceptance_monitor`).
"""

from __future__ import annotations

import math
import re

from paceline.checkpoint.checkpoint import Checkpoint
from paceline.checkpoint.location import BUNDLED, is_qat
from paceline.quant.formats import FORMATS, native_format

# Words of Google's own names, those that say how a file was made, and who made it; another word may be a fine-tune's.
USUAL_WORDS = re.compile(
    r"google|gemma\d*n?|[ea]?\d+[bm]|it|pt|instruct|qat|unquantized|assistant|mtp|text|dense|moe|unsloth|bartowski|ggml|org|"
    r"gguf|mlx|ud|i\d|i?q\d\w*|k|[sml]|x+[sl]|nl|(bf|f|fp|mxfp|nvfp|int|w)\d+\w*|\d+|of|checkpoint|model|sha256|[0-9a-f]{12,}"
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
    strange = {name: words for name in _names(target) if (words := _strange_words(name))}
    for name, words in strange.items():
        doubts.append(f"the model is named {name!r} ({', '.join(words)}: is it fine-tuned?)")
    qat, other = (is_qat(f"{_names(one)} {one.path}") for one in (target, drafter))
    if qat != other:
        doubts.append("only one of the pair is named as QAT")
    if quant == "q4" and not target.is_gguf and not qat:
        cure = "convert it again with --quant q6" if target.packed else "try --quant q6 or q8"
        doubts.append(f"the model's weights were rounded to 4 bits here ({cure})")
    types = {ref.dtype for ref in drafter.tensors.values() if len(ref.shape) == 2 and ref.dtype.lower() in FORMATS}
    bits = min((FORMATS[native_format(dtype)].bits_per_weight for dtype in types), default=math.inf)
    if bits < FEW_BITS:
        doubts.append(f"the drafter's file holds weights in {bits:g} bits")
    return doubts


def _names(checkpoint: Checkpoint) -> list[str]:
    """What a model is called: in its files, if there, and by the hub's repository or its path."""
    stated = str(checkpoint.config.get("_name_or_path") or "").rstrip("/").rpartition("/")[2]
    repository = next((part for part in checkpoint.path.parts if part.startswith("models--")), "")
    placed = repository.rpartition("--")[2] or checkpoint.path.name.removesuffix(".gguf")
    return list(dict.fromkeys(filter(None, (stated, placed))))


def _strange_words(name: str) -> list[str]:
    words = [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word]
    return [] if name in BUNDLED else [word for word in words if not USUAL_WORDS.fullmatch(word)]
