"""Pack files: what is written is what was packed, and nothing damaged or stale is ever used."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

import paceline
from paceline import _cpu
from paceline.backends.cpu import pack_cache
from paceline.backends.cpu.pack_cache import fingerprint, pack_path
from paceline.backends.cpu.packfile import StalePack, open_pack, write_pack
from paceline.backends.cpu.weights import Weights, pack_checkpoint
from paceline.backends.formats import choose_quant
from paceline.checkpoint import Checkpoint, TensorRef, Tensors, resolve
from paceline.checkpoint.names import canonical_name
from paceline.errors import CheckpointError, SettingsError
from paceline.quant.bf16 import from_bf16, to_bf16
from paceline.quant.recipes import DEFAULT, RECIPES
from tests.fixtures.backends import cpu_backend, run, sequence
from tests.fixtures.checkpoints import PREFIX, TARGET, changed, target_weights, write
from tests.fixtures.pairs import write_pair

PROMPT = list(range(3, 30))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_pair(tmp_path_factory.mktemp("pack"), "e2b", seed=4, head="centroid", text=True)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A pack folder for the test alone, in which even tiny models are kept."""
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "packs"))
    monkeypatch.setattr("paceline.backends.cpu.sources.LEAST_BYTES", 0)
    assert pack_cache.LEAST_BYTES > 0
    return tmp_path / "packs"


def packed(folder: Path, path: Path, quant: str) -> Weights:
    checkpoint = Checkpoint.open(folder)
    config = checkpoint.target_config()
    weights = pack_checkpoint(resolve(checkpoint, config), config, quant)
    write_pack(path, weights, "mark", 2, with_tables=False)
    return weights


def opened(folder: Path, path: Path, mark: str | None = None) -> Weights:
    checkpoint = Checkpoint.open(folder)
    config = checkpoint.target_config()
    return open_pack(path, config, 1, fingerprint=mark, tensors=resolve(checkpoint, config))


@pytest.mark.parametrize("quant", RECIPES)
def test_what_is_mapped_is_what_was_packed(pair: tuple[Path, Path], tmp_path: Path, quant: str) -> None:
    weights = packed(pair[0], tmp_path / "x.pack", quant)
    again = opened(pair[0], tmp_path / "x.pack", "mark")
    assert again.quant == quant
    assert again.nbytes == weights.nbytes
    copies = dict(again.matrices)
    assert list(copies) == [name for name, _ in weights.matrices]
    for name, matrix in weights.matrices:
        assert (copies[name].format, copies[name].shape) == (matrix.format, matrix.shape)
        np.testing.assert_array_equal(copies[name].packed(), matrix.packed())
    assert again.tensors.keys() == weights.tensors.keys()
    for name, tensor in weights.tensors.items():
        if isinstance(tensor, np.ndarray):
            assert tensor.dtype == again.tensors[name].dtype
            np.testing.assert_array_equal(again.tensors[name], tensor)
    assert os.listdir(tmp_path) == ["x.pack"]


