"""A trained drafter as a model folder in the official `-assistant` form."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
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


def replace_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Fill a fresh folder beside `folder` and move it there, so that a half-written one is never seen."""
    fresh, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir(parents=True)
    fill(fresh)
    if folder.exists():
        os.replace(folder, old)
    os.replace(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)
