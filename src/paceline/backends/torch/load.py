"""From checkpoints to the PyTorch backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from paceline.backends.formats import choose_quant, drafter_quant
from paceline.backends.torch.backend import TorchBackend
from paceline.backends.torch.measure import device_name
from paceline.backends.torch.weights import CheckpointSource, RandomSource
from paceline.checkpoint import Checkpoint, resolve
from paceline.config import DrafterConfig, TargetConfig
from paceline.errors import BackendError
from paceline.quant.recipes import DEFAULT, RECIPES

__all__ = ["device_name", "load_backend", "open_device", "random_backend"]


def load_backend(
    target: tuple[Checkpoint, TargetConfig],
    drafter: tuple[Checkpoint, DrafterConfig] | None,
    *,
    device: str,
    quant: str,
    threads: int | None,
    notify: Callable[[str], None],
    progress: Callable[[int], None],
    context: int,
    slots: int,
    max_rows: int,
) -> TorchBackend:
    """Read a pair's weights onto a device.

    Args:
        target: its opened folder and config.
        drafter: the same of the drafter, or None for plain decoding.
        device: of PyTorch, such as cuda, cuda:1, mps or cpu.
        quant: recipe, or auto; see `choose_quant` and `CheckpointSource`.
        threads: of PyTorch on the processor; None for its default.
        notify: told what is not held as in the files.
        progress: told the file bytes of what is read.
        context: positions a slot can hold.
        slots: sequences held at once.
        max_rows: most rows of one slot in one step.

    Raises:
        BackendError: no such device here, or it has too little memory.
        CheckpointError: tensors are missing or wrong.
    """
    where = open_device(device)
    tensors = resolve(*target)
    if quant == "auto":
        quant = choose_quant(target[0], tensors)
        quant = "q8" if quant == DEFAULT else quant  # q4 is plain Q4_0 here, which costs too much to be chosen unasked
    if threads:
        torch.set_num_threads(threads)
    sources = {"weights": CheckpointSource(tensors, quant, where, progress)}
    pair = None
    if drafter:
        beside, plain = drafter_quant(drafter[0], quant), sources["weights"].plain
        sources["drafter"] = CheckpointSource(resolve(*drafter), beside, where, progress, plain)
        pair = drafter[1], sources["drafter"]
    whole = target[1], sources["weights"]
    with enough_memory(device, quant, slots * context):
        backend = TorchBackend(whole, pair, quant=quant, context=context, slots=slots, max_rows=max_rows)
    for part, source in sources.items():
        if notice := source.notice():
            notify(f"{part}: {notice}")
    return backend


def random_backend(
    target: TargetConfig, drafter: DrafterConfig, *, device: str, quant: str, context: int, max_rows: int
) -> TorchBackend:
    """A pair of random weights, for measurements.

    Raises:
        BackendError: no such device here, or it has too little memory.
    """
    where = open_device(device)
    pair = drafter, RandomSource(drafter, RECIPES[quant].drafter, where)
    source = RandomSource(target, quant, where)
    with enough_memory(device, quant, context):
        return TorchBackend((target, source), pair, quant=quant, context=context, max_rows=max_rows)


@contextmanager
def enough_memory(device: str, quant: str, tokens: int) -> Iterator[None]:
    """Says what to do when a device's memory runs out."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise BackendError(
            f"{device}: too little memory for these weights as {quant} and {tokens} tokens; "
            "use a smaller --quant or --context"
        ) from error


def open_device(name: str) -> torch.device:
    """A device of PyTorch, with its kernels in place.

    Raises:
        BackendError: it cannot be used.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0].partition(". ")[0]
        reason = "it knows no such kind" if first.startswith("Expected one of") else first
        raise BackendError(f"PyTorch cannot use the device {name!r} ({reason}); choose another") from error
    if device.type == "cuda":
        try:
            from paceline.backends.torch.kernels import install
        except ImportError as error:
            raise BackendError("CUDA devices need Triton; install it with pip install triton") from error
        install("cuda")
        try:
            torch.ops.paceline.norm(torch.ones(1, 16, device=device), torch.ones(16, device=device), 1e-6)
        except Exception as error:  # Triton raises what its compilers raise
            first = str(error).splitlines()[0]
            raise BackendError(
                f"{name}: Triton cannot compile kernels here ({first}); it needs a C compiler"
            ) from error
    return device
