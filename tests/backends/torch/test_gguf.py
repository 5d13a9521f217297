"""GGUF files in PyTorch: their values exactly where a format holds them, else dequantised; and what users are told."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from paceline import _cpu
from paceline.backends.torch import weights as source_module
from paceline.backends.torch.backend import TorchBackend
from paceline.backends.torch.load import load_backend
from paceline.backends.torch.weights import CheckpointSource
from paceline.checkpoint import Checkpoint, resolve
from paceline.checkpoint.names import EMBEDDING, PLE_TABLE
from paceline.quant.bf16 import embedding_factor, from_bf16, to_bf16
from paceline.types import SamplingParams
from tests.fixtures.backends import all_logits, cpu_backend, run, sequence, torch_backend
from tests.fixtures.checkpoints import (
    DRAFTER,
    PREFIX,
    TARGET,
    changed,
    drafter_weights,
    target_weights,
    write,
)
from tests.fixtures.gguf_files import DRAFTERS, gguf_name, write_gguf
from tests.fixtures.reference_formats import values_of

GROUPS = ("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "Q4_1", "Q5_1")
WIDE = ("Q4_K", "Q5_0", "Q6_K", "Q8_0", "Q4_0", "IQ4_XS", "F16", "Q5_K", "BF16", "F32")  # rows of whole 256 columns
SIZES: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256}
MOE = SIZES | {
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 32,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "use_double_wide_mlp": False,
}
CONFIGS = {"edge": changed(TARGET, **SIZES), "moe": changed(TARGET, **MOE), "moe apart": changed(TARGET, **MOE)}
DRAFT = changed(DRAFTER, **SIZES) | {"backbone_hidden_size": 256}
PROMPT = list(range(5, 35))


def written(path: Path, config: dict, weights: dict, types: dict[str, str], dialect: str = "gemma4") -> dict:
    """Write a GGUF whose matrices have the types given, by parts of names, or all types in turn; its values."""
    names = DRAFTERS[dialect][0] if config is DRAFT else {}
    turns, raw, values = (cycle(GROUPS), cycle(WIDE)), {}, {}
    for name, x in weights.items():
        if x.ndim < 2 or x.dtype != np.float32 or "tower" in name:
            values[name] = x
            continue
        rows = x.reshape(-1, x.shape[-1]) / 4
        chosen = [element for part, element in types.items() if part in name]
        element = chosen[0] if chosen else next(turns[x.shape[-1] % 256 == 0])
        blocks, values[name] = encoded(rows, element)
        values[name] = values[name].reshape(x.shape)
        raw[name] = blocks.reshape(*x.shape[:-1], -1), gguf.GGMLQuantizationType[element]

    def add(writer: gguf.GGUFWriter) -> None:
        for name, (blocks, kind) in raw.items():
            apart = re.fullmatch(r".*layers\.(\d+)\.experts\.(gate|up)_proj", name)
            theirs = f"blk.{apart[1]}.ffn_{apart[2]}_exps.weight" if apart else gguf_name(name, names)
            writer.add_tensor(theirs, blocks, raw_dtype=kind)

    plain = {name: x for name, x in values.items() if name not in raw}
    write_gguf(path, config, plain, dialect=dialect, change=add)
    return values


def encoded(rows: np.ndarray, element: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows as bytes of a type, and their values."""
    if element == "F32":
        return rows.view(np.uint8), rows
    if element == "F16":
        return rows.astype(np.float16).view(np.uint8), rows.astype(np.float16).astype(np.float32)
    if element == "BF16":
        return to_bf16(rows).view(np.uint8), from_bf16(to_bf16(rows))
    blocks = _cpu.quantise(rows, element)
    return blocks, values_of(blocks, element)


def split_experts(weights: dict) -> dict:
    """Gate and up projections of the experts apart."""
    found = {}
    for name, x in weights.items():
        if name.endswith("gate_up_proj"):
            half = x.shape[1] // 2
            found[name.replace("gate_up", "gate")] = np.ascontiguousarray(x[:, :half])
            found[name.replace("gate_up", "up")] = np.ascontiguousarray(x[:, half:])
        else:
            found[name] = x
    return found


