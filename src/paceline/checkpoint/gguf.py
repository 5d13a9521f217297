"""Reads GGUF files: metadata, and the places of tensors. Nothing here knows what the model is.

The format: magic, version, counts; keys with typed values; names, shapes, types and offsets of tensors; then, aligned,
their data (https://github.com/ggml-org/ggml, `docs/gguf.md`). Large models come in several files, of which the first
holds the metadata. Every count, length and offset is checked before it is used, as a Python integer, which cannot wrap.
"""

from __future__ import annotations

import mmap
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paceline.checkpoint.choice import SHARD
from paceline.checkpoint.tensors import BLOCKS, TensorRef
from paceline.errors import CheckpointError
from paceline.vocabulary import Strings

Value = int | float | bool | str | Strings | NDArray[Any]

MAX_HEADER = 128 << 20  # bytes before the tensors' data; Gemma's vocabulary takes 14 MB
MAX_COUNT = 1 << 16  # keys, tensors
MAX_NAME = 1 << 10  # bytes of a key or a tensor's name
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 1 << 20
MAX_SHARDS = 1 << 10

U64 = struct.Struct("<Q")
SCALARS = {  # type id -> how it is stored
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "<u1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
BOOL, STRING, ARRAY = 7, 8, 9
KINDS = {"iu": "whole numbers", "f": "numbers", "b": "true and false"}

# Types of tensors: id -> name, columns of a block, bytes of a block. Some cannot be used, but named.
USABLE = {2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K"}
USABLE |= {14: "Q6_K", 20: "IQ4_NL", 23: "IQ4_XS", 39: "MXFP4"}
TYPES: dict[int, tuple[str, int, int]] = {number: (name, *BLOCKS[name]) for number, name in USABLE.items()} | {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    9: ("Q8_1", 32, 40),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
    42: ("Q2_0", 64, 18),
}
REMOVED = {4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8"}
REMOVED |= {36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8"}

OTHER_FILES = {  # first bytes -> what such a file is, and what to do
    b"version ": "is a Git LFS pointer, not the weights; run `git lfs pull` in its folder",
    b"lmgg": "is an old GGML file; take the model as GGUF",
    b"tjgg": "is an old GGML file; take the model as GGUF",
    b"fmgg": "is an old GGML file; take the model as GGUF",
    b"PK\x03\x04": "is a zip archive, not a GGUF file; unpack it",
    b"<": "is a web page, not a GGUF file; download the file itself",
}
PARTIAL = re.compile(r"-partial(-\d+)?$|\.(downloadInProgress|part|partial|incomplete|crdownload|aria2)$")


@dataclass(frozen=True)
class Gguf:
    """A model's metadata, and its tensors by name, in one file or several.

    The methods look up a key. They raise `CheckpointError` where it has a value of another kind, or where it is missing
    and there is no default.
    """

    path: Path
    metadata: Mapping[str, Value]
    tensors: Mapping[str, TensorRef]

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._value(key, default)
        if type(value) is not int:
            raise self.wrong(key, "a whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._value(key, default)
        if type(value) not in (int, float):
            raise self.wrong(key, "a number")
        return float(value)  # type: ignore[arg-type]

    def flag(self, key: str, default: bool) -> bool:
        value = self._value(key, default)
        if type(value) is not bool:
            raise self.wrong(key, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._value(key, default)
        if type(value) is not str:
            raise self.wrong(key, "a text")
        return value

    def strings(self, key: str) -> Strings | None:
        """A list of strings; None if it is missing."""
        value = self.metadata.get(key)
        if value is not None and not isinstance(value, Strings):
            raise self.wrong(key, "a list of texts")
        return value

    def array(self, key: str, kinds: str, count: int | None = None) -> NDArray[Any] | None:
        """A list of numbers; None if it is missing.

        Args:
            key: its key.
            kinds: of its items, NumPy's letters: "iu" for whole numbers, "f", "b" for true and false.
            count: how many there must be; None for any number.
        """
        value = self.metadata.get(key)
        if value is None:
            return None
        if not isinstance(value, np.ndarray) or value.dtype.kind not in kinds or len(value) != (count or len(value)):
            raise self.wrong(key, f"a list of {'' if count is None else f'{count} '}{KINDS[kinds]}")
        return value

    def wrong(self, key: str, what: str) -> CheckpointError:
        value = self.metadata[key]
        shown = f"a list of {len(value)}" if isinstance(value, np.ndarray | Strings) else repr(value)
        return CheckpointError(f"{self.path}: {key} is {shown}; it must be {what}, so take another file of this model")

    def _value(self, key: str, default: Value | None) -> Value:
        value = self.metadata.get(key, default)
        if value is None:
            raise CheckpointError(f"{self.path}: says nothing of {key}; take another file of this model")
        return value


def read_gguf(path: Path) -> Gguf:
    """Read the header of a GGUF file, and of all its parts if it is the first of several.

    Raises:
        CheckpointError: it cannot be read, is no GGUF file or one of another kind, is damaged, or is not complete; or
            it is a later part, or another part is missing.
    """
    first = _read_file(path)
    count = _split(first, "split.count", 1)
    if count <= 1:
        return first
    name = SHARD.fullmatch(path.name)
    if _split(first, "split.no", 0) != 0:
        start = f"{name[1]}-00001-of-{name[3]}.gguf" if name else "the one with split.no 0"
        raise CheckpointError(f"{path}: is a later part of a model in {count} files; give the first, {start}")
    if count > MAX_SHARDS or not name or (int(name[2]), int(name[3])) != (1, count):
        raise CheckpointError(
            f"{path}: is the first part of a model in {count} files, which are found by their names; "
            f"give it back its name, which ends in -00001-of-{count:05}.gguf"
        )
    tensors = dict(first.tensors)
    for number in range(1, count):
        part = path.with_name(f"{name[1]}-{number + 1:05}-of-{count:05}{path.suffix}")
        if not os.path.isfile(part):
            raise CheckpointError(f"{part}: this part of the model is missing; download it to the same folder")
        shard = _read_file(part)
        if (_split(shard, "split.no", 0), _split(shard, "split.count", 1)) != (number, count):
            raise CheckpointError(f"{part}: does not say that it is part {number + 1} of {count}; download it again")
        twice = next((one for one in shard.tensors if one in tensors), None)
        if twice is not None:
            raise CheckpointError(f"{part}: the tensor {twice} is also in {tensors[twice].path.name}; download both")
        tensors |= shard.tensors
    total = _split(first, "split.tensors.count", len(tensors))
    if total != len(tensors):
        raise CheckpointError(
            f"{path}: its parts hold {len(tensors)} tensors, and it says {total}; they are of several models, "
            "so download them all from one place"
        )
    return Gguf(path, first.metadata, tensors)


def _split(file: Gguf, key: str, default: int) -> int:
    value = file.metadata.get(key, default)
    if type(value) is not int or value < 0:
        raise CheckpointError(f"{file.path}: {key} is {value!r}; it must be a whole number, so the file is damaged")
    return value


def _read_file(path: Path) -> Gguf:
    if not os.path.isfile(path):  # not a pipe or a device, which would never end
        raise CheckpointError(f"{path}: no such file; check the path")
    try:
        with path.open("rb") as file:
            start = file.read(16)
            _check_start(path, start)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(path, data).read()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error


def _check_start(path: Path, start: bytes) -> None:
    if start[:4] != b"GGUF":
        for magic, what in OTHER_FILES.items():
            if start.startswith(magic):
                raise CheckpointError(f"{path}: {what}")
        if not start.strip(b"\0"):  # some programs reserve the space of a download first
            raise CheckpointError(f"{path}: is empty{_unfinished(path)}")
        raise CheckpointError(f"{path}: is not a GGUF file; give a .gguf file or a model folder")
    if len(start) < 8:
        raise CheckpointError(f"{path}: is not complete{_unfinished(path)}")
    version = int.from_bytes(start[4:8], "little")
    if version and version & 0xFFFF == 0:
        raise CheckpointError(f"{path}: is a big-endian GGUF file; take the usual, little-endian one")
    if version == 1:
        raise CheckpointError(f"{path}: is a GGUF file of version 1, of 2023; take one that was converted later")
    if version not in (2, 3):
        raise CheckpointError(
            f"{path}: is a GGUF file of version {version}; only 2 and 3 are known, so take one of those"
        )


def _unfinished(path: Path) -> str:
    if PARTIAL.search(path.name):
        return ": its name says that it is still being downloaded; wait until that has ended"
    return ": let its download finish, or download it again"


class _Reader:
    """Goes through one file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data, self._size = path, data, len(data)
        self._end = min(self._size, MAX_HEADER)
        self._at = 8  # behind magic and version
        self._where = "its counts"

    def read(self) -> Gguf:
        tensors, keys = self._number("<i8"), self._number("<i8")
        for what, count, least in (("keys", keys, 13), ("tensors", tensors, 24)):  # bytes that each takes at least
            if not 0 <= count <= MAX_COUNT or count * least > self._size:
                raise self._damaged(f"it has {count} {what}")
        metadata: dict[str, Value] = {}
        for _ in range(keys):
            self._where = "the names of its settings"
            key = self._string(MAX_NAME)
            self._where = key
            if key in metadata:
                raise self._damaged(f"{key} is there twice")
            metadata[key] = self._value(self._number("<u4"))
        places = self._infos(tensors)
        return Gguf(self._path, metadata, self._place(places, self._alignment(metadata)))

    def _infos(self, count: int) -> dict[str, tuple[tuple[int, ...], int, int]]:
        """Shape, type and offset of each tensor by name."""
        infos: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(count):
            self._where = "the names of its tensors"
            name = self._string(MAX_NAME)
            self._where = f"the tensor {name}"
            if name in infos:
                raise self._damaged(f"the tensor {name} is there twice")
            dimensions = self._number("<u4")
            if dimensions > MAX_DIMENSIONS:
                raise self._damaged(f"the tensor {name} has {dimensions} dimensions")
            shape = tuple(self._number("<i8") for _ in range(dimensions))
            if any(size <= 0 for size in shape):
                raise self._damaged(f"the tensor {name} has the shape {list(shape)}")
            infos[name] = (shape[::-1], self._number("<u4"), self._number("<u8"))
        return infos

    def _place(self, infos: Mapping[str, tuple[tuple[int, ...], int, int]], alignment: int) -> dict[str, TensorRef]:
        """Tensors in the order of their data, which lie side by side in the rest of the file."""
        start = self._at + -self._at % alignment
        refs = []
        for name, (shape, kind, offset) in infos.items():
            if kind not in TYPES:
                what = f"{REMOVED[kind]}, which no program reads any more" if kind in REMOVED else f"number {kind}"
                raise CheckpointError(
                    f"{self._path}: the tensor {name} has a type that is not known ({what}); "
                    "take another file of this model, such as Q4_K_M"
                )
            dtype, columns, block = TYPES[kind]
            row = shape[-1] if shape else 1
            if row % columns:
                raise self._damaged(f"a row of the tensor {name} has {row} columns, no whole blocks of {dtype}")
            if offset % alignment:
                raise self._damaged(f"the tensor {name} lies at {offset}, no multiple of {alignment}")
            size = row // columns * block
            for more in shape[:-1]:
                size *= more
            refs.append(TensorRef(name, dtype, shape, self._path, start + offset, size))
        refs.sort(key=lambda ref: ref.offset)
        for ref, after in pairwise(refs):
            if ref.offset + ref.bytes > after.offset:
                raise self._damaged(f"the tensors {ref.name} and {after.name} overlap")
        if refs and refs[-1].offset + refs[-1].bytes > self._size:
            raise CheckpointError(
                f"{self._path}: is not complete, it has {self._size} of {refs[-1].offset + refs[-1].bytes} "
                f"bytes{_unfinished(self._path)}"
            )
        return {ref.name: ref for ref in refs}

    def _alignment(self, metadata: Mapping[str, Value]) -> int:
        value = metadata.get("general.alignment", 32)
        if type(value) is not int or not 0 < value <= MAX_ALIGNMENT or value & (value - 1):
            raise self._damaged(f"general.alignment is {value!r}")
        return value

    def _value(self, kind: int) -> Value:
        if kind in SCALARS:
            return self._scalar(kind)
        if kind == STRING:
            return self._string(MAX_HEADER)
        if kind != ARRAY:
            raise self._damaged(f"{self._where} has a type that is not known, number {kind}")
        items, count = self._number("<u4"), self._number("<u8")
        if items == STRING:
            return self._strings(count)
        if items not in SCALARS:
            raise self._damaged(f"{self._where} is a list of items of the type number {items}")
        stored = np.dtype(SCALARS[items])
        at = self._take(count * stored.itemsize)
        values = np.frombuffer(self._data[at : self._at], stored)
        return self._bools(values) if items == BOOL else values

    def _scalar(self, kind: int) -> int | float | bool:
        stored = np.dtype(SCALARS[kind])
        at = self._take(stored.itemsize)
        values = np.frombuffer(self._data[at : self._at], stored)
        value = (self._bools(values) if kind == BOOL else values)[0]
        # the shortest number that is this f32: 1e-06, not 9.999999974752427e-07
        found: int | float | bool = float(str(value)) if value.dtype == np.float32 else value.item()
        return found

    def _bools(self, values: NDArray[Any]) -> NDArray[np.bool_]:
        if (values > 1).any():
            raise self._damaged(f"{self._where} must be true or false")
        return values.astype(bool)

    def _number(self, stored: str) -> int:
        kind = np.dtype(stored)
        at = self._take(kind.itemsize)
        return int.from_bytes(self._data[at : self._at], "little", signed=kind.kind == "i")

    def _string(self, most: int) -> str:
        length = self._number("<u8")
        if length > most:
            raise self._damaged(f"a string of {length} bytes among {self._where}")
        at = self._take(length)
        try:
            return self._data[at : self._at].decode()
        except UnicodeDecodeError as error:
            raise self._damaged(f"{self._where} is not UTF-8 text") from error

    def _strings(self, count: int) -> Strings:
        start = at = self._at
        end, places = self._end, []
        if count * U64.size > end - at:
            raise self._short(at + count * U64.size)
        data, length = self._data, U64.unpack_from
        for _ in range(count):
            places.append(at)
            if at + 8 > end:
                raise self._short(at + 8)
            at += 8 + length(data, at)[0]
        if at > end:
            raise self._short(at)
        self._at = at
        return Strings(data[start:at], np.array([*places, at], np.int64) - start)

    def _take(self, count: int) -> int:
        """Go past some bytes; returns where they begin."""
        at = self._at
        if count > self._end - at:
            raise self._short(at + count)
        self._at = at + count
        return at

    def _short(self, end: int) -> CheckpointError:
        """For what would reach to a place in the file that is not there."""
        if end > self._size:
            return CheckpointError(
                f"{self._path}: ends inside {self._where}: it is damaged, or not complete{_unfinished(self._path)}"
            )
        return self._damaged(f"what stands before its tensors takes more than {MAX_HEADER >> 20} MB")

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._path}: is damaged ({what}); download it again")
