"""Chooses where a model's weights come from: a converted folder, a kept pack file, or the checkpoint itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from paceline.backends.cpu.pack_cache import LEAST_BYTES, fingerprint, pack_path
from paceline.backends.cpu.packfile import StalePack, open_pack, write_pack
from paceline.backends.cpu.weights import Weights, pack_checkpoint
from paceline.backends.formats import choose_quant
from paceline.checkpoint import Checkpoint, resolve
from paceline.config import DrafterConfig, TargetConfig
from paceline.errors import CheckpointError, SettingsError
from paceline.quant.recipes import RECIPES


@dataclass(frozen=True)
class WeightSource:
    """Weights of one checkpoint, and what is needed to keep them for the next start."""

    weights: Weights
    checkpoint: Checkpoint
    threads: int
    packed_now: bool = False  # not mapped from a pack file

    def keep(self, notify: Callable[[str], None]) -> None:
        """Write the pack file once everything is loaded. A full disk costs nothing but the next start's time.

        Small models are packed in no time; f32 is for comparisons, and its files would be the largest.
        """
        if not self.packed_now or self.weights.nbytes < LEAST_BYTES or self.weights.is_f32:
            return
        path = pack_path(self.checkpoint, self.weights.quant)
        try:
            about = fingerprint(self.checkpoint, self.weights.quant)
            write_pack(path, self.weights, about, self.threads, with_tables=False)
            notify(f"packed weights kept in {path}")
        except OSError as error:
            notify(f"packed weights not kept in {path}: {error.strerror}")


def open_source(
    checkpoint: Checkpoint,
    config: TargetConfig | DrafterConfig,
    quant: str,
    threads: int,
    *,
    notify: Callable[[str], None],
    progress: Callable[[int], None] = lambda _: None,
) -> WeightSource:
    """Find a checkpoint's weights in a format.

    Args:
        checkpoint: the opened folder.
        config: its settings.
        quant: recipe, or auto.
        threads: for packing, or for checking a pack file.
        notify: told what auto chose.
        progress: called with the file bytes of every tensor as it is packed.

    Raises:
        CheckpointError: tensors are missing or wrong, or a converted folder is damaged.
        SettingsError: not the format the folder was converted to.
    """
    if checkpoint.packed:
        return WeightSource(_open_converted(checkpoint.packed, config, quant, threads), checkpoint, threads)
    tensors = resolve(checkpoint, config)
    automatic = quant == "auto"
    if automatic:
        quant = choose_quant(checkpoint, tensors)
    try:
        about = fingerprint(checkpoint, quant)
        weights = open_pack(pack_path(checkpoint, quant), config, threads, fingerprint=about, tensors=tensors)
        packed_now = False
    except StalePack:
        weights, packed_now = pack_checkpoint(tensors, config, quant, progress, threads=threads), True
    if automatic:
        notify(f"weights: {quant}, {RECIPES[quant].cost}; {weights.bits_per_weight:.1f} bits a weight")
    return WeightSource(weights, checkpoint, threads, packed_now)


def _open_converted(path: Path, config: TargetConfig | DrafterConfig, quant: str, threads: int) -> Weights:
    try:
        weights = open_pack(path, config, threads)
    except StalePack as error:
        raise CheckpointError(f"{path}: cannot be used ({error}); convert the model again") from error
    if quant not in ("auto", weights.quant):
        raise SettingsError(f"{path}: holds {weights.quant} weights; use --quant auto, or convert the model to {quant}")
    return weights