@pytest.fixture(scope="module", params=CONFIGS)
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A GGUF of mixed types, and a folder with its values in f32."""
    root, config = tmp_path_factory.mktemp("gguf"), CONFIGS[request.param]
    weights = target_weights(config)
    weights = split_experts(weights) if "apart" in request.param else weights
    values = written(root / "m.gguf", config, weights, {})
    return root / "m.gguf", write(root / "f32", config, values)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("pair")
    written(root / "m.gguf", CONFIGS["edge"], target_weights(CONFIGS["edge"]), {})
    written(root / "d.gguf", DRAFT, drafter_weights(DRAFT), {"embed": "Q8_0"}, "gemma4-assistant")
    return root / "m.gguf", root / "d.gguf"


def source_of(path: Path, quant: str = "file", **other: Any) -> CheckpointSource:
    checkpoint = Checkpoint.open(path)
    return CheckpointSource(resolve(checkpoint, checkpoint.target_config()), quant, torch.device("cpu"), **other)


def logits(backend: Any) -> np.ndarray:
    return all_logits(backend, backend.open_slot(), PROMPT)


@pytest.mark.parametrize("quant", ["f32", "file"])
def test_logits_are_those_of_the_values(files: tuple[Path, Path], quant: str) -> None:
    """In f32 arithmetic, from dequantised values or from those that grids hold."""
    path, folder = files
    expected = logits(cpu_backend(folder, None, max_rows=16))
    assert 0.5 < expected.std() < 10  # no degenerate model, and no cap that hides differences
    ours = logits(torch_backend(path, None, quant, max_rows=16, plain="f32"))
    assert np.abs(ours - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("files", ["edge"], indirect=True)  # elsewhere rounding decides which experts run
def test_logits_in_bfloat16(files: tuple[Path, Path]) -> None:
    path, folder = files
    backend = torch_backend(path, None, "file", max_rows=16)
    ours, expected = logits(backend), logits(cpu_backend(folder, None, max_rows=16))
    assert np.median(np.abs(ours - expected).mean(-1)) < 0.05 * np.abs(expected).mean()


def load(pair: tuple[Path, Path], quant: str, notify: Callable[[str], None] = lambda _: None) -> TorchBackend:
    target, drafter = (Checkpoint.open(path) for path in pair)
    return load_backend(
        (target, target.target_config()),
        (drafter, drafter.drafter_config()),
        device="cpu",
        quant=quant,
        threads=None,
        notify=notify,
        progress=lambda _: None,
        context=128,
        slots=1,
        max_rows=32,
    )


@pytest.mark.parametrize(("quant", "temperature"), [("auto", 0.0), ("auto", 1.0), ("f32", 0.0), ("q8", 0.0)])
def test_drafts_change_no_bit(pair: tuple[Path, Path], quant: str, temperature: float) -> None:
    """With a drafter that stays what it is, and whose head, which is read by row, is Q8_0."""
    params = SamplingParams(temperature, top_k=40, seed=3)
    backend = load(pair, quant)
    one, other = (
        run(backend, [sequence(backend, PROMPT, draft_tokens=depth, max_tokens=24, params=params)], chunk)[0]
        for depth, chunk in ((0, 32), (4, 5))
    )
    assert one.tokens == other.tokens
    assert np.array_equal(one.logits.view(np.uint32), other.logits.view(np.uint32))
    assert other.statistics.drafted > 0


@pytest.mark.parametrize(
    ("types", "fmt"),
    [
        (("Q4_0", "Q4_0", "Q4_0"), "q4_0"),
        (("Q4_0", "IQ4_NL", "Q4_0"), "q8_0"),
        (("Q5_0", "Q5_0", "Q8_0"), "q8_0"),
        (("Q4_0", "Q4_K", "Q8_0"), "bf16"),
        (("F32", "Q8_0", "Q8_0"), "bf16"),
    ],
)
def test_parts_of_different_types(tmp_path: Path, types: tuple[str, str, str], fmt: str) -> None:
    config = CONFIGS["edge"]
    chosen = dict(zip(("q_proj", "k_proj", "v_proj"), types, strict=True))
    given = written(tmp_path / "m.gguf", config, target_weights(config), chosen)
    names = [f"layers.0.self_attn.{part}.weight" for part in chosen]
    source = source_of(tmp_path / "m.gguf")
    made = source.matrix(*names)
    assert made.fmt == fmt
    expected = np.concatenate([given[PREFIX + name] for name in names])
    found = made.rows(torch.arange(made.outputs), 256).float().numpy()
    np.testing.assert_array_equal(found, from_bf16(to_bf16(expected)) if fmt == "bf16" else expected)


def test_recipes_quantise_the_values(files: tuple[Path, Path]) -> None:
    """What another format is asked for is made of is the file's values; grids keep their bits where they can."""
    path, folder = files
    theirs_f32 = source_of(folder, "f32")
    for quant in ("bf16", "q8", "q4"):
        ours, theirs = (source_of(part, quant) for part in (path, folder))
        for name, ref in resolve(*opened(path)).refs.items():
            if len(ref.shape) < 2 or "experts.gate_p" in name or "experts.up_p" in name:
                continue
            made, other = ours.matrix(name), theirs.matrix(name)
            assert made.fmt == other.fmt
            exact = (quant == "q8" and ref.dtype in ("Q4_0", "Q5_0", "IQ4_NL", "Q8_0")) or ref.dtype == made.fmt.upper()
            if exact:
                expected = theirs_f32.matrix(name).values
                assert torch.equal(made.rows(torch.arange(made.outputs), expected.shape[1]).float(), expected)
            else:
                assert torch.equal(made.values, other.values)


