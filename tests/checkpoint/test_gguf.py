"""GGUF files as such: every count, length and offset is checked before it is used."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from paceline.checkpoint.gguf import MAX_HEADER, TYPES, read_gguf
from paceline.checkpoint.tensors import BLOCKS
from paceline.errors import CheckpointError
from paceline.vocabulary import Strings

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)


def string(text: str | bytes) -> bytes:
    data = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(data)) + data


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return string(name) + struct.pack("<I", kind) + value


def array(items: int, count: int, data: bytes = b"") -> bytes:
    return struct.pack("<IQ", items, count) + data


def info(name: str | bytes, shape: Iterable[int], kind: int = 0, offset: int = 0) -> bytes:
    shape = tuple(shape)
    return string(name) + struct.pack(f"<I{len(shape)}qIQ", len(shape), *shape, kind, offset)


def header(keys: list[bytes], infos: list[bytes], version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<Iqq", version, len(infos), len(keys)) + b"".join(keys + infos)


def file(path: Path, keys: list[bytes], infos: list[bytes], data: bytes = b"", **more: Any) -> Path:
    start = header(keys, infos, **more)
    path.write_bytes(start + bytes(-len(start) % 32) + data)
    return path


GOOD = [key("general.architecture", STRING, string("gemma4")), key("a", U32, struct.pack("<I", 7))]


def refused(path: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        read_gguf(path)
    assert str(path) in str(caught.value)


def test_values_of_every_type(tmp_path: Path) -> None:
    """llama.cpp's writer is the reference."""
    writer = gguf.GGUFWriter(tmp_path / "x", "gemma4")
    numbers = {
        "uint8": 255,
        "int8": -128,
        "uint16": 65535,
        "int16": -32768,
        "uint32": 2**32 - 1,
        "int32": -(2**31),
        "uint64": 2**64 - 1,
        "int64": -(2**63),
        "float64": 1e-300,
        "bool": True,
        "string": "▁é🚴",
    }
    for kind, value in numbers.items():
        getattr(writer, f"add_{kind}")(kind, value)
    writer.add_float32("float32", 1e-6)
    writer.add_array("whole", [1, -2, 3])
    writer.add_array("halves", [0.5, -1.5])
    writer.add_array("flags", [True, False, True])
    writer.add_array("texts", ["a", "", "▁▁", "日本"])
    writer.add_tensor("t", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read_gguf(tmp_path / "x")
    for kind, value in numbers.items():
        assert found.metadata[kind] == value
        assert type(found.metadata[kind]) is type(value)
    assert found.number("float32") == 1e-6  # the shortest number that is this f32
    for name, value in {"whole": [1, -2, 3], "halves": [0.5, -1.5], "flags": [True, False, True]}.items():
        assert found.metadata[name].tolist() == value
    texts = found.strings("texts")
    assert list(texts) == ["a", "", "▁▁", "日本"] == [texts[i] for i in range(4)]
    assert texts[1:3] == ["", "▁▁"]
    assert [texts.find(text) for text in ("日本", "", "▁", "a", "x")] == [3, 1, None, 0, None]
    np.testing.assert_array_equal(found.tensors["t"].read(), [[0, 1, 2], [3, 4, 5]])


def test_a_string_is_found_only_whole(tmp_path: Path) -> None:
    inner = string("x").decode("latin-1")
    strings = Strings(string(inner) + string("x"), np.array([0, 17, 26]))
    assert strings.find("x") == 1


def test_types_are_those_of_llama_cpp() -> None:
    known = {int(kind): (kind.name, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    assert {number: TYPES[number] for number in known} == known
    assert {name for name, _, _ in TYPES.values()} >= BLOCKS.keys()


@pytest.mark.parametrize("kind", [kind for kind in Type if kind in gguf.GGML_QUANT_SIZES])
def test_sizes_of_tensors(kind: Type, tmp_path: Path) -> None:
    columns, size = gguf.GGML_QUANT_SIZES[kind]
    path = file(tmp_path / "x", GOOD, [info("t", (2 * columns, 3), int(kind))], bytes(6 * size))
    ref = read_gguf(path).tensors["t"]
    assert (ref.dtype, ref.shape, ref.bytes) == (kind.name, (3, 2 * columns), 6 * size)
    path.write_bytes(path.read_bytes()[:-1])
    refused(path, "is not complete")


def test_the_second_version_is_read_the_first_is_named(tmp_path: Path) -> None:
    assert read_gguf(file(tmp_path / "2", GOOD, [], version=2)).metadata["a"] == 7
    refused(file(tmp_path / "1", GOOD, [], version=1), "version 1, of 2023")
    refused(file(tmp_path / "4", GOOD, [], version=4), "version 4; only 2 and 3 are known")
    refused(file(tmp_path / "b", GOOD, [], version=3 << 24), "big-endian")


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "is empty: let its download finish"),
        (bytes(4096), "is empty"),
        (b"GGUF", "is not complete"),
        (b"GGUF\x03\0\0\0", "ends inside its counts"),
        (b"version https://git-lfs", "Git LFS pointer"),
        (b"tjgg\x03\0\0\0", "old GGML file"),
        (b"PK\x03\x04zipzip", "zip archive"),
        (b"<!DOCTYPE html>", "a web page"),
        (b"\x93NUMPY", "is not a GGUF file"),
    ],
)
def test_other_files_are_named(data: bytes, match: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    refused(path, match)


@pytest.mark.parametrize(
    "name", ["sha256-12-partial", "sha256-12-partial-3", "m.gguf.downloadInProgress", "m.gguf.part"]
)
def test_downloads_under_way_are_named(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    whole = header(GOOD, [info("t", (8, 8))])
    for data in (b"", whole[:40], whole + bytes(100)):
        path.write_bytes(data)
        refused(path, "its name says that it is still being downloaded")


def test_every_cut_is_refused(tmp_path: Path) -> None:
    keys = [
        *GOOD,
        key("tokens", ARRAY, array(STRING, 2, string("ab") + string("c"))),
        key("n", ARRAY, array(I32, 1, bytes(4))),
    ]
    path = file(tmp_path / "x", keys, [info("t", (4, 2)), info("u", (1,), offset=32)], bytes(36))
    whole = path.read_bytes()
    assert len(read_gguf(path).tensors) == 2
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        refused(path, "ends inside|is not complete|is empty|is not a GGUF file|it has . (keys|tensors)")
    path.write_bytes(whole + b"more")
    assert len(read_gguf(path).tensors) == 2


HUGE = (2**31, 2**32, 2**59, 2**60, 2**61 + 1, 2**62, 2**63 - 1)


@pytest.mark.parametrize("count", [*HUGE, -1, -(2**63), 1 << 17])
@pytest.mark.parametrize("at", [8, 16])
def test_counts(count: int, at: int, tmp_path: Path) -> None:
    data = bytearray(header(GOOD, [info("t", (1,))]) + bytes(100))
    data[at : at + 8] = struct.pack("<q", count)
    (tmp_path / "x").write_bytes(data)
    refused(tmp_path / "x", f"is damaged .it has {count} ")


@pytest.mark.parametrize("length", [*HUGE, 2**64 - 1, 2**64 - 8, 2**64 - 20])
def test_lengths(length: int, tmp_path: Path) -> None:
    long = struct.pack("<Q", length)
    path = tmp_path / "x"
    refused(file(path, [long + bytes(40)], []), "a string of")
    refused(file(path, [key("k", STRING, long + bytes(40))], []), "a string of|ends inside k")
    refused(file(path, [key("k", ARRAY, array(STRING, 1, long + bytes(40)))], []), "ends inside k")
    for items in (U8, U16, F32, F64, BOOL, STRING):
        refused(file(path, [key("k", ARRAY, array(items, length, bytes(40)))], []), "ends inside k")
    refused(file(path, GOOD, [long + bytes(60)]), "a string of")


def test_a_string_that_goes_back(tmp_path: Path) -> None:
    """A length just below 2^64 would lead back into the list, for ever."""
    back = struct.pack("<Q", 2**64 - 8)
    refused(file(tmp_path / "x", [key("k", ARRAY, array(STRING, 5, back * 5))], []), "ends inside k")


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ([key("k", 13, bytes(8))], "k has a type that is not known, number 13"),
        ([key("k", ARRAY, array(ARRAY, 1, array(U8, 1, b"\0")))], "k is a list of items of the type number 9"),
        ([key("k", ARRAY, array(77, 1, bytes(8)))], "type number 77"),
        ([key("k", BOOL, b"\x02")], "k must be true or false"),
        ([key("k", ARRAY, array(BOOL, 2, b"\x01\xff"))], "k must be true or false"),
        ([key("k", STRING, string(b"\xff\xfe"))], "k is not UTF-8"),
        ([key(b"\xff", U8, b"\0")], "is not UTF-8"),
        ([GOOD[1], GOOD[1]], "a is there twice"),
        ([key("k" * 2000, U8, b"\0")], "a string of 2000 bytes"),
        ([key("general.alignment", STRING, string("32"))], "general.alignment is '32'"),
        ([key("general.alignment", BOOL, b"\x01")], "general.alignment is True"),
        *(
            ([key("general.alignment", U32, struct.pack("<I", value))], f"general.alignment is {value}")
            for value in (0, 3, 33, 1 << 31)
        ),
    ],
)
def test_keys(keys: list[bytes], match: str, tmp_path: Path) -> None:
    refused(file(tmp_path / "x", keys, [], bytes(64)), match)


