import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

from paceline.checkpoint import TensorRef, read_header
from paceline.errors import CheckpointError

ARRAYS = {
    "half": np.arange(6, dtype=np.float16).reshape(2, 3),
    "single": np.arange(24, dtype=np.float32).reshape(4, 3, 2),
    "long": np.arange(5, dtype=np.int64),
    "int": np.arange(3, dtype=np.int32),
    "odd": np.arange(3, dtype=np.uint8),  # makes what follows it unaligned
    "scalar": np.array(2.5, np.float32),
    "empty": np.zeros((0, 4), np.float32),
}


def write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_reads_what_the_reference_wrote(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(ARRAYS, path, metadata={"format": "pt"})
    refs = read_header(path)
    assert set(refs) == set(ARRAYS)
    for name, array in ARRAYS.items():
        assert refs[name].shape == array.shape
        assert refs[name].bytes == array.nbytes
        if name != "odd":
            assert refs[name].read().dtype == array.dtype
            assert np.array_equal(refs[name].read(), array)
            assert refs[name].read().shape == array.shape
            if array.size:
                assert np.array_equal(refs[name].map(), array)


def test_rows(tmp_path: Path) -> None:
    save_file(ARRAYS, tmp_path / "w")
    ref = read_header(tmp_path / "w")["single"]
    assert np.array_equal(ref.read(1, 3), ARRAYS["single"][1:3])
    assert np.array_equal(ref.read(3), ARRAYS["single"][3:])
    assert ref.read(2, 2).shape == (0, 3, 2)
    for start, stop in ((-1, 2), (3, 2), (0, 5)):
        with pytest.raises(ValueError, match="single"):
            ref.read(start, stop)


def test_bf16_comes_as_bit_patterns(tmp_path: Path) -> None:
    path = write(tmp_path / "w", {"x": entry(0, 6, [3], "BF16")}, np.array([0x3F80, 0xC000, 1], np.uint16).tobytes())
    ref = read_header(path)["x"]
    assert ref.read().tolist() == [0x3F80, 0xC000, 1]
    assert ref.read().dtype == ref.map().dtype == np.uint16


def test_maps_are_read_only(tmp_path: Path) -> None:
    save_file(ARRAYS, tmp_path / "w")
    with pytest.raises(ValueError, match="read-only"):
        read_header(tmp_path / "w")["long"].map()[0] = 1


def test_other_types_are_listed_but_not_read(tmp_path: Path) -> None:
    ref = read_header(write(tmp_path / "w", {"x": entry(0, 2, [2], "F8_E4M3")}, b"ab"))["x"]
    with pytest.raises(CheckpointError, match="F8_E4M3"):
        ref.read()


def test_a_file_that_shrinks_later(tmp_path: Path) -> None:
    save_file(ARRAYS, tmp_path / "w")
    refs = read_header(tmp_path / "w")
    last = max(refs.values(), key=lambda ref: ref.offset + ref.bytes)
    with (tmp_path / "w").open("r+b") as file:
        file.truncate(last.offset)
    ref = TensorRef(last.name, "F32", (1,), last.path, last.offset, 4)
    for access in (ref.read, ref.map):
        with pytest.raises(CheckpointError, match="download it again"):
            access()
    ref.path.unlink()
    for access in (ref.read, ref.map):
        with pytest.raises(CheckpointError, match="cannot be read"):
            access()


GOOD = {"a": entry(0, 8, [2]), "b": entry(8, 12, [1])}
BAD_HEADERS: dict[str, Any] = {
    "a list": [],
    "not json": b"{oops",
    "not utf-8": b'{"\xff": 1}',
    "deep": b"[" * 100_000,
    "entry is a number": {"a": 3},
    "no dtype": {"a": {"shape": [3], "data_offsets": [0, 12]}},
    "unknown dtype": {"a": entry(0, 12, [3], "F31")},
    "dtype is a list": {"a": entry(0, 12, [3]) | {"dtype": ["F32"]}},
    "negative shape": {"a": entry(0, 12, [-3])},
    "shape of bools": {"a": entry(0, 4, [True]), "b": entry(4, 12, [2])},
    "shape of floats": {"a": entry(0, 12, [3.0])},  # type: ignore[list-item]
    "one offset": {"a": entry(0, 12, [3]) | {"data_offsets": [0]}},
    "offsets backwards": {"a": entry(12, 0, [3])},
    "size does not match the shape": {"a": entry(0, 12, [2])},
    "overlap": {"a": entry(0, 8, [2]), "b": entry(4, 12, [2])},
    "gap": {"a": entry(0, 4, [1]), "b": entry(8, 12, [1])},
    "does not begin at 0": {"a": entry(4, 12, [2])},
    "beyond the end": GOOD | {"c": entry(12, 16, [1])},
    "bytes left over": {"a": entry(0, 8, [2])},
    "huge": {"a": entry(0, 2**70, [2**68])},
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_headers(tmp_path: Path, case: str) -> None:
    path = write(tmp_path / "w.safetensors", BAD_HEADERS[case], bytes(12))
    assert_refused(path)


def test_the_good_header_is_good(tmp_path: Path) -> None:
    refs = read_header(write(tmp_path / "w", GOOD, bytes(12)))
    assert [ref.offset - refs["a"].offset for ref in refs.values()] == [0, 8]


@pytest.mark.parametrize("content", [b"", b"abc", bytes(8), b"\xff" * 16, b"PK\x03\x04" * 10])
def test_not_safetensors(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    assert_refused(path)


def test_every_truncation(tmp_path: Path) -> None:
    whole = save({"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float16)})
    path = tmp_path / "w.safetensors"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert "truncated" in assert_refused(path)


def test_lfs_pointers_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        read_header(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        read_header(tmp_path / "w")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path)


@settings(max_examples=300)
@given(data=st.data())
def test_damage_is_refused_or_harmless(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Bytes of the header changed at random: an error of ours, or tensors that lie inside the file."""
    whole = bytearray(save({"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float16)}))
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    for place in data.draw(st.lists(st.integers(0, header - 1), min_size=1, max_size=3)):
        whole[place] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(whole)
    try:
        refs = read_header(path)
    except CheckpointError:
        return
    assert all(ref.offset + ref.bytes <= len(whole) for ref in refs.values())


def assert_refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert "download it again" in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)
