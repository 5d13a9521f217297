"""Tensors in files, whatever kind of file: where their bytes lie, and how to read them in slices of rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paceline.errors import CheckpointError

# What elements read as, by the names that files give their types. NumPy has no bf16: it is read as uint16 bit patterns.
ELEMENTS = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I64": np.int64, "I32": np.int32}
FLOATING = ("F32", "F16", "BF16")
INTEGER = ("I64", "I32")

# GGUF's block types that can be used: (columns of a block, bytes of a block). A row is whole blocks.
# https://github.com/ggml-org/llama.cpp, `ggml/src/ggml-common.h`
BLOCKS = {
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "Q2_K": (256, 84),
    "Q3_K": (256, 110),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
    "IQ4_NL": (32, 18),
    "IQ4_XS": (256, 136),
    "MXFP4": (32, 17),
}
READABLE = (*ELEMENTS, *BLOCKS)


@dataclass(frozen=True)
class TensorRef:
    """A tensor in a file, which is read on request.

    `dtype` is the name in the file: F32 reads as float32, F16 as float16, BF16 as uint16 bit patterns, I64 and I32 as
    themselves, and a type of blocks as uint8, the blocks of a row side by side. `shape` counts weights in any case.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int  # of the first byte, from the start of the file
    bytes: int

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def block_type(self) -> str:
        """The type of its blocks as native code takes it; "" for plain numbers."""
        return self.dtype if self.dtype in BLOCKS else ""

    def read(self, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Read rows `start` to `stop` of the first dimension into new memory.

        Returns:
            [stop - start, *shape[1:]]; of a type of blocks [stop - start, *shape[1:-1], bytes of a row], uint8.

        Raises:
            CheckpointError: the type is not readable, or the file has shrunk since its header was read.
        """
        stop = self.rows if stop is None else stop
        if not 0 <= start <= stop <= self.rows:
            raise ValueError(f"rows {start}..{stop} of {self.name}, which has {self.rows}")
        kind, shape = self._stored()
        row = math.prod(shape[1:])
        try:
            values = np.fromfile(
                self.path, kind, (stop - start) * row, offset=self.offset + start * row * kind.itemsize
            )
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read ({error.strerror})") from error
        if values.size != (stop - start) * row:
            raise self._ended()
        return values.reshape((stop - start, *shape[1:]) if shape else ())

    def map(self) -> np.memmap[Any, Any]:
        """Map the whole tensor read-only, in the form of `read`; pages are loaded on access and can be evicted.

        Raises:
            CheckpointError: as `read`.
        """
        kind, shape = self._stored()
        try:
            return np.memmap(self.path, kind, "r", self.offset, shape)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read ({error.strerror})") from error
        except ValueError as error:  # the file is shorter
            raise self._ended() from error

    def slice(self, start: int, stop: int) -> TensorRef:
        """Rows `start` to `stop` of the first dimension as a tensor of their own."""
        row = self.bytes // self.rows
        shape = (stop - start, *self.shape[1:])
        return TensorRef(self.name, self.dtype, shape, self.path, self.offset + start * row, (stop - start) * row)

    def _ended(self) -> CheckpointError:
        return CheckpointError(f"{self.path}: ended inside the tensor {self.name}; download it again")

    def _stored(self) -> tuple[np.dtype[Any], tuple[int, ...]]:
        """The type and shape in NumPy's terms."""
        if self.dtype in BLOCKS and self.shape:
            columns, size = BLOCKS[self.dtype]
            return np.dtype(np.uint8), (*self.shape[:-1], self.shape[-1] // columns * size)
        if self.dtype not in ELEMENTS:
            raise CheckpointError(
                f"{self.path}: the tensor {self.name} has type {self.dtype}; only {', '.join(READABLE)} can be used, "
                "so take the checkpoint in bf16"
            )
        return np.dtype(ELEMENTS[self.dtype]), self.shape
