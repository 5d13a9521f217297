"""Where the weights on a device come from: a checkpoint, or random numbers for measurements."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from paceline.checkpoint import TensorRef, Tensors
from paceline.checkpoint.names import TOKEN_IDS, expected_tensors
from paceline.config import DrafterConfig, TargetConfig
from paceline.models.matrix import EXACT, PLAIN, Matrix, empty, pack, plain_format, random, widest
from paceline.quant.recipes import RECIPES

SLICE = 1 << 23  # weights that are read, converted and moved at once, which bounds the memory it takes


class CheckpointSource:
    """Reads a checkpoint's tensors a slice at a time; see `models.gemma4.TensorSource`.

    Args:
        tensors: of one model.
        quant: recipe. All matrices take its one format. By "file" those of types of `matrix.EXACT` keep their bits, and
            others are plain.
        device: where they go.
        progress: told the file bytes of what was read.
        plain: format of activations and of plain matrices, f32 or bf16; "" for that of the recipe, by "file" f32 for
            files that hold nothing else. A drafter takes its target's.
    """

    def __init__(
        self,
        tensors: Tensors,
        quant: str,
        device: torch.device,
        progress: Callable[[int], None] = lambda _: None,
        plain: str = "",
    ) -> None:
        self._tensors, self._quant, self._device, self._progress = tensors, quant, device, progress
        types = {ref.dtype for ref in tensors.refs.values() if len(ref.shape) > 1}
        whole = quant == "file" and types == {"F32"}
        self.plain = plain or plain_format("f32" if whole else RECIPES[quant].uniform)
        self._held: dict[str, set[str]] = {}  # formats that matrices of each type of elements have become
        self._table_bytes = 0

    @property
    def dtype(self) -> torch.dtype:
        return PLAIN[self.plain]

    def matrix(self, *names: str, precise: bool = False) -> Matrix:
        parts = [part for name in names for part in self._parts(name)]
        fmt = self.plain if precise else widest(self._format(part) for part in parts)
        return self._filled(parts, fmt)

    def table(self, name: str) -> Matrix:
        ref = self._tensors[name]
        made = self._filled([ref], self._format(ref) if self._quant == "file" else self.plain)
        self._table_bytes = made.nbytes
        return made

    def in_bf16(self, name: str) -> bool:
        return self._tensors[name].dtype == "BF16"

    def vector(self, name: str) -> Tensor:
        self._progress(self._tensors[name].bytes)
        return torch.from_numpy(self._tensors.vector(name)).to(self._device)

    def notice(self) -> str:
        """What of the matrices read is not held as in the file, if that was asked for; "" for nothing."""
        found: dict[str, list[str]] = {}  # types of elements by what they became
        for element, formats in sorted(self._held.items()):
            if self._quant == "file" and (others := formats - {element.lower()}):
                found.setdefault(" or ".join(sorted(others)), []).append(element)
        if not found:
            return ""
        held = "; ".join(f"{', '.join(elements)} as {fmt}" for fmt, elements in found.items())
        size = f"; the per-layer embeddings take {self._table_bytes / 1e9:.2f} GB" if self._table_bytes else ""
        return f"this device holds {held}{size}"

    def _parts(self, name: str) -> list[TensorRef]:
        """The tensors whose rows, one below the other, are those of a matrix."""
        if name in self._tensors.refs:
            return [self._tensors[name]]
        apart = [self._tensors[name.replace("gate_up_proj", part)] for part in ("gate_proj", "up_proj")]
        return [ref.slice(expert, expert + 1) for expert in range(apart[0].rows) for ref in apart]

    def _format(self, ref: TensorRef) -> str:
        fmt = EXACT.get(ref.dtype, self.plain) if self._quant == "file" else RECIPES[self._quant].uniform
        return self.plain if fmt in PLAIN else fmt

    def _filled(self, parts: list[TensorRef], fmt: str) -> Matrix:
        """A matrix of the rows of tensors."""
        columns, first = parts[0].shape[-1], 0
        made = empty(sum(math.prod(ref.shape[:-1]) for ref in parts), columns, fmt, self._device)
        for ref in parts:
            self._held.setdefault(ref.dtype, set()).add(fmt)
            step = max(1, SLICE * ref.rows // math.prod(ref.shape))
            for start in range(0, ref.rows, step):
                rows = ref.read(start, min(start + step, ref.rows))
                part = pack(rows.reshape(-1, rows.shape[-1]), fmt, ref.block_type, self._device)
                made.put(first, part)
                first += part.outputs
                self._progress(rows.nbytes)
        return made


class RandomSource:
    """Random matrices in an official shape, and constant norms; see `models.gemma4.TensorSource`.

    Speed does not depend on the values. The norms after each block are small, so that rows stay as different as their
    tokens: a mixture of experts then sends them to experts that have little in common, the expensive case.
    """

    def __init__(self, config: TargetConfig | DrafterConfig, quant: str, device: torch.device) -> None:
        self.device, self._fmt, self._shapes = device, RECIPES[quant].uniform, expected_tensors(config)

    @property
    def dtype(self) -> torch.dtype:
        return PLAIN[plain_format(self._fmt)]

    def matrix(self, *names: str, precise: bool = False) -> Matrix:
        fmt = plain_format(self._fmt) if precise else self._fmt
        rows = sum(math.prod(self._shapes[name][:-1]) for name in names)
        return random(rows, self._shapes[names[0]][-1], fmt, self.device)

    def table(self, name: str) -> Matrix:
        return self.matrix(name, precise=True)

    def in_bf16(self, name: str) -> bool:
        return True

    def vector(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if name in TOKEN_IDS:
            return torch.arange(*shape, device=self.device)
        value = 0.05 if "post_" in name and "norm" in name else 1.0
        return torch.full(shape, value, device=self.device)
