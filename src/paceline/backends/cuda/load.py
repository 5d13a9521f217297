"""From checkpoints to the PyTorch backend."""

from __future__ import annotations

from collections.abc import Callable

import torch

from paceline.backends.cuda.backend import TorchBackend
from paceline.backends.cuda.weights import drafter_weights, target_weights
from paceline.checkpoint import Checkpoint, Tensors, resolve
from paceline.config import DrafterConfig, TargetConfig
from paceline.errors import SettingsError

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def load_backend(
    target: tuple[Checkpoint, TargetConfig],
    drafter: tuple[Checkpoint, DrafterConfig] | None,
    *,
    device: str,
    quant: str,
    threads: int | None,
    context: int,
    slots: int,
    max_rows: int,
    progress: Callable[[int], None],
) -> tuple[TorchBackend, str]:
    """Read a pair's weights onto a device.

    Args:
        target: its opened folder and settings.
        drafter: the same of the drafter, or None for plain decoding.
        device: of PyTorch, such as cuda, cuda:1, mps or cpu.
        quant: f32, bf16, or auto for what the files hold.
        threads: of PyTorch's work on the processor; None for its own choice.
        context: positions a slot can hold.
        slots: sequences held at once.
        max_rows: most rows of one slot in one batch.
        progress: told the bytes of each file of weights read.

    Returns:
        The backend, and the format of its weights.

    Raises:
        SettingsError: a format that this backend has not.
        BackendError: no such device here.
        CheckpointError: tensors are missing or wrong.
    """
    tensors = resolve(*target)
    if quant == "auto":
        quant = "f32" if tensors["embed_tokens.weight"].dtype == "F32" else "bf16"
    if quant not in DTYPES:
        raise SettingsError(f"--quant {quant} is not there yet on --device {device}; use bf16, f32 or auto")
    if threads:
        torch.set_num_threads(threads)
    weights = target_weights(tensors)
    progress(_bytes(tensors))
    pair = None
    if drafter:
        draft_tensors = resolve(*drafter)
        pair = drafter[1], drafter_weights(draft_tensors)
        progress(_bytes(draft_tensors))
    backend = TorchBackend(
        (target[1], weights),
        pair,
        dtype=DTYPES[quant],
        device=device,
        context=context,
        slots=slots,
        max_rows=max_rows,
    )
    return backend, quant


def _bytes(tensors: Tensors) -> int:
    return sum(ref.bytes for ref in tensors.refs.values())
