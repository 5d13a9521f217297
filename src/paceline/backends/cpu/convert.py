"""Converts a checkpoint into a self-contained folder of packed weights, with its drafter inside."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from paceline.backends.cpu.packfile import write_pack
from paceline.backends.cpu.weights import pack_checkpoint
from paceline.backends.formats import drafter_quant
from paceline.checkpoint import Checkpoint, resolve
from paceline.checkpoint.checkpoint import PACKED_NAME
from paceline.checkpoint.location import DRAFTER_FOLDER
from paceline.config import TargetConfig, check_pair
from paceline.errors import CheckpointError, SettingsError
from paceline.quant.recipes import RECIPES
from paceline.text.tokenizer import Tokenizer

TEXT_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


def convert(
    target: Path,
    drafter: Path | None,
    out: Path,
    quant: str,
    threads: int,
    progress: Callable[[int], None] = lambda _: None,
) -> float:
    """Write `out`, a folder that `paceline.load` takes like any model and that needs no other file.

    Args:
        target: the model's place, as `checkpoint.locate` gives it.
        drafter: its drafter's place, or None.
        out: the folder to make; it must not exist. It appears when it is whole.
        quant: recipe; the drafter is packed in the one that `backends.formats` chooses beside it.
        threads: for the checksums.
        progress: called with the file bytes of every tensor packed.

    Returns:
        Bits a weight of the target's matrices.

    Raises:
        CheckpointError: a checkpoint is damaged, or `out` cannot be written.
        PairError: the drafter is another target's.
        SettingsError: unknown format, or `out` exists.
    """
    if quant not in RECIPES:
        raise SettingsError(f"unknown quantisation {quant!r}; use one of {', '.join(RECIPES)}")
    if out.exists():
        raise SettingsError(f"{out}: exists already; name a new folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=out.name + ".", suffix=".part"))
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be written ({error.strerror})") from error
    try:
        bits = _convert_pair(target, drafter, temporary, quant, threads, progress)
        temporary.chmod(0o755)  # mkdtemp makes it private
        os.replace(temporary, out)
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be written ({error.strerror})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return bits


def _convert_pair(
    target: Path, drafter: Path | None, out: Path, quant: str, threads: int, progress: Callable[[int], None]
) -> float:
    checkpoint = _open(target)
    config = checkpoint.target_config()
    draft_checkpoint = _open(drafter) if drafter else None
    if draft_checkpoint:
        check_pair(config, draft_checkpoint.drafter_config())
    write_texts(checkpoint, config, out)
    (out / "config.json").write_text(json.dumps(_with_head(checkpoint.config, config), indent=2))
    weights = pack_checkpoint(resolve(checkpoint, config), config, quant, progress)
    write_pack(out / PACKED_NAME, weights, fingerprint="", threads=threads, with_tables=True)
    if draft_checkpoint:
        draft_config = draft_checkpoint.drafter_config()
        (out / DRAFTER_FOLDER).mkdir()
        write_texts(draft_checkpoint, None, out / DRAFTER_FOLDER)
        draft_tensors = resolve(draft_checkpoint, draft_config)
        draft_weights = pack_checkpoint(draft_tensors, draft_config, drafter_quant(draft_checkpoint, quant), progress)
        write_pack(out / DRAFTER_FOLDER / PACKED_NAME, draft_weights, "", threads, with_tables=True)
    return weights.bits_per_weight


def _open(folder: Path) -> Checkpoint:
    checkpoint = Checkpoint.open(folder)
    if checkpoint.packed:
        raise SettingsError(f"{folder}: is converted already; convert the original checkpoint")
    return checkpoint


def _with_head(settings: Mapping[str, Any], config: TargetConfig) -> dict[str, Any]:
    """The settings of a `config.json`, with the head that the files were found to hold."""
    text, head = settings.get("text_config"), {"tie_word_embeddings": config.tied_head}
    return {**settings, **({"text_config": {**text, **head}} if isinstance(text, Mapping) else head)}


def write_texts(checkpoint: Checkpoint, config: TargetConfig | None, out: Path) -> None:
    """The files of a model folder beside its weights; `config` is a target's, which has a tokenizer."""
    if not checkpoint.is_gguf:
        for name in TEXT_FILES:
            if (checkpoint.path / name).exists():
                shutil.copyfile(checkpoint.path / name, out / name)
        return
    contents = (checkpoint.config, checkpoint.generation, checkpoint.tokenizer_config)
    for name, content in zip(("config", "generation_config", "tokenizer_config"), contents, strict=True):
        (out / f"{name}.json").write_text(json.dumps(dict(content), indent=2))
    if config:
        tokenizer = Tokenizer.open(checkpoint.tokenizer, {}, config.bos_id, config.vocab_size)
        (out / "tokenizer.json").write_text(tokenizer.dumps())