@pytest.mark.parametrize(
    ("infos", "match"),
    [
        ([info("t", (1, 1, 1, 1, 1))], "has 5 dimensions"),
        ([string("t") + struct.pack("<I", 2**32 - 1) + bytes(64)], "has 4294967295 dimensions"),
        ([info("t", (4, 0))], r"the shape \[4, 0\]"),
        ([info("t", (-1,))], r"the shape \[-1\]"),
        ([info("t", (2**31, 2**31, 4))], "is not complete, it has"),
        ([info("t", (2**62, 2**62, 2**62, 2**62))], "is not complete, it has"),
        ([info("t", (2**61, 8))], "is not complete, it has"),
        ([info("t", (4,), offset=2**64 - 32)], "is not complete, it has"),
        ([info("t", (4,), offset=2**63)], "is not complete, it has"),
        ([info("t", (4,), offset=4)], "lies at 4, no multiple of 32"),
        ([info("t", (33,), kind=2)], "33 columns, no whole blocks of Q4_0"),
        ([info("t", (32,), kind=12)], "32 columns, no whole blocks of Q4_K"),
        ([info("t", (4,), kind=4)], "Q4_2, which no program reads any more"),
        ([info("t", (4,), kind=36)], "IQ4_NL_4_4, which no"),
        ([info("t", (4,), kind=99)], "a type that is not known .number 99.; take another file"),
        ([info("t", (4,), kind=2**32 - 1)], "number 4294967295"),
        ([info("t", (4,)), info("t", (4,), offset=32)], "the tensor t is there twice"),
        ([info("t", (16,)), info("u", (4,), offset=32)], "t and u overlap"),
        ([info("t", (4,)), info("u", (4,))], "overlap"),
        ([info(b"\xff", (4,))], "is not UTF-8"),
    ],
)
def test_tensors(infos: list[bytes], match: str, tmp_path: Path) -> None:
    refused(file(tmp_path / "x", GOOD, infos, bytes(256)), match)


