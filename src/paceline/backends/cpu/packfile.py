"""Packed weights in one file, mapped at the next start instead of packed again.

The file, all numbers little-endian:

* 8 bytes `PACELINE`, a uint32 format version (1), a uint32 header length, a uint32 CRC-32 of the header;
* the header, JSON: `fingerprint` (of source and settings), `quant`, `items` (name -> kind, shape, offset, bytes, and
  a matrix's `format`, a table's `dtype`), `bf16` (names the checkpoint held in bf16), `bytes` (of the data),
  `checksum`;
* zeros up to a multiple of 4096, then the data: each item starts at a multiple of 4096 from the start of the data and
  is filled up with zeros to one. Matrices lie as `csrc/cpu/formats.hpp` describes, vectors as float32 or int32.

`checksum` covers all data but tables (which are large and read by row) and is compared at every start; the reading also
brings the pages in. A file is written beside its final name and renamed when it is whole.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paceline import _cpu
from paceline.backends.cpu.weights import CheckpointWeights
from paceline.checkpoint import Tensors
from paceline.files import atomic_file

MAGIC = b"PACELINE"
VERSION = 1
PREFIX = len(MAGIC) + 12
ALIGN = 4096


class StalePack(Exception):
    """A pack file that cannot be used: missing, damaged, or made from something else. Never reaches users."""


@dataclass(frozen=True)
class PackedWeights:
    """A mapped pack file as a source of weights."""

    quant: str
    _items: Mapping[str, Mapping[str, Any]]
    _bf16: frozenset[str]
    _data: NDArray[np.uint8]
    _tensors: Tensors | None  # where tables are that the file does not hold

    @property
    def nbytes(self) -> int:
        return sum(int(item["bytes"]) for item in self._items.values() if item["kind"] == "matrix")

    def matrix(self, name: str, quant: str | None = None) -> _cpu.Matrix:
        item = self._items[name]
        rows, columns = item["shape"]
        return _cpu.Matrix.mapped(item["format"], rows, columns, self._bytes(item))

    def experts(self, name: str, part: str) -> list[_cpu.Matrix]:
        matrices: list[_cpu.Matrix] = []
        while (key := f"{name}.{part}.{len(matrices)}") in self._items:
            matrices.append(self.matrix(key))
        return matrices

    def ordered_head(self) -> tuple[_cpu.Matrix, list[int]]:
        tokens = self._array("ordered_head.tokens", np.int32)
        return self.matrix("ordered_head"), tokens.tolist()

    def vector(self, name: str) -> NDArray[np.float32]:
        return self._array(name, np.float32)

    def table(self, name: str) -> NDArray[Any]:
        if self._tensors and name not in self._items:
            return self._tensors[name].map()
        return self._array(name, self._items[name]["dtype"])

    def in_bf16(self, name: str) -> bool:
        return name in self._bf16

    def _array(self, name: str, dtype: Any) -> NDArray[Any]:
        item = self._items[name]
        array: NDArray[Any] = self._bytes(item).view(dtype).reshape(item["shape"])
        return array

    def _bytes(self, item: Mapping[str, Any]) -> NDArray[np.uint8]:
        return self._data[item["offset"] : item["offset"] + item["bytes"]]


def write_pack(
    path: Path, weights: CheckpointWeights, fingerprint: str, threads: int, tables: Mapping[str, NDArray[Any]]
) -> None:
    """Write everything a source has handed out, and tables as they are, atomically.

    Raises:
        OSError: no room, or no permission.
    """
    items: dict[str, dict[str, Any]] = {}
    parts: list[NDArray[np.uint8]] = []
    offset = 0
    for name, kind, array, extra in _contents(weights, tables):
        shape = list(extra.pop("shape", array.shape))
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        items[name] = {"kind": kind, "shape": shape, "offset": offset, "bytes": len(raw), **extra}
        parts.append(raw)
        offset += len(raw) + -len(raw) % ALIGN
    checked = [part for part, item in zip(parts, items.values(), strict=True) if item["kind"] != "table"]
    header = json.dumps(
        {
            "fingerprint": fingerprint,
            "quant": weights.quant,
            "items": items,
            "bf16": sorted(weights.bf16_names),
            "bytes": offset,
            "checksum": _checksum(checked, threads),
        }
    ).encode()
    prefix = MAGIC + np.array([VERSION, len(header), zlib.crc32(header)], "<u4").tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(prefix + header)
        file.write(bytes(-(PREFIX + len(header)) % ALIGN))
        for part in parts:
            file.write(part.data)
            file.write(bytes(-len(part) % ALIGN))


def open_pack(
    path: Path, threads: int, *, fingerprint: str | None = None, tensors: Tensors | None = None
) -> PackedWeights:
    """Map a pack file and check it.

    Args:
        path: the file.
        threads: for reading the data once.
        fingerprint: what it must have been made from; None to take it as it is.
        tensors: the checkpoint it was made from, for tables that the file does not hold.

    Raises:
        StalePack: missing, damaged, of another version, or made from something else.
    """
    try:
        with path.open("rb") as file:
            prefix = file.read(PREFIX)
            version, length, crc = np.frombuffer(prefix[len(MAGIC) :], "<u4").tolist()
            text = file.read(length)
        if prefix[: len(MAGIC)] != MAGIC or version != VERSION or zlib.crc32(text) != crc:
            raise StalePack("damaged header, or another version")
        header = json.loads(text)
        if fingerprint is not None and header["fingerprint"] != fingerprint:
            raise StalePack("made from other files")
        start = PREFIX + length + -(PREFIX + length) % ALIGN
        if path.stat().st_size != start + header["bytes"]:
            raise StalePack("truncated")
        data: NDArray[np.uint8] = np.memmap(path, np.uint8, "r", start, (header["bytes"],))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StalePack(str(error)) from error
    weights = PackedWeights(header["quant"], header["items"], frozenset(header["bf16"]), data, tensors)
    checked = [weights._bytes(item) for item in header["items"].values() if item["kind"] != "table"]
    if _checksum(checked, threads) != header["checksum"]:
        raise StalePack("damaged data")
    return weights


def _contents(
    weights: CheckpointWeights, tables: Mapping[str, NDArray[Any]]
) -> Iterator[tuple[str, str, NDArray[Any], dict[str, Any]]]:
    for name, matrix in weights.matrices.items():
        yield name, "matrix", matrix.packed(), {"format": matrix.format, "shape": matrix.shape}
    for name, vector in weights.vectors.items():
        yield name, "vector", vector, {}
    for name, table in tables.items():
        yield name, "table", table, {"dtype": table.dtype.str}


def _checksum(parts: list[NDArray[np.uint8]], threads: int) -> int:
    """One check value over all parts, each extended with zeros to a multiple of 512 bytes."""
    total = 0
    for part in parts:
        whole = len(part) // 512 * 512
        tail = np.zeros(512, np.uint8)
        tail[: len(part) - whole] = part[whole:]
        for piece in (part[:whole], tail):
            value = _cpu.checksum(np.ascontiguousarray(piece), threads if len(piece) > 1 << 20 else 1)
            total = zlib.crc32(value.to_bytes(8, "little"), total)
    return total
