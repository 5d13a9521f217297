"""Writing a trained pair as checkpoint folders in the official format, which transformers loads as well."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer
from tools.tiny_python.drafter import drafter_json
from tools.tiny_python.target import target_json
from tools.tiny_python.tokenizer import write_tokenizer

from paceline.train.export import replace_folder, write_model
from paceline.train.optimizer import Parameters


def write_target(weights: Parameters, tokenizer: Tokenizer, folder: Path, card: str) -> None:
    """Weights, config, tokenizer, chat template, generation defaults and card."""

    def fill(fresh: Path) -> None:
        write_model(fresh, target_json(), weights)
        write_tokenizer(tokenizer, fresh)
        (fresh / "README.md").write_text(card)

    replace_folder(folder, fill)


def write_drafter(weights: Parameters, folder: Path) -> None:
    """Weights and config; the tokenizer is the target's."""
    replace_folder(folder, lambda fresh: write_model(fresh, drafter_json(), weights))
