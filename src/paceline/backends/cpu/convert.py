"""Converts a checkpoint into a self-contained folder of packed weights, with its drafter inside."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paceline.backends.cpu.calibration import Calibration, Progress, calibrate, is_searched
from paceline.backends.cpu.packfile import write_pack
from paceline.backends.cpu.weights import pack_checkpoint
from paceline.backends.formats import drafter_quant
from paceline.checkpoint import Checkpoint, resolve
from paceline.checkpoint.checkpoint import PACKED_NAME
from paceline.checkpoint.location import DRAFTER_FOLDER
from paceline.config import DrafterConfig, TargetConfig, check_pair
from paceline.errors import CheckpointError, SettingsError
from paceline.quant.recipes import RECIPES
from paceline.text.tokenizer import Tokenizer

CALIBRATED = "calibrated_tokens"  # in a converted folder's config.json
TEXT_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class Converted:
    """What a conversion gave."""

    bits_per_weight: float  # of the target's matrices
    calibration: Calibration | None


def convert(
    target: Path,
    drafter: Path | None,
    out: Path,
    quant: str,
    threads: int,
    progress: Callable[[int], None] = lambda _: None,
    texts: Mapping[str, str] | None = None,
    reading: Progress = lambda what, done, total: None,
) -> Converted:
    """Write `out`, a folder that `paceline.load` takes like any model and that needs no other file.

    Args:
        target: the model's place, as `checkpoint.locate` gives it.
        drafter: its drafter's place, or None.
        out: the folder to make; it must not exist. It appears when it is whole.
        quant: recipe; the drafter is packed in the one that `backends.formats` chooses beside it.
        threads: for packing, checksums and calibration.
        progress: called with the file bytes of every tensor packed.
        texts: by name, which the pair reads first to find out which columns of its matrices matter; None: all do alike.
        reading: told of the tokens read.

    Raises:
        BackendError: the pair cannot be run over the texts.
        CheckpointError: a checkpoint is damaged, or `out` cannot be written.
        PairError: the drafter is another target's.
        PromptError: a text is empty.
        SettingsError: unknown format, one that texts change nothing about, or `out` exists.
    """
    if quant not in RECIPES:
        raise SettingsError(f"unknown quantisation {quant!r}; use one of {', '.join(RECIPES)}")
    if texts is not None and not is_searched(quant):
        gaining = ", ".join(name for name in RECIPES if is_searched(name))
        raise SettingsError(f"{quant} gains nothing from calibration; use it with {gaining}")
    if out.exists():
        raise SettingsError(f"{out}: exists already; name a new folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=out.name + ".", suffix=".part"))
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be written ({error.strerror})") from error
    try:
        checkpoint, draft_checkpoint = _open(target), _open(drafter) if drafter else None
        pair = checkpoint, checkpoint.target_config()
        draft_pair = (draft_checkpoint, draft_checkpoint.drafter_config()) if draft_checkpoint else None
        if draft_pair:
            check_pair(pair[1], draft_pair[1])
        calibration = None if texts is None else _calibrate(pair, draft_pair, texts, quant, threads, reading)
        bits = _write_pair(pair, draft_pair, temporary, quant, threads, progress, calibration)
        temporary.chmod(0o755)  # mkdtemp makes it private
        os.replace(temporary, out)
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be written ({error.strerror})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Converted(bits, calibration)


def _calibrate(
    target: tuple[Checkpoint, TargetConfig],
    drafter: tuple[Checkpoint, DrafterConfig] | None,
    texts: Mapping[str, str],
    quant: str,
    threads: int,
    reading: Progress,
) -> Calibration:
    """Run the target over the texts, and the drafter where its formats gain by it."""
    gains = drafter and is_searched(drafter_quant(drafter[0], quant))
    return calibrate(target, drafter if gains else None, texts, quant, threads, reading)


def _write_pair(
    target: tuple[Checkpoint, TargetConfig],
    drafter: tuple[Checkpoint, DrafterConfig] | None,
    out: Path,
    quant: str,
    threads: int,
    progress: Callable[[int], None],
    calibration: Calibration | None,
) -> float:
    """Write all files; returns bits a weight of the target's matrices."""
    checkpoint, config = target
    write_texts(checkpoint, config, out)
    settings = _with_head(checkpoint.config, config)
    if calibration:
        settings[CALIBRATED] = calibration.tokens
    (out / "config.json").write_text(json.dumps(settings, indent=2))
    importance = calibration.target if calibration else None
    tensors = resolve(checkpoint, config)
    weights = pack_checkpoint(tensors, config, quant, progress, importance=importance, threads=threads)
    write_pack(out / PACKED_NAME, weights, fingerprint="", threads=threads, with_tables=True)
    if drafter:
        checkpoint, draft_config = drafter
        (out / DRAFTER_FOLDER).mkdir()
        write_texts(checkpoint, None, out / DRAFTER_FOLDER)
        tensors, draft_quant = resolve(checkpoint, draft_config), drafter_quant(checkpoint, quant)
        importance = calibration.drafter if calibration else None
        draft_weights = pack_checkpoint(
            tensors, draft_config, draft_quant, progress, importance=importance, threads=threads
        )
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
