"""The composition root: from a model's name to an engine. The one place that chooses a backend."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

from paceline.backends.base import Backend
from paceline.backends.cpu.backend import CpuBackend
from paceline.backends.cpu.processors import default_threads, processors
from paceline.backends.cpu.sources import WeightSource, open_source
from paceline.backends.formats import check_quant, drafter_quant
from paceline.checkpoint import Checkpoint, locate, locate_drafter, pair_doubts, resolve, unless_asked
from paceline.checkpoint.config_json import token_ids
from paceline.config import LIMITS, DrafterConfig, TargetConfig, check_pair
from paceline.engine.acceptance_monitor import AcceptanceMonitor
from paceline.engine.draft_control import DraftControl
from paceline.engine.engine import DraftTokens, Engine, check_draft_tokens
from paceline.engine.prefix_cache import PrefixCache
from paceline.engine.proposers import GrammarProposer
from paceline.engine.scheduler import Scheduler
from paceline.errors import BackendError, CheckpointError, SettingsError
from paceline.quant.cache_formats import check_cache_format
from paceline.sampling_params import check_sampling_params
from paceline.text.chat import ChatTemplate
from paceline.text.tokenizer import Tokenizer
from paceline.types import MAX_DRAFT

MAX_SLOTS = 64
MAX_THREADS = 255  # what the native thread pool can count
MAX_CONTEXT = int(LIMITS["max_position_embeddings"][1])
MAX_PROMPT_CHUNK = 1 << 14  # rows of scratch memory, and of sliding rings
MAX_CACHE_MEMORY = 1 << 50
MAX_WAITING = 1 << 20
DEFAULT_CONTEXT = 32768  # positions; memory is taken as they are used


@dataclass(frozen=True)
class Parts:
    """What a backend is made of."""

    target: tuple[Checkpoint, TargetConfig]
    drafter: tuple[Checkpoint, DrafterConfig] | None
    quant: str
    kv: str
    threads: int | None
    sizes: dict[str, int]  # context: positions of a slot; slots; max_rows: of one slot in one pass
    notify: Callable[[str], None]
    progress: Callable[[int], None]


def load(
    model: str,
    *,
    drafter: str = "auto",
    device: str = "cpu",
    quant: str = "auto",
    kv: str = "auto",
    threads: int | None = None,
    context: int | None = None,
    slots: int = 1,
    draft_tokens: DraftTokens = "auto",
    prompt_chunk: int = 256,
    cache_memory: int = 0,
    most_waiting: int = 64,
    notify: Callable[[str], None] = lambda _: None,
    progress: Callable[[int], None] = lambda _: None,
) -> Engine:
    """Load a Gemma 4 model and its drafter.

    Args:
        model: a folder, a GGUF, a hub id (downloaded when it is not in the cache), a name of another program's such as
            `ollama:gemma4:e2b`, or `tiny-python`, which comes with paceline; `checkpoint.locate` says more.
        drafter: "auto" for one beside the model (see `checkpoint.locate_drafter`), "none", or a model's name.
        device: "cpu" for the native kernels; "cuda" for those of a GPU, which need the extra `cuda`; "mps" or another
            device of PyTorch ("torch:cpu" for PyTorch on the processor), which is slow.
        quant: weight format: f32, bf16, q8, q4, or auto for the most precise one that fits the memory at hand.
        kv: format of the KV cache: f32, bf16, q8, or auto for f32 with f32 weights and bf16 else.
        threads: worker threads; None for the physical performance cores, within CPU quotas.
        context: tokens a sequence may hold, prompt included; None for the model's own limit, at most 32768.
        slots: sequences that run at once; the rest are queued.
        draft_tokens: tokens drafted a round unless a request says otherwise: 0 to 15, or "auto" for as many as pay.
        prompt_chunk: prompt tokens in one pass.
        cache_memory: bytes for the prefix cache; 0 for none.
        most_waiting: generations that may wait for a slot.
        notify: receives one-line notices of what was chosen, and warnings.
        progress: receives the file bytes of every tensor as it is loaded.

    Raises:
        CheckpointError: a model cannot be found, or its files are damaged or not a Gemma 4 pair.
        PairError: the drafter is another target's.
        SettingsError: a setting out of range.
        BackendError: this processor or build cannot run the model.
    """
    check_draft_tokens(draft_tokens)
    check_quant(quant)
    check_cache_format(kv)
    _check_range("threads", threads, 1, MAX_THREADS)
    _check_range("context", context, 2, MAX_CONTEXT)
    _check_range("slots", slots, 1, MAX_SLOTS)
    _check_range("prompt_chunk", prompt_chunk, 1, MAX_PROMPT_CHUNK)
    _check_range("cache_memory", cache_memory, 0, MAX_CACHE_MEMORY)
    _check_range("most_waiting", most_waiting, 0, MAX_WAITING)
    place = locate(model, notify)
    checkpoint = Checkpoint.open(place)
    config = checkpoint.target_config()
    pair = _open_drafter(model, place, drafter, config, notify)
    # Small files come before the weights, so that what is missing is reported at once. The template's process starts.
    where = str(checkpoint.where("tokenizer_config.json"))
    template = ChatTemplate.open(checkpoint.chat_template_path, checkpoint.tokenizer_config, where)
    tokenizer = Tokenizer.open(checkpoint.tokenizer, checkpoint.tokenizer_config, config.bos_id, config.vocab_size)
    checkpoint = replace(checkpoint, vocabulary=None)  # its memory is wanted for the weights
    if template:
        template.check()
    stop_ids = frozenset(_stop_ids(checkpoint, config))
    sampling = check_sampling_params(checkpoint.sampling(), config.vocab_size)
    if context and context > config.max_positions:
        notify(f"context: {config.max_positions} tokens, which is all the model can take")
    parts = Parts(
        target=(checkpoint, config),
        drafter=pair,
        quant=quant,
        kv=kv,
        threads=threads,
        sizes={
            "context": min(context or DEFAULT_CONTEXT, config.max_positions),
            "slots": slots,
            "max_rows": max(prompt_chunk, MAX_DRAFT + 1),
        },
        notify=notify,
        progress=progress,
    )
    backend = _on_cpu(parts) if device == "cpu" else _on_torch(parts, device)
    monitor = AcceptanceMonitor(pair_doubts(checkpoint, pair[0], backend.info.quant) if pair else (), notify)
    proposers = [GrammarProposer(), DraftControl(backend.info.has_drafter, backend.info.stops_early, monitor)]
    prefix_cache = PrefixCache(backend, cache_memory) if cache_memory else None
    engine = Engine(
        backend=backend,
        tokenizer=tokenizer,
        chat_template=template,
        target_config=config,
        drafter_config=pair[1] if pair else None,
        stop_ids=stop_ids,
        sampling=sampling,
        draft_tokens=draft_tokens,
        scheduler=Scheduler(backend, proposers, prompt_chunk, most_waiting, prefix_cache),
    )
    if device != "cpu":
        engine.warm_up()
    return engine


def _on_cpu(parts: Parts) -> Backend:
    most = min(MAX_THREADS, processors())
    threads = min(parts.threads or default_threads(), most)
    if parts.threads and parts.threads > most:
        parts.notify(f"threads: {most}; more would only wait for each other on {processors()} processors")

    def opened(one: tuple[Checkpoint, TargetConfig | DrafterConfig], quant: str) -> WeightSource:
        return open_source(*one, quant, threads, notify=parts.notify, progress=parts.progress)

    sources = [opened(parts.target, parts.quant)]
    weights, pair = sources[0].weights, None
    if parts.drafter:
        sources.append(opened(parts.drafter, drafter_quant(parts.drafter[0], weights.quant)))
        pair = (parts.drafter[1], sources[1].weights)
    isa = os.environ.get("PACELINE_ISA", "")
    backend = CpuBackend((parts.target[1], weights), pair, threads=threads, isa=isa, kv=parts.kv, **parts.sizes)
    for source in sources:
        source.keep(parts.notify)
    return backend


def torch_backends(device: str) -> ModuleType:
    """What makes PyTorch's backends: `backends.torch.load`.

    Raises:
        BackendError: PyTorch is not installed.
    """
    try:
        import paceline.backends.torch.load as made
    except ImportError as error:
        raise BackendError(f"--device {device} needs {error.name}; pip install 'paceline[cuda]'") from error
    return made


def _on_torch(parts: Parts, device: str) -> Backend:
    if parts.kv != "auto":
        raise BackendError(f"--device {device} chooses the format of its KV cache; --kv {parts.kv} is for --device cpu")
    loader = torch_backends(device)
    folder = parts.target[0]
    if folder.packed:
        raise CheckpointError(f"{folder.path}: converted folders are for --device cpu; give the model as published")
    name = device.removeprefix("torch:")
    backend: Backend = loader.load_backend(
        parts.target,
        parts.drafter,
        device=name,
        quant=parts.quant,
        threads=parts.threads,
        notify=parts.notify,
        progress=parts.progress,
        **parts.sizes,
    )
    parts.notify(f"device: {name} through PyTorch; weights: {backend.info.quant}")
    return backend


def _stop_ids(checkpoint: Checkpoint, config: TargetConfig) -> tuple[int, ...]:
    name = "generation_config.json"
    return token_ids(
        checkpoint.generation.get("eos_token_id", config.stop_ids), f"{checkpoint.where(name)}: eos_token_id"
    )


def _open_drafter(
    model: str, place: Path, choice: str, config: TargetConfig, notify: Callable[[str], None]
) -> tuple[Checkpoint, DrafterConfig] | None:
    """The drafter of a target; one that was not asked for and cannot be used is left out with a notice."""
    with unless_asked(choice, notify):
        found = locate_drafter(model, place, choice, notify)
        if found is None:
            if choice != "none":
                notify(f"drafter: none found beside {model}; decoding without one")
            return None
        checkpoint = Checkpoint.open(found)
        draft_config = checkpoint.drafter_config()
        check_pair(config, draft_config)
        if not checkpoint.packed:
            resolve(checkpoint, draft_config)
        return replace(checkpoint, vocabulary=None), draft_config  # the target's is used
    return None


def _check_range(name: str, value: int | None, least: int, most: int) -> None:
    if value is not None and (type(value) is not int or not least <= value <= most):
        raise SettingsError(f"{name} is {value!r}; it must be a whole number between {least} and {most}")
