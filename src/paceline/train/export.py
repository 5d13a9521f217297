"""A trained drafter as a model folder in the official `-assistant` form."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

OUTSIDE = ("pre_projection.", "post_projection.", "masked_embedding.", "draft_token_ids")  # of a drafter's decoder


def write_model(folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """`config.json` and `model.safetensors` of weights by canonical name."""
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {
        name if name.startswith(OUTSIDE) else f"model.{name}": tensor.detach().cpu().contiguous()
        for name, tensor in weights.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # it is written readable for its owner only
