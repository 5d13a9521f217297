"""Reads safetensors files: headers, and tensors in slices of rows.

The format is 8 bytes of little-endian header length, a JSON header, then the tensors' bytes side by side
(https://huggingface.co/docs/safetensors, "Format"). The safetensors package checks files, but does not read them: its
NumPy side cannot give bf16, nor the file offsets needed to map a table or to pack a large matrix a slice at a time.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from numpy.typing import NDArray

from paceline.errors import CheckpointError, translated
from paceline.files import MAX_JSON_BYTES

# NumPy has no bf16, so it is read as uint16 bit patterns.
READABLE = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I64": np.int64, "I32": np.int32}
FLOATING = ("F32", "F16", "BF16")
INTEGER = ("I64", "I32")


@dataclass(frozen=True)
class TensorRef:
    """A tensor in a file, which is read on request.

    `dtype` is the name in the file: F32 reads as float32, F16 as float16, BF16 as uint16 bit patterns, I64 and I32 as
    themselves.
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

    def read(self, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Read rows `start` to `stop` of the first dimension into new memory: [stop - start, *shape[1:]].

        Raises:
            CheckpointError: the type is not readable, or the file has shrunk since its header was read.
        """
        stop = self.rows if stop is None else stop
        if not 0 <= start <= stop <= self.rows:
            raise ValueError(f"rows {start}..{stop} of {self.name}, which has {self.rows}")
        kind = self._numpy_type()
        row = math.prod(self.shape[1:])
        try:
            values = np.fromfile(
                self.path, kind, (stop - start) * row, offset=self.offset + start * row * kind.itemsize
            )
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read ({error.strerror})") from error
        if values.size != (stop - start) * row:
            raise CheckpointError(f"{self.path}: ended inside the tensor {self.name}; download it again")
        return values.reshape((stop - start, *self.shape[1:]) if self.shape else ())

    def map(self) -> np.memmap[Any, Any]:
        """Map the whole tensor read-only, so that pages are loaded on access and can be evicted."""
        return np.memmap(self.path, self._numpy_type(), "r", self.offset, self.shape)

    def _numpy_type(self) -> np.dtype[Any]:
        if self.dtype not in READABLE:
            raise CheckpointError(
                f"{self.path}: the tensor {self.name} has type {self.dtype}; only {', '.join(READABLE)} can be used, "
                "so take the checkpoint in bf16"
            )
        return np.dtype(READABLE[self.dtype])


def read_header(path: Path) -> dict[str, TensorRef]:
    """List a file's tensors in the order of the file. The safetensors library checks that they cover the whole file.

    Raises:
        CheckpointError: no such file, not safetensors, truncated, or tensors that overlap or leave gaps.
    """
    try:
        with path.open("rb") as file:
            prefix = file.read(8)
            if prefix.startswith(b"version "):
                raise CheckpointError(
                    f"{path}: is a Git LFS pointer, not the weights; run `git lfs pull` in its folder"
                )
            length = int.from_bytes(prefix, "little")
            with translated(CheckpointError, f"{path}: is damaged or truncated ({{reason}}); download it again"):
                if length > MAX_JSON_BYTES:
                    raise ValueError(f"a header of {length} bytes")
                with safetensors.safe_open(path, "np"):
                    entries = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); download it") from error
    entries.pop("__metadata__", None)
    refs = []
    for name, entry in entries.items():
        begin, end = entry["data_offsets"]
        refs.append(TensorRef(name, entry["dtype"], tuple(entry["shape"]), path, 8 + length + begin, end - begin))
    return {ref.name: ref for ref in sorted(refs, key=lambda ref: ref.offset)}
