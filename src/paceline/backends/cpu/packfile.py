"""Packed weights in one file, mapped at the next start instead of packed again.

The file, all numbers little-endian:

* 8 bytes `PACELINE`, a uint32 format version (4), a uint32 header length, a uint32 CRC-32 of the header;
* the header, JSON: `fingerprint` (of source and settings), `quant`, `items` (name -> kind, shape, offset, bytes, and a
  matrix's `format`, a vector's `dtype`, a table's element `type`; items of kind `expert` make up a list), `bytes` (of
  the data), `checksum`;
* zeros up to a multiple of 4096, then the data: each item starts at a multiple of 4096 from the start of the data and
  is filled up with zeros to one. Matrices are as `csrc/cpu/formats/formats.hpp` describes, vectors float32 or int32.

`checksum` covers all data but tables (which are large and read by row) and is verified at every start, which also
brings the pages in. A file is written beside its final name and renamed when it is whole.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from paceline import _cpu
from paceline.backends.cpu.weights import Weights, check_weights, map_table
from paceline.checkpoint import Tensors
from paceline.checkpoint.names import PLE_TABLE
from paceline.checkpoint.tensors import BLOCKS, ELEMENTS
from paceline.config import DrafterConfig, TargetConfig
from paceline.errors import MAX_REASON, shorten
from paceline.files import MAX_JSON_BYTES, atomic_file
from paceline.quant.formats import FORMATS

MAGIC = b"PACELINE"
VERSION = 4
PREFIX = len(MAGIC) + 12
ALIGN = 4096


class StalePack(Exception):
    """A pack file that cannot be used: missing, damaged, or made from something else. Never reaches users."""


def write_pack(path: Path, weights: Weights, fingerprint: str, threads: int, *, with_tables: bool) -> None:
    """Write a model's tensors atomically. Tables are left out unless asked for: they can be mapped where they are.

    Raises:
        OSError: no room, or no permission.
    """
    items: dict[str, dict[str, Any]] = {}
    parts: list[NDArray[np.uint8]] = []
    offset = 0
    for name, kind, array, extra in _contents(weights, with_tables):
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
            "bytes": offset,
            "checksum": _cpu.checksum(checked, threads),
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
    path: Path,
    config: TargetConfig | DrafterConfig,
    threads: int,
    *,
    fingerprint: str | None = None,
    tensors: Tensors | None = None,
) -> Weights:
    """Map a pack file and check it.

    A checksum protects against accidents only: a converted folder is a download like any other. So every item is
    compared with what the model's settings call for before native code gets it.

    Args:
        path: the file.
        config: the model's settings.
        threads: for the checksum.
        fingerprint: what it must have been made from; None to take it as it is.
        tensors: the checkpoint it was made from, for tables that the file does not hold.

    Raises:
        StalePack: missing, damaged, of another version, made from something else, or not of this model.
    """
    try:
        header, data = _map(path)
        if fingerprint is not None and header["fingerprint"] != fingerprint:
            raise StalePack("made from other files")
        weights = Weights(header["quant"])
        added = [_add(weights, name, item, data) for name, item in header["items"].items()]
        if tensors and PLE_TABLE in tensors.refs:
            weights.tensors[PLE_TABLE] = map_table(tensors[PLE_TABLE])
        check_weights(weights, config)
        if _cpu.checksum([raw for raw in added if raw is not None], threads) != header["checksum"]:
            raise StalePack("damaged data")
    except StalePack:
        raise
    except Exception as error:  # a header may hold anything
        raise StalePack(shorten(str(error) or type(error).__name__, MAX_REASON)) from error
    return weights


def _map(path: Path) -> tuple[dict[str, Any], NDArray[np.uint8]]:
    """Header and data of a file."""
    if not path.is_file():
        raise StalePack("no such file")
    with path.open("rb") as file:
        prefix = file.read(PREFIX)
        version, length, crc = np.frombuffer(prefix[len(MAGIC) :], "<u4").tolist()
        text = file.read(min(length, MAX_JSON_BYTES + 1))
    if prefix[: len(MAGIC)] != MAGIC or version != VERSION or len(text) != length or zlib.crc32(text) != crc:
        raise StalePack("damaged header, or another version")
    header = json.loads(text)
    start = PREFIX + length + -(PREFIX + length) % ALIGN
    if path.stat().st_size != start + header["bytes"]:
        raise StalePack("truncated")
    return header, np.memmap(path, np.uint8, "r", start, (header["bytes"],))


def _add(weights: Weights, name: str, item: Mapping[str, Any], data: NDArray[np.uint8]) -> NDArray[np.uint8] | None:
    """Add an item to the weights; returns its bytes, None for those of a table, which no checksum covers."""
    kind, shape, offset, size = item["kind"], item["shape"], item["offset"], item["bytes"]
    if (
        not all(type(n) is int and n >= 0 for n in (offset, size, *shape))
        or offset % ALIGN
        or offset + size > len(data)
    ):
        raise StalePack(f"{name} lies at a place of the file that does not exist")
    raw = data[offset : offset + size]
    if kind == "table":
        weights.tensors[name] = _table(raw, item["type"], shape)
        return None
    if kind == "vector":
        weights.tensors[name] = raw.view(item["dtype"]).reshape(shape)
        return raw
    if item["format"] not in FORMATS:
        raise StalePack(f"{name} is in an unknown format")
    rows, columns = shape
    matrix = _cpu.Matrix.mapped(item["format"], rows, columns, raw)
    if kind == "expert":
        cast(list[_cpu.Matrix], weights.tensors.setdefault(name.rpartition(".")[0], [])).append(matrix)
    elif kind == "matrix":
        weights.tensors[name] = matrix
    else:
        raise StalePack(f"{name} is of unknown kind")
    return raw


def _table(raw: NDArray[np.uint8], element: str, shape: list[int]) -> _cpu.Table:
    rows, columns = shape
    if element in BLOCKS:
        return _cpu.Table(raw.reshape(rows, -1), element)
    return _cpu.Table(raw.view(ELEMENTS[element]).reshape(rows, columns))


def _contents(weights: Weights, with_tables: bool) -> Iterator[tuple[str, str, NDArray[Any], dict[str, Any]]]:
    for name, matrix in weights.matrices:
        kind = "matrix" if name in weights.tensors else "expert"
        yield name, kind, matrix.packed(), {"format": matrix.format, "shape": matrix.shape}
    for name, tensor in weights.tensors.items():
        if isinstance(tensor, np.ndarray):
            yield name, "vector", tensor, {"dtype": tensor.dtype.str}
        elif isinstance(tensor, _cpu.Table) and with_tables:
            yield name, "table", tensor.data(), {"type": tensor.type, "shape": tensor.shape}