def test_every_damaged_byte_is_noticed(pair: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "x.pack"
    packed(pair[0], path, "q4")
    good = path.read_bytes()
    header = json.loads(good[20 : 20 + int.from_bytes(good[12:16], "little")])
    start = len(good) - header["bytes"]
    spans = [(start + item["offset"], item["bytes"]) for item in header["items"].values()]
    generator = np.random.default_rng(0)
    inside = [first + int(generator.integers(size)) for first, size in spans]
    for at in [0, 8, 12, 16, 25, *inside]:
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with pytest.raises(StalePack):
            opened(pair[0], path)
    for cut in (0, 5, 19, 100, len(good) - 1):
        path.write_bytes(good[:cut])
        with pytest.raises(StalePack):
            opened(pair[0], path)
    path.write_bytes(good)
    with pytest.raises(StalePack, match="other files"):
        opened(pair[0], path, "another")
    opened(pair[0], path, "mark")


def test_a_failed_write_leaves_nothing(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        packed(pair[0], tmp_path / "x.pack", "q8")
    assert os.listdir(tmp_path) == []


def test_checksums_do_not_depend_on_threads_and_see_every_byte() -> None:
    data = np.random.default_rng(0).integers(1, 256, (5 << 20) + 7, np.uint8)
    parts = [data[:100], data[100 : 100 + (3 << 20)], data[100 + (3 << 20) :]]
    value = _cpu.checksum(parts, 1)
    assert value == _cpu.checksum(parts, 3)
    for at in (0, 99, 100, 3 << 20, len(data) - 1):
        data[at] ^= 1
        assert _cpu.checksum(parts, 3) != value
        data[at] ^= 1
    assert _cpu.checksum(parts[::-1], 1) != value  # order
    assert _cpu.checksum([parts[0][:-1], *parts[1:]], 1) != value  # length
    data[4096:8192], data[8192:12288] = data[8192:12288].copy(), data[4096:8192].copy()
    assert _cpu.checksum(parts, 1) != value


def test_the_second_start_maps_and_writes_the_same(pair: tuple[Path, Path], kept: Path) -> None:
    notices: list[str] = []
    first = paceline.load(str(pair[0]), quant="q4", threads=1, context=128, notify=notices.append)
    assert len(list(kept.glob("*.pack"))) == 2  # target and drafter
    assert any("kept in" in notice for notice in notices)
    times = {path: path.stat().st_mtime_ns for path in kept.iterdir()}
    second = paceline.load(str(pair[0]), quant="q4", threads=1, context=128)
    assert {path: path.stat().st_mtime_ns for path in kept.iterdir()} == times
    assert (
        first.generate(PROMPT, sampling=paceline.SamplingParams(), max_tokens=12).tokens
        == second.generate(PROMPT, sampling=paceline.SamplingParams(), max_tokens=12).tokens
    )


def test_a_damaged_pack_is_made_again(pair: tuple[Path, Path], kept: Path) -> None:
    text = (
        paceline.load(str(pair[0]), quant="q8", context=128)
        .generate(PROMPT, sampling=paceline.SamplingParams(), max_tokens=12)
        .tokens
    )
    path = pack_path(Checkpoint.open(pair[0]), "q8")
    data = bytearray(path.read_bytes())
    data[-5000] ^= 255
    path.write_bytes(data)
    assert (
        paceline.load(str(pair[0]), quant="q8", context=128)
        .generate(PROMPT, sampling=paceline.SamplingParams(), max_tokens=12)
        .tokens
        == text
    )
    opened(pair[0], path, fingerprint(Checkpoint.open(pair[0]), "q8"))  # good again


def test_a_changed_checkpoint_is_noticed(tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, _ = write_pair(tmp_path, "text", seed=0, text=True)
    old = (
        paceline.load(str(target), quant="q8", context=128)
        .generate(PROMPT, sampling=paceline.SamplingParams(), max_tokens=12)
        .tokens
    )
    other, _ = write_pair(tmp_path / "other", "text", seed=1)
    os.replace(other / "model.safetensors", target / "model.safetensors")
    new = (
        paceline.load(str(target), quant="q8", context=128)
        .generate(PROMPT, sampling=paceline.SamplingParams(), max_tokens=12)
        .tokens
    )
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "empty"))
    assert (
        new
        == paceline.load(str(target), quant="q8", context=128)
        .generate(PROMPT, sampling=paceline.SamplingParams(), max_tokens=12)
        .tokens
    )
    assert new != old


@pytest.mark.parametrize("quant", RECIPES)
def test_a_converted_folder_stands_alone(pair: tuple[Path, Path], tmp_path: Path, quant: str) -> None:
    from paceline.backends.cpu.convert import convert

    convert(*pair, tmp_path / "out", quant, threads=1)
    assert not list((tmp_path / "out").rglob("*.safetensors"))
    engine = paceline.load(str(tmp_path / "out"), context=128)
    assert engine.backend.info.quant == quant
    assert engine.drafter_config is not None
    plain = cpu_backend(*pair, quant)
    (expected,) = run(plain, [sequence(plain, PROMPT, max_tokens=12)])
    found = list(engine.generate(PROMPT, sampling=paceline.SamplingParams(), max_tokens=12).tokens)
    assert found == expected.tokens[: len(found)]
    assert len(found) == 12 or expected.tokens[len(found)] in engine.stop_ids


@pytest.mark.parametrize("own", [True, False])
def test_a_converted_folder_says_whose_its_head_is(tmp_path: Path, own: bool) -> None:
    """Settings may be wrong about the head beside the files, and there is nothing to compare with once it is packed."""
    from paceline.backends.cpu.convert import convert

    weights = target_weights()
    embedding = weights[PREFIX + "embed_tokens.weight"]
    weights["lm_head.weight"] = embedding[::-1].copy() if own else embedding.copy()
    folder = write(tmp_path / "in", changed(TARGET, tie_word_embeddings=own), weights)
    convert(folder, None, tmp_path / "out", "f32", threads=1)
    converted = Checkpoint.open(tmp_path / "out")
    config = converted.target_config()
    assert config.tied_head == (not own)
    assert converted.packed
    tensors = open_pack(converted.packed, config, 1).tensors
    assert ("lm_head.weight" in tensors) == own
    if own:
        assert np.array_equal(tensors["lm_head.weight"].row(0), embedding[-1])


def test_converting_refuses_what_it_cannot_do(pair: tuple[Path, Path], tmp_path: Path) -> None:
    from paceline.backends.cpu.convert import convert

    convert(pair[0], None, tmp_path / "out", "q4", threads=1)
    with pytest.raises(SettingsError, match="exists already"):
        convert(pair[0], None, tmp_path / "out", "q4", threads=1)
    with pytest.raises(SettingsError, match="converted already"):
        convert(tmp_path / "out", None, tmp_path / "again", "q4", threads=1)
    with pytest.raises(SettingsError, match="holds q4 weights"):
        paceline.load(str(tmp_path / "out"), quant="q8")
    assert sorted(os.listdir(tmp_path)) == ["out"]
    pack = tmp_path / "out" / "model.paceline"
    pack.write_bytes(pack.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="convert the model again"):
        paceline.load(str(tmp_path / "out"))


def test_a_drafter_pack_holds_its_ordered_head(pair: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(pair[1])
    config = checkpoint.drafter_config()
    weights = pack_checkpoint(resolve(checkpoint, config), config, "q8")
    write_pack(tmp_path / "d.pack", weights, "", 1, with_tables=False)
    tensors = open_pack(tmp_path / "d.pack", config, 1).tensors
    matrix, tokens = tensors["ordered_head.weight"], tensors["ordered_head.tokens"].tolist()
    assert sorted(token for token in tokens if token >= 0) == list(range(config.vocab_size))
    table = cpu_table(pair[1])
    row = next(i for i, token in enumerate(tokens) if token == 77)
    np.testing.assert_allclose(matrix.row(row), table[77], atol=np.abs(table[77]).max() / 100)


def cpu_table(folder: Path) -> np.ndarray:
    checkpoint = Checkpoint.open(folder)
    return resolve(checkpoint, checkpoint.drafter_config())["embed_tokens.weight"].read()


@pytest.mark.parametrize(
    ("element", "columns", "choice"),
    [
        ("BF16", 64, "bf16"),
        ("F32", 64, "f32"),
        ("F16", 64, "file"),
        ("BF16", 1 << 28, DEFAULT),
        ("F32", 1 << 28, DEFAULT),
    ],
)
def test_auto_depends_on_the_files_alone(pair: tuple[Path, Path], element: str, columns: int, choice: str) -> None:
    checkpoint = Checkpoint.open(pair[0])
    ref = TensorRef("x", element, (2, columns), pair[0], 0, 2 * columns * (4 if element == "F32" else 2))
    assert choose_quant(checkpoint, Tensors({"x": ref}, {})) == choice


@pytest.mark.parametrize("least", [-7, -8])
@pytest.mark.parametrize("quant", ["q4", "q8"])
def test_weights_trained_for_q4_0_keep_their_grid(tmp_path: Path, least: int, quant: str) -> None:
    """Checkpoints in bf16 of quantisation-aware training: whole numbers times a scale for 32 columns."""
    random = np.random.default_rng(0)
    weights = target_weights()
    for name, values in weights.items():
        if values.ndim == 2 and values.shape[1] % 32 == 0:
            groups = (values.shape[0], values.shape[1] // 32, 32)
            scale = from_bf16(to_bf16(random.uniform(0.01, 0.1, groups[:2]).astype(np.float32)))
            grid = random.integers(least, 8, groups).astype(np.float32) * scale[..., None]
            weights[name] = from_bf16(to_bf16(grid.reshape(values.shape)))
    checkpoint = Checkpoint.open(write(tmp_path, TARGET, weights))
    config = checkpoint.target_config()
    packed = dict(pack_checkpoint(resolve(checkpoint, config), config, quant).matrices)
    exact = total = 0
    for given, values in weights.items():
        name = canonical_name(given)
        if name in packed and values.shape[1] % 32 == 0:
            assert packed[name].format == "q4_0"
            held = np.array([packed[name].row(row) for row in range(len(values))])
            groups = (from_bf16(to_bf16(held)) == values).reshape(-1, 32).all(axis=1)
            exact, total = exact + groups.sum(), total + len(groups)
    assert total > 100
    assert exact >= 0.99 * total


def test_threads_pack_the_same(pair: tuple[Path, Path]) -> None:
    for folder, settings in zip(pair, ("target_config", "drafter_config"), strict=True):
        checkpoint = Checkpoint.open(folder)
        config = getattr(checkpoint, settings)()
        tensors, told = resolve(checkpoint, config), ([], [])
        one, three = (
            pack_checkpoint(tensors, config, "q4", heard.append, threads=threads)
            for threads, heard in zip((1, 3), told, strict=True)
        )
        assert list(one.tensors) == list(three.tensors)
        for (_, ours), (_, theirs) in zip(one.matrices, three.matrices, strict=True):
            np.testing.assert_array_equal(ours.packed(), theirs.packed())
        assert told[0] == told[1]
        assert sum(told[0]) > 0
