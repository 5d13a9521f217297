"""The composition root: from a model's name to an engine. The one place that chooses a backend."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from paceline.backends.cpu.backend import DRAFTER_FORMAT, CpuBackend, default_threads
from paceline.backends.cpu.pack_cache import LEAST_BYTES, fingerprint, pack_path
from paceline.backends.cpu.packfile import PackedWeights, StalePack, open_pack, write_pack
from paceline.backends.cpu.weights import CheckpointWeights
from paceline.checkpoint import Checkpoint, Tensors, locate, locate_drafter, resolve
from paceline.checkpoint.sizes import weight_bytes
from paceline.config import DrafterConfig, TargetConfig, check_pair
from paceline.engine.engine import Engine, check_draft_tokens
from paceline.errors import SettingsError
from paceline.quant.blocks import FORMATS
from paceline.text.chat import ChatTemplate
from paceline.text.tokenizer import Tokenizer

DEFAULT_CONTEXT = 32768  # positions; memory is taken as they are used
AUTO_SHARE = 0.7  # of the memory at hand that `auto` lets the weights take


def load(
    model: str,
    *,
    drafter: str = "auto",
    quant: str = "auto",
    threads: int | None = None,
    context: int | None = None,
    draft_tokens: int = 4,
    prompt_chunk: int = 256,
    notify: Callable[[str], None] = lambda _: None,
    progress: Callable[[int], None] = lambda _: None,
) -> Engine:
    """Load a Gemma 4 model and its drafter on the CPU.

    Args:
        model: a folder, a hub id (downloaded when it is not in the cache), or `tiny-python` for the bundled pair.
        drafter: "auto" (the folder or hub id with "-assistant" behind its name), "none", or a folder or hub id.
        quant: weight format: f32, bf16, q8, q4, or auto for the most precise one that fits the memory at hand.
        threads: worker threads; None for the physical cores.
        context: tokens a sequence may hold, prompt included; None for the model's own limit, at most 32768.
        draft_tokens: tokens drafted a round unless a request says otherwise, 0 to 15.
        prompt_chunk: prompt tokens read in one pass.
        notify: receives one-line notices of what was chosen.
        progress: receives the file bytes of every tensor as it is loaded.

    Raises:
        CheckpointError: a model cannot be found, or its files are damaged or not a Gemma 4 pair.
        PairError: the drafter is another target's.
        SettingsError: a setting out of range.
        BackendError: this processor or build cannot run the model.
    """
    check_draft_tokens(draft_tokens)
    _check_at_least("threads", threads, 1)
    _check_at_least("context", context, 2)
    _check_at_least("prompt_chunk", prompt_chunk, 1)
    if quant not in (*FORMATS, "auto"):
        raise SettingsError(f"unknown quantisation {quant!r}; use one of {', '.join(FORMATS)} or auto")
    folder = locate(model)
    checkpoint = Checkpoint.open(folder)
    config = checkpoint.target_config()
    draft_checkpoint = _open_drafter(model, folder, drafter, notify)
    draft_config = draft_checkpoint.drafter_config() if draft_checkpoint else None
    if draft_config:
        check_pair(config, draft_config)
    tensors = resolve(checkpoint, config)
    quant = _settle_quant(quant, config, draft_config, tensors, notify)
    threads = threads or default_threads()
    target = _Source(checkpoint, tensors, quant, threads, progress)
    pair = None
    if draft_checkpoint and draft_config:
        draft_tensors = resolve(draft_checkpoint, draft_config)
        pair = _Source(draft_checkpoint, draft_tensors, DRAFTER_FORMAT[quant], threads, progress)
    backend = CpuBackend(
        (config, target.weights),
        (draft_config, pair.weights) if draft_config and pair else None,
        threads=threads,
        context=min(context or DEFAULT_CONTEXT, config.max_positions),
        max_rows=max(prompt_chunk, 16),
        isa=os.environ.get("PACELINE_ISA", ""),
    )
    for source in (target, pair):
        if source:
            source.keep(notify)
    generation = checkpoint.generation.get("eos_token_id", config.stop_ids)
    return Engine(
        backend=backend,
        tokenizer=Tokenizer.open(checkpoint.tokenizer_path, checkpoint.tokenizer_config, config.bos_id),
        chat_template=ChatTemplate.open(checkpoint.chat_template_path, checkpoint.tokenizer_config),
        target_config=config,
        drafter_config=draft_config,
        stop_ids=frozenset([generation] if isinstance(generation, int) else generation or ()),
        quant=quant,
        threads=backend.threads,
        weight_bytes=target.weights.nbytes + (pair.weights.nbytes if pair else 0),
        draft_tokens=draft_tokens,
        prompt_chunk=prompt_chunk,
    )


def choose_quant(config: TargetConfig, drafter: DrafterConfig | None, dtype: str, memory: int) -> str:
    """The most precise format whose weights take at most 70 % of `memory` bytes; q4 if none does.

    A checkpoint in bf16 has nothing to gain from f32, which is chosen only where the files hold it.
    """
    for quant in ("f32", "bf16", "q8") if dtype == "F32" else ("bf16", "q8"):
        needed = weight_bytes(config, quant) + (weight_bytes(drafter, quant) if drafter else 0)
        if needed <= AUTO_SHARE * memory:
            return quant
    return "q4"


def available_memory() -> int:
    """Bytes that can be used without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux: all there is
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class _Source:
    """Weights of one checkpoint: from its pack file if there is a good one, else packed now and kept afterwards."""

    def __init__(
        self, checkpoint: Checkpoint, tensors: Tensors, quant: str, threads: int, progress: Callable[[int], None]
    ) -> None:
        self._path = pack_path(checkpoint, quant)
        self._fingerprint = fingerprint(checkpoint, quant)
        self._threads = threads
        self.weights: CheckpointWeights | PackedWeights
        try:
            self.weights = open_pack(self._path, threads, fingerprint=self._fingerprint, tensors=tensors)
        except StalePack:
            self.weights = CheckpointWeights(tensors, quant, progress)

    def keep(self, notify: Callable[[str], None]) -> None:
        """Write the pack file for the next start. A full disk costs nothing but the next start's time."""
        if not isinstance(self.weights, CheckpointWeights) or self.weights.nbytes < LEAST_BYTES:
            return
        try:
            write_pack(self._path, self.weights, self._fingerprint, self._threads, tables={})
            notify(f"packed weights kept in {self._path}")
        except OSError as error:
            notify(f"packed weights not kept: {self._path}: {error.strerror}")


def _settle_quant(
    quant: str, config: TargetConfig, drafter: DrafterConfig | None, tensors: Tensors, notify: Callable[[str], None]
) -> str:
    if quant == "auto":
        quant = choose_quant(config, drafter, tensors["embed_tokens.weight"].dtype, available_memory())
        notify(f"weights: {quant} (chosen for the memory at hand)")
    return quant


def _open_drafter(model: str, folder: Path, choice: str, notify: Callable[[str], None]) -> Checkpoint | None:
    found = locate_drafter(model, folder, choice)
    if found is None:
        if choice != "none":
            notify(f"drafter: none found beside {model}; decoding without one")
        return None
    return Checkpoint.open(found)


def _check_at_least(name: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise SettingsError(f"{name} is {value}; it must be at least {least}")
