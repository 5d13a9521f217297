"""Writing a trained pair as checkpoint folders in the official format, which transformers loads as well."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer
from tools.tiny_python.drafter import drafter_json
from tools.tiny_python.target import target_json
from tools.tiny_python.tokenizer import write_tokenizer

from paceline.train.export import write_model
from paceline.train.optimizer import Parameters


def write_target(weights: Parameters, tokenizer: Tokenizer, folder: Path, card: str) -> None:
    """Weights, config, tokenizer, chat template, generation defaults and card."""

    def fill(fresh: Path) -> None:
        write_model(fresh, target_json(), weights)
        write_tokenizer(tokenizer, fresh)
        (fresh / "README.md").write_text(card)

    _replace_folder(folder, fill)


def write_drafter(weights: Parameters, folder: Path) -> None:
    """Weights and config; the tokenizer is the target's."""
    _replace_folder(folder, lambda fresh: write_model(fresh, drafter_json(), weights))


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