def test_what_stands_before_the_tensors_has_a_largest_size(tmp_path: Path) -> None:
    path = tmp_path / "x"
    start = header([], [])[:16] + struct.pack("<q", 1) + string("k") + struct.pack("<I", STRING)
    path.write_bytes(start + struct.pack("<Q", MAX_HEADER))
    with path.open("r+b") as opened:
        opened.truncate(MAX_HEADER + 1000)
    refused(path, "takes more than 128 MB")


def write_shards(folder: Path, change: Callable[[int, list[bytes]], list[bytes]] = lambda _, keys: keys) -> Path:
    """A model in three files, of which the first has no tensors."""
    for number in range(3):
        keys = [
            key("split.no", U16, struct.pack("<H", number)),
            key("split.count", U16, struct.pack("<H", 3)),
            key("split.tensors.count", I32, struct.pack("<i", 2)),
        ]
        infos = [info(f"t{number}", (4,))] if number else []
        keys = change(number, keys) + (GOOD if number == 0 else [])
        file(folder / f"m-{number + 1:05}-of-00003.gguf", keys, infos, np.full(4, number, np.float32).tobytes())
    return folder / "m-00001-of-00003.gguf"


def test_shards(tmp_path: Path) -> None:
    found = read_gguf(write_shards(tmp_path))
    assert found.metadata["a"] == 7
    for number in (1, 2):
        np.testing.assert_array_equal(found.tensors[f"t{number}"].read(), np.full(4, number, np.float32))


