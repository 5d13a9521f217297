"""Where the native backend's weights come from: an interface, and checkpoints as its first kind.

A source hands out packed matrices and float32 vectors by tensor name. Knows files and formats, not models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from paceline import _cpu
from paceline.checkpoint import Tensors
from paceline.checkpoint.names import TOKEN_ORDERING
from paceline.errors import CheckpointError
from paceline.quant.blocks import PANEL, from_bf16

SLICE_BYTES = 32 << 20  # read at a time while packing


class Weights(Protocol):
    """Packed weights by canonical tensor name."""

    @property
    def quant(self) -> str:
        """The format of matrices that ask for none of their own."""

    def matrix(self, name: str, quant: str | None = None) -> _cpu.Matrix:
        """A matrix [rows, columns]."""

    def experts(self, name: str, part: str) -> list[_cpu.Matrix]:
        """One matrix for each expert of a stacked tensor: its "first" or "second" half of the rows, or the "whole"."""

    def ordered_head(self) -> tuple[_cpu.Matrix, list[int]]:
        """A drafter's head in the order of its centroids' token lists, each list padded to whole panels.

        Returns:
            The matrix, and the token of each of its rows, -1 for padding.
        """

    def vector(self, name: str) -> NDArray[np.float32]:
        """A vector, or any tensor that is not packed."""

    def table(self, name: str) -> NDArray[Any]:
        """A mapped table [rows, columns]: float32, float16, or uint16 with the bits of bf16."""

    def in_bf16(self, name: str) -> bool:
        """Whether the checkpoint holds that tensor in bf16."""

    @property
    def nbytes(self) -> int:
        """Bytes of all packed matrices handed out."""


class CheckpointWeights:
    """Packs a checkpoint's tensors, each read a slice of rows at a time, so that memory never holds one twice.

    Args:
        tensors: checked tensors.
        quant: weight format.
        progress: called with the file bytes of each tensor packed.
    """

    def __init__(self, tensors: Tensors, quant: str, progress: Callable[[int], None] = lambda _: None) -> None:
        self.quant = quant
        self.matrices: dict[str, _cpu.Matrix] = {}  # what was handed out, for a pack file
        self.vectors: dict[str, NDArray[Any]] = {}
        self.bf16_names = frozenset(name for name, ref in tensors.refs.items() if ref.dtype == "BF16")
        self._tensors = tensors
        self._progress = progress

    @property
    def nbytes(self) -> int:
        return sum(matrix.nbytes for matrix in self.matrices.values())

    def matrix(self, name: str, quant: str | None = None) -> _cpu.Matrix:
        ref = self._tensors[name]
        rows, columns = ref.shape
        matrix = _cpu.Matrix(quant or self.quant, rows, columns)
        step = max(PANEL, SLICE_BYTES * rows // max(1, ref.bytes) // PANEL * PANEL)
        for start in range(0, rows, step):
            matrix.pack(ref.read(start, min(start + step, rows)), start)
        self._progress(ref.bytes)
        return self._keep(name, matrix)

    def experts(self, name: str, part: str) -> list[_cpu.Matrix]:
        ref = self._tensors[name]
        half = ref.shape[1] // 2
        chosen = {"first": slice(half), "second": slice(half, None), "whole": slice(None)}[part]
        matrices = []
        for expert in range(ref.shape[0]):
            rows = np.ascontiguousarray(ref.read(expert, expert + 1)[0, chosen])
            matrix = _cpu.Matrix(self.quant, *rows.shape)
            matrix.pack(rows)
            self._progress(rows.nbytes)
            matrices.append(self._keep(f"{name}.{part}.{expert}", matrix))
        return matrices

    def ordered_head(self) -> tuple[_cpu.Matrix, list[int]]:
        ref = self._tensors["embed_tokens.weight"]
        vocab, hidden = ref.shape
        order = self._tensors[TOKEN_ORDERING]
        ordering = order.read().reshape(self._tensors["masked_embedding.centroids.weight"].rows, -1)
        if not np.array_equal(np.sort(ordering, axis=None), np.arange(vocab)):
            raise CheckpointError(f"{order.path}: {TOKEN_ORDERING} does not name every token once; download it again")
        rows = ref.read()
        listed = ordering.shape[1]
        width = listed + -listed % PANEL
        tokens = np.full((len(ordering), width), -1, np.int32)
        tokens[:, :listed] = ordering
        matrix = _cpu.Matrix(self.quant, tokens.size, hidden)
        padded = np.zeros((width, hidden), rows.dtype)
        for index, members in enumerate(ordering):
            padded[:listed] = rows[members]
            matrix.pack(padded, index * width)
        self._progress(ref.bytes)
        self.vectors["ordered_head.tokens"] = tokens.ravel()
        return self._keep("ordered_head", matrix), tokens.ravel().tolist()

    def vector(self, name: str) -> NDArray[np.float32]:
        values = self._tensors[name].read()
        vector = from_bf16(values) if values.dtype == np.uint16 else np.asarray(values, np.float32)
        self.vectors[name] = vector
        return vector

    def table(self, name: str) -> NDArray[Any]:
        return self._tensors[name].map()

    def in_bf16(self, name: str) -> bool:
        return name in self.bf16_names

    def _keep(self, name: str, matrix: _cpu.Matrix) -> _cpu.Matrix:
        self.matrices[name] = matrix
        return matrix
