"""Writing a trained pair as checkpoint folders in the official format, which transformers loads as well."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from tokenizers import Tokenizer
from tools.tiny_python.drafter import drafter_json
from tools.tiny_python.optimizer import Parameters
from tools.tiny_python.target import target_json
from tools.tiny_python.tokenizer import write_tokenizer

OUTSIDE = ("pre_projection.", "post_projection.", "masked_embedding.")  # of a drafter's decoder


def write_target(weights: Parameters, tokenizer: Tokenizer, folder: Path, card: str) -> None:
    """Weights, config, tokenizer, chat template, generation defaults and card."""

    def fill(fresh: Path) -> None:
        _write_model(fresh, target_json(), weights)
        write_tokenizer(tokenizer, fresh)
        (fresh / "README.md").write_text(card)

    _replace_folder(folder, fill)


def write_drafter(weights: Parameters, folder: Path) -> None:
    """Weights and config; the tokenizer is the target's."""
    _replace_folder(folder, lambda fresh: _write_model(fresh, drafter_json(), weights))


def _write_model(folder: Path, config: dict[str, Any], weights: Parameters) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {
        name if name.startswith(OUTSIDE) else f"model.{name}": tensor.detach().contiguous()
        for name, tensor in weights.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # it is written readable for its owner only


def _replace_folder(folder: Path, fill: Callable[[Path], None]) -> None:
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