def opened(path: Path) -> tuple:
    checkpoint = Checkpoint.open(path)
    return checkpoint, checkpoint.target_config()


def test_slices_change_nothing_and_all_bytes_are_reported(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = resolve(*opened(files[0]))
    matrices = [name for name, ref in tensors.refs.items() if len(ref.shape) > 1 and "experts" not in name]
    found = []
    for size in (source_module.SLICE, 3 * 256):
        monkeypatch.setattr(source_module, "SLICE", size)
        seen: list[int] = []
        source = source_of(files[0], progress=seen.append)
        found.append([source.matrix(name) for name in matrices])
        assert sum(seen) == sum(tensors[name].bytes for name in matrices)
        assert max(seen) <= 4 * size
    for one, other in zip(*found, strict=True):
        assert torch.equal(one.values, other.values)
        assert one.scales is None or torch.equal(one.scales, other.scales)


def test_users_are_told_what_is_held_otherwise(pair: tuple[Path, Path]) -> None:
    def told(quant: str) -> list[str]:
        lines: list[str] = []
        load(pair, quant, lines.append)
        return lines

    weights, draft = told("auto")
    assert weights.startswith("weights: this device holds F16, F32, IQ4_XS, Q4_1, Q4_K, ")
    assert "; IQ4_NL as q8_0; " in weights
    assert weights.endswith("; the per-layer embeddings take 0.00 GB")
    plain, exact = draft.split("; ")
    assert plain == "drafter: this device holds F16, F32, IQ4_XS, Q4_K, Q5_K, Q6_K, Q8_0 as bf16"
    assert exact == "Q4_0, Q5_0 as q8_0"
    assert told("q8") == [draft]  # a drafter stays what it is


@pytest.mark.parametrize("tied", [True, False])
def test_bytes_of_a_pass(tmp_path: Path, tied: bool) -> None:
    """A tied embedding counts once, as the head; tables that single rows are read of do not count."""
    config = changed(TARGET, tie_word_embeddings=tied)
    folder = write(tmp_path, config, target_weights(config))
    refs = resolve(*opened(folder)).refs
    read_by_row = {PLE_TABLE} if tied else {PLE_TABLE, EMBEDDING}
    expected = sum(ref.bytes for name, ref in refs.items() if name not in read_by_row)
    assert torch_backend(folder, None).info.weight_bytes == expected


@pytest.mark.parametrize("width", [5, 32, 256, 640, 1536, 5376])
def test_factors_of_embeddings(width: int) -> None:
    exact = np.array([width**0.5], np.float32)
    assert np.float32(embedding_factor(width, False)) == exact[0]
    assert embedding_factor(width, True) == from_bf16(to_bf16(exact))[0]


def test_the_factor_is_rounded_where_the_checkpoint_is_bf16(tmp_path: Path) -> None:
    """In f32 arithmetic, too, as the CPU backend does. 640 and 48 have no roots in bf16."""
    from safetensors.torch import load_file, save_file

    config = changed(TARGET, hidden_size=640, hidden_size_per_layer_input=48)
    folder = write(tmp_path / "bf16", config, target_weights(config))
    weights = {name: x.bfloat16() for name, x in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors")
    ours, theirs = (logits(make(folder, None, max_rows=16)) for make in (torch_backend, cpu_backend))
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()
