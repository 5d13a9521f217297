"""Reads safetensors files: headers with strict checks, and tensors in slices of rows.

The format is 8 bytes of little-endian header length, a JSON header, then the tensors' bytes side by side
(https://huggingface.co/docs/safetensors, "Format"). The safetensors package is not used for reading: its NumPy side
cannot give bf16, nor the file offsets needed to map a table or to pack a large matrix a slice at a time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paceline.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation

# Bits of every element type of the format: skipped parts of a file may have any of them.
BITS = {"BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64, "U64": 64}
BITS |= {"F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64}
BITS |= {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8}

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

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * BITS[self.dtype] // 8

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
    """List a file's tensors, after checking that its header describes the whole file.

    Raises:
        CheckpointError: no such file, not safetensors, truncated, or tensors that overlap or leave gaps.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if prefix.startswith(b"version "):
                raise CheckpointError(
                    f"{path}: is a Git LFS pointer, not the weights; run `git lfs pull` in its folder"
                )
            if len(prefix) < 8 or length > MAX_HEADER_BYTES:
                raise _damaged(path, "is not a safetensors file")
            if 8 + length > size:
                raise _damaged(path, f"is truncated ({size} bytes, its header alone has {length})")
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); download it") from error
    try:
        entries = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "has a corrupt header") from error
    if not isinstance(entries, dict):
        raise _damaged(path, "has a corrupt header")
    entries.pop("__metadata__", None)
    return _refs(path, entries, start=8 + length, size=size)


def _refs(path: Path, entries: Mapping[str, Any], start: int, size: int) -> dict[str, TensorRef]:
    spans = {}
    for name, entry in entries.items():
        if not _well_formed(entry):
            raise _damaged(path, f"has a corrupt header at the tensor {name}")
        spans[name] = (*entry["data_offsets"], entry["dtype"], tuple(entry["shape"]))
    refs = {}
    end = 0
    for name, (begin, stop, dtype, shape) in sorted(spans.items(), key=lambda item: item[1][:2]):
        bits = math.prod(shape) * BITS[dtype]
        if begin != end or (stop - begin) * 8 != bits:
            raise _damaged(path, f"has a corrupt header: the tensor {name} is at a wrong offset")
        refs[name] = TensorRef(name, dtype, shape, path, start + begin)
        end = stop
    if start + end > size:
        raise _damaged(path, f"is truncated ({size} bytes instead of {start + end})")
    if start + end < size:
        raise _damaged(path, f"has {size - start - end} bytes too many")
    return refs


def _well_formed(entry: object) -> bool:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        return False
    numbers = (entry["shape"], entry["data_offsets"])
    if not all(isinstance(list_, list) and all(type(n) is int and n >= 0 for n in list_) for list_ in numbers):
        return False
    return isinstance(entry["dtype"], str) and entry["dtype"] in BITS and len(entry["data_offsets"]) == 2


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: {what}; download it again")
