"""`bench/random_gguf.py` writes what real files hold, and scripts that measure such files report what they should."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import paceline
from paceline.backends.cpu.weights import Weights
from paceline.bench.random_weights import random_weights
from paceline.checkpoint import Checkpoint
from paceline.checkpoint.config_json import drafter_config, target_config
from paceline.checkpoint.names import expected_tensors
from paceline.text.tokenizer import Tokenizer

gguf = pytest.importorskip("gguf")
BENCH = Path(__file__).parents[2] / "bench"
sys.path.insert(0, str(BENCH))
import random_gguf  # noqa: E402
import random_vocabulary  # noqa: E402
from random_checkpoint import ALWAYS, TINY  # noqa: E402

from paceline.bench.shapes import TARGETS, drafter_settings  # noqa: E402

SIZE = 8192  # tokens
SMALL = TINY | {"vocab_size": SIZE, "vocab_size_per_layer_input": SIZE, "hidden_size": 256}
DRAFTER = {
    "model_type": "gemma4_assistant",
    "backbone_hidden_size": 256,
    "use_ordered_embeddings": True,
    "num_centroids": 64,
    "centroid_intermediate_top_k": 8,
    "text_config": {
        **{key: SMALL[key] for key in ("vocab_size", "head_dim", "global_head_dim", "sliding_window")},
        "num_key_value_heads": 1,
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "layer_types": [*["sliding_attention"] * 3, "full_attention"],
    },
}


@pytest.fixture(scope="module")
def vocabulary() -> random_vocabulary.RandomVocabulary:
    return random_vocabulary.random_vocabulary(SIZE)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, vocabulary: random_vocabulary.RandomVocabulary) -> list[Path]:
    """A folder of a target in two mixes and its drafter."""
    folder = tmp_path_factory.mktemp("gguf")
    for mix in ("Q4_K_M", "Q4_0"):
        random_gguf.write_target(folder / f"small-{mix}.gguf", SMALL, mix, vocabulary)
    random_gguf.write_drafter(folder / "mtp-small.gguf", DRAFTER, vocabulary)
    return sorted(folder.iterdir())


def types(shape: str, mix: str) -> Counter[str]:
    shapes = expected_tensors(target_config(ALWAYS | TARGETS[shape]))
    return Counter(kind.name for kind in random_gguf.tensor_types(shapes, random_gguf.MIXES[mix]).values())


@pytest.mark.parametrize(
    ("shape", "mix", "found"),
    [  # in files of ggml-org and lmstudio-community, without rope_freqs
        ("12b", "Q4_K_M", {"F32": 337, "Q4_K": 284, "Q6_K": 45}),
        ("26b", "Q4_K_M", {"F32": 391, "Q4_K": 192, "Q5_0": 32, "Q8_0": 28, "Q6_K": 14}),
    ],
)
def test_mixes_are_those_of_real_files(shape: str, mix: str, found: dict[str, int]) -> None:
    assert types(shape, mix) == found


def test_every_mix_chooses_its_types() -> None:
    assert types("e2b", "Q4_0").keys() == {"F32", "BF16", "Q4_0", "Q6_K"}
    assert types("e2b", "Q8_0").keys() == {"F32", "BF16", "Q8_0"}
    assert types("e2b", "Q4_K_S")["Q5_K"] == 8  # values of four layers, down projections of 35 // 8
    assert types("e2b", "IQ4_XS")["Q5_K"] == 15  # all values
    assert types("26b", "IQ4_XS")["IQ4_NL"] == 60  # down projections of 704 and 2112 columns


@pytest.mark.parametrize(("shape", "tensors"), [("e2b", 541), ("e4b", 666), ("12b", 667), ("26b", 658), ("31b", 833)])
def test_files_have_as_many_tensors_as_real_ones(shape: str, tensors: int) -> None:
    assert types(shape, "Q6_K").total() + 1 == tensors  # and rope_freqs
    assert len(expected_tensors(drafter_config(drafter_settings(shape)))) + 1 == (51 if shape[0] == "e" else 49)


@pytest.mark.parametrize("kind", random_gguf.SCALES)
def test_random_blocks_keep_the_variance(kind: gguf.GGMLQuantizationType, tmp_path: Path) -> None:
    shape = (300, 512)
    with (tmp_path / "blocks").open("wb") as file:
        random_gguf.RandomData().write(file, kind=kind, shape=shape)
    stored = np.fromfile(tmp_path / "blocks", np.uint8).reshape(gguf.quant_shape_to_byte_shape(shape, kind))
    values = gguf.dequantize(stored, kind)
    assert values.shape == shape
    assert np.isfinite(values).all()
    assert values.std() == pytest.approx(512**-0.5, rel=0.1)
    assert abs(values.mean()) < 0.15 * values.std()  # Q4_0 has one more number below zero than above
    assert len(np.unique(values[:, 0])) > 10  # rows differ


def test_the_vocabulary_is_valid_and_of_gemmas_size() -> None:
    tokens, kinds, merges = random_vocabulary.random_vocabulary()
    assert (len(set(tokens)), len(kinds), len(set(merges))) == (262_144, 262_144, 514_906)
    known = set(tokens)
    for left, right in (merge.split(" ") for merge in merges):
        assert left in known
        assert right in known
        assert left + right in known
    assert (tokens[2], tokens[106], tokens[50]) == ("<bos>", "<turn|>", "<|tool_response>")


def test_the_vocabulary_makes_a_tokenizer(files: list[Path]) -> None:
    checkpoint = Checkpoint.open(files[1])
    tokenizer = Tokenizer.open(checkpoint.tokenizer, checkpoint.tokenizer_config, 2, SIZE)
    text = "hello world, Ärger <|turn>user 🚴"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, special=True) == text
    assert len(ids) < 0.8 * len(text.encode())  # merges work
    assert tokenizer.token_id("<|turn>") in ids


@pytest.mark.parametrize("index", [1, 2])
def test_a_pair_loads_and_generates(files: list[Path], index: int) -> None:
    notices: list[str] = []
    engine = paceline.load(str(files[index]), context=64, threads=1, draft_tokens=2, notify=notices.append)
    assert engine.backend.info.has_drafter
    assert engine.generate("hello", max_tokens=8).tokens
    assert engine.generate([{"role": "user", "content": "hello"}], max_tokens=4).tokens


def test_experts_and_global_heads_are_written(tmp_path: Path, vocabulary: random_vocabulary.RandomVocabulary) -> None:
    more = {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 96}
    more |= {"attention_k_eq_v": True, "num_key_value_heads": 2, "num_global_key_value_heads": 1}
    config = SMALL | more | {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "use_double_wide_mlp": False}
    random_gguf.write_target(tmp_path / "moe.gguf", config, "Q4_K_M", vocabulary)
    checkpoint = Checkpoint.open(tmp_path / "moe.gguf")
    assert checkpoint.target_config().layers == target_config(ALWAYS | config).layers
    assert checkpoint.tensors["layers.3.experts.down_proj"].dtype == "Q8_0"  # 96 columns
    assert checkpoint.tensors["layers.2.experts.down_proj"].dtype == "Q5_0"
    engine = paceline.load(str(tmp_path / "moe.gguf"), context=64, threads=1)
    assert engine.generate("hello", max_tokens=4).tokens


def test_starts_are_measured(files: list[Path]) -> None:
    found = run("gguf_load.py", files[2], "--starts", "1", "--threads", "1")
    assert found.keys() >= {"file_bytes", "read_bandwidth_gb_s", "processor", "anonymous_share", "pack_file_bytes"}
    assert found["has_drafter"]
    assert found["file_bytes"] == files[2].stat().st_size
    [later] = found["later_starts"]
    for start in (found["first_start"], later):
        assert 0 < start["load_s"] < start["first_token_s"]
        assert found["weight_bytes"] < start["anonymous_bytes"] <= start["resident_bytes"]


def test_two_files_are_compared(files: list[Path]) -> None:
    found = run("gguf_passes.py", files[2], files[1], "--repeats", "2", "--threads", "1", "--context", "16")
    assert [Path(model["model"]) for model in found["models"]] == [files[2], files[1]]
    bytes_of = [model["pass_bytes"] for model in found["models"]]
    assert found["bytes_ratio"] == bytes_of[0] / bytes_of[1] > 1
    assert list(found["time_ratio"]) == ["1", "2", "4", "8", "16"]
    assert len(found["time_ratios_of_one_row"]) == 2
    assert found["models"][0]["forward_of_one_row"]["1"] == 1


def test_files_are_compared_by_engines(files: list[Path]) -> None:
    given = ("--gguf", f"{files[2]},{files[1]}", "--engines", "paceline", "--context", "40", "--repeats", "1")
    found = run("compare.py", *given, "--tokens", "2", "--threads", "1")
    names = [files[2].stem, files[1].stem]
    assert found["files"] == [str(files[2]), str(files[1])]
    assert list(found["engines"]) == [f"paceline {name}" for name in names]
    assert found["best_other"] == {}
    for figures in found["engines"].values():
        assert list(figures["forward_ms"]) == ["1", "2", "4", "8", "16"]
        assert figures["against_paceline_f32"] is None


def run(script: str, *arguments: Any) -> dict[str, Any]:
    command = [sys.executable, str(BENCH / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    [line] = done.stdout.splitlines()  # tables are on stderr
    found: dict[str, Any] = json.loads(line)
    return found


def test_the_bytes_of_a_pass() -> None:
    few_experts = {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 64}
    config = target_config(ALWAYS | SMALL | few_experts)
    weights = random_weights(config, "q4")
    sizes = {name: matrix.nbytes for name, matrix in weights.matrices}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    others = sum(size for name, size in sizes.items() if ".experts." not in name)
    assert experts
    assert weights.pass_bytes(config) == others + experts // 4
    head = target_config(ALWAYS | SMALL | few_experts | {"tie_word_embeddings": False})
    apart = Weights("q4", {**weights.tensors, "lm_head.weight": weights.tensors["embed_tokens.weight"]})
    assert apart.pass_bytes(head) == weights.pass_bytes(config)  # of the embedding, single rows are read
