"""Chooses where a model's weights come from: a converted folder, a kept pack file, or the checkpoint itself."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from paceline.backends.cpu.pack_cache import LEAST_BYTES, fingerprint, pack_path
from paceline.backends.cpu.packfile import PackedWeights, StalePack, open_pack, write_pack
from paceline.backends.cpu.weights import CheckpointWeights
from paceline.checkpoint import Checkpoint, resolve
from paceline.checkpoint.sizes import weight_bytes
from paceline.config import DrafterConfig, TargetConfig
from paceline.errors import CheckpointError, SettingsError
from paceline.quant.blocks import FORMATS

AUTO_SHARE = 0.7  # of the memory at hand that `auto` lets the weights take


@dataclass(frozen=True)
class Source:
    """Weights of one checkpoint, and what is needed to keep them for the next start."""

    weights: CheckpointWeights | PackedWeights
    checkpoint: Checkpoint
    threads: int

    def keep(self, notify: Callable[[str], None]) -> None:
        """Write the pack file once everything is loaded. A full disk costs nothing but the next start's time."""
        if not isinstance(self.weights, CheckpointWeights) or self.weights.nbytes < LEAST_BYTES:
            return
        path = pack_path(self.checkpoint, self.weights.quant)
        try:
            write_pack(path, self.weights, fingerprint(self.checkpoint, self.weights.quant), self.threads, tables={})
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
) -> Source:
    """Find a checkpoint's weights in a format.

    Args:
        checkpoint: the opened folder.
        config: its settings.
        quant: weight format, or auto.
        threads: for checking a pack file.
        notify: told what was chosen.
        progress: called with the file bytes of every tensor as it is packed.

    Raises:
        CheckpointError: tensors are missing or wrong, or a converted folder is damaged.
        SettingsError: not the format the folder was converted to.
    """
    if checkpoint.packed:
        return Source(_open_converted(checkpoint.packed, quant, threads), checkpoint, threads)
    tensors = resolve(checkpoint, config)
    if quant == "auto":
        quant = choose_quant(config, tensors["embed_tokens.weight"].dtype, available_memory())
        notify(f"weights: {quant} (chosen for the memory at hand)")
    weights: CheckpointWeights | PackedWeights
    try:
        about = fingerprint(checkpoint, quant)
        weights = open_pack(pack_path(checkpoint, quant), threads, fingerprint=about, tensors=tensors)
    except StalePack:
        weights = CheckpointWeights(tensors, quant, progress)
    return Source(weights, checkpoint, threads)


def check_quant(quant: str) -> None:
    """Raise `SettingsError` unless this is a weight format or auto."""
    if quant not in (*FORMATS, "auto"):
        raise SettingsError(f"unknown quantisation {quant!r}; use one of {', '.join(FORMATS)} or auto")


def choose_quant(config: TargetConfig | DrafterConfig, dtype: str, memory: int) -> str:
    """The most precise format whose weights take at most 70 % of `memory` bytes; q4 if none does.

    A checkpoint in bf16 has nothing to gain from f32, which is chosen only where the files hold it.
    """
    for quant in ("f32", "bf16", "q8") if dtype == "F32" else ("bf16", "q8"):
        if weight_bytes(config, quant) <= AUTO_SHARE * memory:
            return quant
    return "q4"


def available_memory() -> int:
    """Bytes that can be used without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux: all there is
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _open_converted(path: Path, quant: str, threads: int) -> PackedWeights:
    try:
        weights = open_pack(path, threads)
    except StalePack as error:
        raise CheckpointError(f"{path}: cannot be used ({error}); convert the model again") from error
    if quant not in ("auto", weights.quant):
        raise SettingsError(f"{path}: holds {weights.quant} weights; use --quant auto, or convert the model to {quant}")
    return weights