def test_shards_are_opened_by_the_first(tmp_path: Path) -> None:
    first = write_shards(tmp_path)
    refused(
        tmp_path / "m-00002-of-00003.gguf", r"is a later part of a model in 3 files; give the first, m-00001-of-00003"
    )
    renamed = first.rename(tmp_path / "mine.gguf")
    refused(renamed, "give it back its name, which ends in -00001-of-00003.gguf")
    renamed.rename(tmp_path / "m-00001-of-00004.gguf")
    refused(tmp_path / "m-00001-of-00004.gguf", "give it back its name")


def test_a_shard_that_is_missing(tmp_path: Path) -> None:
    first = write_shards(tmp_path)
    (tmp_path / "m-00003-of-00003.gguf").unlink()
    with pytest.raises(CheckpointError, match=r"m-00003-of-00003.gguf: this part of the model is missing; download it"):
        read_gguf(first)


@pytest.mark.parametrize(
    ("at", "place", "data", "match"),
    [
        (1, 0, key("split.no", U16, b"\x02\0"), "does not say that it is part 2 of 3"),
        (2, 1, key("split.count", U16, b"\x02\0"), "does not say that it is part 3 of 3"),
        (0, 2, key("split.tensors.count", I32, struct.pack("<i", 9)), "hold 2 tensors, and it says 9"),
        (0, 1, key("split.count", STRING, string("3")), "split.count is '3'; it must be a whole number"),
        (0, 1, key("split.count", U32, b"\xff\xff\xff\xff"), "give it back its name"),
    ],
)
def test_shards_that_do_not_belong_together(at: int, place: int, data: bytes, match: str, tmp_path: Path) -> None:
    first = write_shards(
        tmp_path, lambda number, keys: [*keys[:place], data, *keys[place + 1 :]] if number == at else keys
    )
    with pytest.raises(CheckpointError, match=match):
        read_gguf(first)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    first = write_shards(tmp_path)
    (tmp_path / "m-00003-of-00003.gguf").write_bytes(
        (tmp_path / "m-00003-of-00003.gguf").read_bytes().replace(b"t2", b"t1")
    )
    with pytest.raises(CheckpointError, match=r"the tensor t1 is also in m-00002-of-00003.gguf; download both"):
        read_gguf(first)


def test_what_is_no_file(tmp_path: Path) -> None:
    refused(tmp_path / "none.gguf", "no such file")
    refused(tmp_path, "no such file")
