"""`bench/compare.py`: every engine there runs the very same weights, and all that is measured is reported."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from paceline.checkpoint import Checkpoint
from paceline.quant.bf16 import from_bf16
from paceline.quant.recipes import RECIPES
from tests.fixtures.reference_formats import round_trip

BENCH = Path(__file__).parents[2] / "bench"
LLAMA_PYTHON = os.environ.get("LLAMA_PYTHON", sys.executable)  # an interpreter with llama-cpp-python and gguf
SETTINGS = ("--shape", "tiny", "--context", "40", "--repeats", "1", "--tokens", "2", "--threads", "1")


def compare(work: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH / "compare.py"), "--work", str(work), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def report(work: Path, *arguments: str) -> dict:
    done = compare(work, *SETTINGS, *arguments)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1  # tables are on stderr
    return json.loads(done.stdout) | {"tables": done.stderr}


def has_llama() -> bool:
    code = "import llama_cpp, gguf"
    return subprocess.run([LLAMA_PYTHON, "-c", code], capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compare")


def test_transformers_runs_the_same_weights(work: Path) -> None:
    pytest.importorskip("transformers")
    found = report(work, "--formats", "bf16", "--engines", "transformers")
    assert found["engines"].keys() == {"paceline bf16", "transformers bf16"}
    assert found["missing"] == ["llama.cpp", "ik_llama.cpp", "ik_llama.cpp-rtr"]
    assert found["best_other"]["bf16"] == found["times_paceline"]["transformers bf16"]
    assert found["read_bandwidth_gb_s"] > 0
    theirs = found["engines"]["transformers bf16"]
    assert list(theirs["forward_ms"]) == ["1", "2", "4", "8", "16"]
    for agreement in (theirs["against_paceline_f32"], theirs["against_paceline"]):
        assert agreement["logits_deviation"] > 1
        assert agreement["top1"] >= 0.9
        assert agreement["largest_difference"] < 0.25 * agreement["logits_deviation"]
    ours = found["engines"]["paceline bf16"]
    ratios = found["times_paceline"]["transformers bf16"]
    assert ratios["forward_ms"]["4"] == pytest.approx(theirs["forward_ms"]["4"] / ours["forward_ms"]["4"])
    assert ratios["decode_tokens_per_s"] == pytest.approx(ours["decode_tokens_per_s"] / theirs["decode_tokens_per_s"])
    assert "transformers bf16" in found["tables"]


@pytest.mark.skipif(not has_llama(), reason="needs llama-cpp-python and gguf, here or where LLAMA_PYTHON points")
def test_llama_runs_the_same_weights(work: Path) -> None:
    found = report(work, "--engines", "llama.cpp", "--llama-python", LLAMA_PYTHON)
    assert found["missing"] == ["transformers", "ik_llama.cpp", "ik_llama.cpp-rtr"]
    least = {"bf16": 0.9, "q8": 0.9, "q4": 0.8}  # the same grids, but other rounding of activations and of the cache
    for fmt, share in least.items():
        agreement = found["engines"][f"llama.cpp {fmt}"]["against_paceline"]
        assert agreement["top1"] >= share
        assert found["times_paceline"][f"llama.cpp {fmt}"]["prompt_tokens_per_s"] > 0


@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs gguf")
@pytest.mark.parametrize("fmt", ["bf16", "q8", "q4"])
def test_gguf_files_hold_what_paceline_packs(work: Path, fmt: str) -> None:
    import gguf

    assert compare(work, "--shape", "tiny", "--engines", "paceline", "--prepare").returncode == 0
    out = work / f"test-{fmt}.gguf"
    subprocess.run([sys.executable, BENCH / "gguf_file.py", work / "tiny", out, fmt], check=True)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(out).tensors}
    refs = Checkpoint.open(work / "tiny").tensors
    assert len(tensors) == len(refs) + 1  # and the RoPE factors
    pairs = {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.6.ffn_up.weight": "model.layers.6.mlp.up_proj.weight",
        "per_layer_token_embd.weight": "model.embed_tokens_per_layer.weight",
    }
    for theirs, ours in pairs.items():
        values = gguf.dequantize(tensors[theirs].data, tensors[theirs].tensor_type)
        np.testing.assert_array_equal(values, round_trip(from_bf16(refs[ours].read()), RECIPES[fmt].uniform))


def test_files_are_written_once(work: Path) -> None:
    settings = ("--shape", "tiny", "--engines", "paceline", "--prepare")
    assert compare(work, *settings).returncode == 0
    weights = work / "tiny" / "model.safetensors"
    first = weights.stat()
    assert compare(work, *settings).returncode == 0
    assert weights.stat().st_ino == first.st_ino
    (work / "tiny" / "config.json").write_text("{}")  # another version's file
    assert compare(work, *settings).returncode == 0
    assert weights.stat().st_ino != first.st_ino


def test_a_large_table_is_a_hole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    import random_checkpoint

    monkeypatch.setattr(random_checkpoint, "LARGEST_DRAWN_TABLE", 1000)
    random_checkpoint.write_checkpoint(tmp_path, "tiny")
    refs = Checkpoint.open(tmp_path).tensors
    assert not refs["model.embed_tokens_per_layer.weight"].read().any()
    assert refs["model.embed_tokens.weight"].read().any()
    assert refs["model.layers.9.mlp.down_proj.weight"].read().any()


def test_weights_are_of_a_shape_or_of_files(tmp_path: Path) -> None:
    for arguments, cause in (
        ((), "either --shape or --gguf"),
        (("--shape", "tiny", "--gguf", "a.gguf"), "either --shape or --gguf"),
        (("--gguf", "nowhere.gguf"), "nowhere.gguf: no such file"),
    ):
        done = compare(tmp_path, *arguments)
        assert done.returncode == 2
        assert cause in done.stderr
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (("--formats", "q5"), "unknown in --formats: q5"),
        (("--engines", "vllm"), "unknown in --engines: vllm"),
        (("--repeats", "0"), "--repeats is 0"),
        (("--llama-python", "/nowhere/python"), "/nowhere/python: is no Python"),
    ],
)
def test_bad_settings_get_one_line(tmp_path: Path, arguments: tuple[str, ...], cause: str) -> None:
    done = compare(tmp_path, "--shape", "tiny", *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert cause in done.stderr
    assert len(done.stderr.splitlines()) == 1
