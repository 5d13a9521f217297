"""A checkpoint is loaded whole or refused by name."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paceline.checkpoint import Checkpoint, Tensors, drafter_tensors, resolve, target_tensors
from paceline.checkpoint.config_json import drafter_config, target_config
from paceline.checkpoint.sizes import count_parameters
from paceline.checkpoint.tensors import BLOCKS
from paceline.config import TargetConfig
from paceline.errors import CheckpointError
from tests.fixtures import shapes
from tests.fixtures.checkpoints import (
    DRAFTER,
    PREFIX,
    TARGET,
    TEXT,
    changed,
    drafter_weights,
    target_weights,
    write,
    write_drafter,
    write_target,
)


def load(folder: Path) -> Tensors:
    checkpoint = Checkpoint.open(folder)
    config = checkpoint.target_config() if "assistant" not in checkpoint.config["model_type"] else None
    return resolve(checkpoint, config or checkpoint.drafter_config())


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    message = str(caught.value)
    assert str(folder) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("shards", [1, 3])
def test_a_target(tmp_path: Path, shards: int) -> None:
    weights = target_weights()
    tensors = load(write(tmp_path, TARGET, weights, shards))
    for name, ref in tensors.refs.items():
        assert np.array_equal(ref.read(), weights[PREFIX + name])
    assert tensors["norm.weight"].name == PREFIX + "norm.weight"
    assert tensors.skipped == {"model.vision_tower.patch.weight": "vision", "model.audio_tower.softcap": "audio"}


def test_a_drafter(tmp_path: Path) -> None:
    weights = drafter_weights()
    tensors = load(write(tmp_path, DRAFTER, weights))
    assert len(tensors.refs) == len(weights)
    assert np.array_equal(tensors["pre_projection.weight"].read(), weights["pre_projection.weight"])
    assert tensors["masked_embedding.token_ordering"].dtype == "I64"


def test_a_text_only_checkpoint(tmp_path: Path) -> None:
    weights = {name.replace(PREFIX, "model."): array for name, array in target_weights().items()}
    assert not [name for name in load(write(tmp_path, TEXT, weights)).refs if name.startswith("model")]


def test_official_extras_are_skipped(tmp_path: Path) -> None:
    shared = PREFIX + "layers.4.self_attn."  # a layer that reads another's keys and values
    extras = {
        "lm_head.weight": (416, 32),
        "model.embed_vision.embedding_projection.weight": (32, 3),
        "model.embed_audio.embedding_projection.weight": (32, 3),
        "model.vision_embedder.pos_embedding": (2, 2),
        shared + "k_proj.weight": (32, 32),
        shared + "v_proj.weight": (32, 32),
        shared + "k_norm.weight": (32,),
        PREFIX + "rotary_emb.inv_freq": (8,),
        PREFIX + "rotary_emb.full_attention_inv_freq": (8,),
    }
    weights = target_weights() | {name: np.zeros(shape, np.float32) for name, shape in extras.items()}
    weights["lm_head.weight"] = weights[PREFIX + "embed_tokens.weight"]
    assert set(load(write(tmp_path, TARGET, weights)).skipped) >= set(extras)


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "model.",
        "model.language_model.",
        "language_model.",
        "language_model.model.",
        "base_model.model.",
        "base_model.model.model.",
        "base_model.model.model.language_model.",
        "_orig_mod.",
        "_orig_mod.model.",
        "model._orig_mod.language_model.",
    ],
)
def test_prefixes_of_wrappers(tmp_path: Path, prefix: str) -> None:
    weights = {name.replace(PREFIX, prefix): array for name, array in target_weights().items()}
    tensors = load(write(tmp_path, TARGET, weights))
    assert tensors.refs.keys() == target_tensors(target_config(TARGET)).keys()
    weights["model.model.norm.weight"] = weights[prefix + "norm.weight"]
    assert "are the same one" in refused(write(tmp_path, TARGET, weights))


def test_experts_apart(tmp_path: Path) -> None:
    """Two tensors for gate and up projections, as some files have them, in some layers or all."""
    config = changed(TARGET, enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=24)
    weights = target_weights(config)
    for layer in (1, 4):
        at = f"{PREFIX}layers.{layer}.experts."
        fused = weights.pop(at + "gate_up_proj")
        weights |= {at + "gate_proj": fused[:, :24].copy(), at + "up_proj": fused[:, 24:].copy()}
    tensors = load(write(tmp_path, config, weights))
    assert tensors["layers.0.experts.gate_up_proj"].shape == (4, 48, 32)
    assert "layers.1.experts.gate_up_proj" not in tensors.refs
    for part in ("gate_proj", "up_proj"):
        name = f"layers.4.experts.{part}"
        assert np.array_equal(tensors[name].read(), weights[PREFIX + name])
    assert "unknown" in refused(write(tmp_path, config, weights | {at + "gate_up_proj": fused}))
    assert "shape [4, 23, 32]" in refused(write(tmp_path, config, weights | {at + "up_proj": fused[:, 25:].copy()}))
    del weights[at + "up_proj"]
    assert f"{at.removeprefix(PREFIX)}up_proj is missing" in refused(write(tmp_path, config, weights))


HEAD = "lm_head.weight"
UNTIED = changed(TARGET, tie_word_embeddings=False)


@pytest.mark.parametrize("config", [TARGET, UNTIED])
@pytest.mark.parametrize("name", [HEAD, "language_model." + HEAD, "base_model.model." + HEAD])
def test_the_head_is_what_the_files_hold(tmp_path: Path, config: dict[str, Any], name: str) -> None:
    """Whatever the settings say: a copy of the embedding is skipped, and a head of its own is used."""
    weights = target_weights()
    copy = weights[PREFIX + "embed_tokens.weight"].copy()
    checkpoint = Checkpoint.open(write(tmp_path, config, weights | {name: copy}))
    settings = checkpoint.target_config()
    assert settings.tied_head
    assert resolve(checkpoint, settings).skipped[name] == "head tied to the embedding"
    own = {"all": copy + 1, "last element": copy.copy(), "type": copy.astype(np.float16)}
    own["last element"][-1, -1] += 1
    for head in own.values():
        checkpoint = Checkpoint.open(write(tmp_path, config, weights | {name: head}))
        settings = checkpoint.target_config()
        assert not settings.tied_head
        assert np.array_equal(resolve(checkpoint, settings)[HEAD].read(), head)
        assert count_parameters(settings).total == count_parameters(target_config(TARGET)).total + copy.size


def test_a_head_of_its_own_that_is_missing(tmp_path: Path) -> None:
    message = refused(write(tmp_path, UNTIED, target_weights()))
    assert "no lm_head.weight" in message
    assert "tie_word_embeddings is false" in message


def test_a_head_of_another_size(tmp_path: Path) -> None:
    head = np.zeros((417, 32), np.float32)
    assert "shape [417, 32]" in refused(write(tmp_path, UNTIED, target_weights() | {HEAD: head}))


def test_two_heads(tmp_path: Path) -> None:
    head = np.zeros((416, 32), np.float32)
    message = refused(write(tmp_path, TARGET, target_weights() | {HEAD: head, "language_model." + HEAD: head}))
    assert "are the same one" in message


def test_a_drafter_keeps_its_tied_head(tmp_path: Path) -> None:
    weights = drafter_weights() | {HEAD: np.ones((416, 32), np.float32)}
    assert load(write(tmp_path, DRAFTER, weights)).skipped[HEAD] == "head tied to the embedding"


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (PREFIX + "layers.0.self_attn.q_proj.bias", (32,)),
        (PREFIX + "layers.5.self_attn.k_proj.weight", (32, 32)),  # there is no layer 5
        (PREFIX + "layers.0.experts.down_proj", (2, 2, 2)),
        ("lm_head.weight", (417, 32)),  # not the tied one
        ("masked_embedding.centroids.weight", (8, 32)),
        ("surprise", (1,)),
    ],
)
def test_leftovers_are_named(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    message = refused(write(tmp_path, TARGET, target_weights() | {name: np.zeros(shape, np.float32)}))
    assert name in message
    assert "unknown" in message


@pytest.mark.parametrize("name", [n for n in target_weights() if n.startswith(PREFIX)])
def test_each_tensor_is_needed(tmp_path: Path, name: str) -> None:
    weights = target_weights()
    del weights[name]
    assert name.removeprefix(PREFIX) in refused(write(tmp_path, TARGET, weights))


@pytest.mark.parametrize("name", drafter_weights())
def test_each_drafter_tensor_is_required(tmp_path: Path, name: str) -> None:
    weights = drafter_weights()
    weights[name] = np.ascontiguousarray(weights[name][:-1])
    message = refused(write(tmp_path / "shape", DRAFTER, weights))
    assert name in message
    assert str(list(weights[name].shape)) in message
    del weights[name]
    assert "missing" in refused(write(tmp_path / "missing", DRAFTER, weights))


def test_wrong_shapes_give_both(tmp_path: Path) -> None:
    weights = target_weights()
    weights[PREFIX + "layers.1.mlp.up_proj.weight"] = np.zeros((32, 64), np.float32)
    message = refused(write(tmp_path, TARGET, weights))
    for part in ("layers.1.mlp.up_proj.weight", "[32, 64]", "[64, 32]", "model.safetensors"):
        assert part in message


def test_wrong_types(tmp_path: Path) -> None:
    weights = target_weights()
    weights[PREFIX + "norm.weight"] = np.ones(32, np.int64)
    assert "I64" in refused(write(tmp_path / "target", TARGET, weights))
    weights = drafter_weights()
    weights["masked_embedding.token_ordering"] = weights["masked_embedding.token_ordering"].astype(np.float32)
    assert "F32" in refused(write(tmp_path / "drafter", DRAFTER, weights))


@pytest.mark.parametrize("kind", BLOCKS)
def test_matrices_may_be_blocks_and_vectors_may_not(tmp_path: Path, kind: str) -> None:
    checkpoint = Checkpoint.open(write_target(tmp_path))
    config = checkpoint.target_config()
    matrix, vector = "layers.1.mlp.up_proj.weight", "layers.1.input_layernorm.weight"

    def resolved(name: str) -> Tensors:
        tensors = dict(checkpoint.tensors)
        tensors[PREFIX + name] = replace(tensors[PREFIX + name], dtype=kind)
        return resolve(replace(checkpoint, tensors=tensors), config)

    assert resolved(matrix)[matrix].dtype == kind
    with pytest.raises(CheckpointError, match=f"{vector} has type {kind}, not F32"):
        resolved(vector)


def test_the_same_tensor_under_two_names(tmp_path: Path) -> None:
    weights = target_weights() | {"model.norm.weight": np.ones(32, np.float32)}
    message = refused(write(tmp_path, TARGET, weights))
    assert "model.norm.weight" in message
    assert PREFIX + "norm.weight" in message


def test_the_table_follows_the_settings() -> None:
    """Counted by hand from the official shapes."""
    tables = {name: target_tensors(_config(name)) for name in shapes.TEXTS}
    e2b = tables["E2B"]
    assert e2b["layers.14.mlp.gate_proj.weight"] == (6144, 1536)
    assert e2b["layers.15.mlp.gate_proj.weight"] == (12288, 1536)  # KV-shared layers are double-wide
    assert "layers.14.self_attn.k_proj.weight" in e2b
    assert "layers.15.self_attn.k_proj.weight" not in e2b
    assert e2b["layers.4.self_attn.q_proj.weight"] == (4096, 1536)
    assert e2b["embed_tokens_per_layer.weight"] == (262144, 35 * 256)
    moe = tables["26B-A4B"]
    assert moe["layers.29.experts.gate_up_proj"] == (128, 1408, 2816)
    assert moe["layers.0.self_attn.v_proj.weight"] == (2048, 2816)
    assert moe["layers.5.self_attn.k_proj.weight"] == (1024, 2816)
    assert "layers.5.self_attn.v_proj.weight" not in moe  # full layers use their keys as values
    assert not [name for name in tables["31B"] if "per_layer" in name or "experts" in name]
    drafter = drafter_tensors(drafter_config(shapes.drafter("E2B")))
    assert drafter["pre_projection.weight"] == (256, 3072)
    assert drafter["masked_embedding.token_ordering"] == (262144,)
    assert "masked_embedding.centroids.weight" not in drafter_tensors(drafter_config(shapes.drafter("31B")))


def _config(name: str) -> TargetConfig:
    return target_config(shapes.target(name))


# -- folders ---------------------------------------------------------------------------------------------------------


def test_missing_folder(tmp_path: Path) -> None:
    assert "no such folder" in refused(tmp_path / "nowhere")


def test_missing_config(tmp_path: Path) -> None:
    (write_target(tmp_path) / "config.json").unlink()
    assert "config.json: is missing" in refused(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_invalid_json(tmp_path: Path, content: bytes) -> None:
    (write_target(tmp_path) / "config.json").write_bytes(content)
    assert "config.json" in refused(tmp_path)


def test_not_gemma_4(tmp_path: Path) -> None:
    message = refused(write(tmp_path, {"model_type": "llama"}, target_weights()))
    assert "llama" in message
    assert "not a Gemma model" in message


def test_no_weights(tmp_path: Path) -> None:
    (write_target(tmp_path) / "model.safetensors").unlink()
    assert "has a config.json but no weights" in refused(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write(tmp_path, TARGET, target_weights(), shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors: this shard is missing" in refused(tmp_path)


def test_a_shard_of_another_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, TARGET, target_weights(), shards=3)
    shards = [tmp_path / f"model-0000{n}-of-00003.safetensors" for n in (1, 2)]
    shards[1].write_bytes(shards[0].read_bytes())
    assert "is also in" in refused(tmp_path)


@pytest.mark.parametrize(
    "weight_map", [None, {"a": 3}, {"a": "../model.safetensors"}, {"a": ".."}, {"a": "/etc/passwd"}]
)
def test_a_broken_index(tmp_path: Path, weight_map: Any) -> None:
    write(tmp_path, TARGET, target_weights(), shards=2)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "no valid weight_map" in refused(tmp_path)


def test_an_index_that_promises_too_much(tmp_path: Path) -> None:
    write(tmp_path, TARGET, target_weights(), shards=2)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["absent"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    assert "lacks the tensor absent" in refused(tmp_path)


def test_a_drafter_is_no_target(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a drafter; pass it as --drafter"):
        Checkpoint.open(write_drafter(tmp_path / "d")).target_config()
    with pytest.raises(CheckpointError, match="not a Gemma 4 drafter"):
        Checkpoint.open(write_target(tmp_path / "t")).drafter_config()


@pytest.mark.parametrize(
    "text",
    [
        {"num_hidden_layers": "five"},
        {"hidden_size": None},
        {"layer_types": [1, 2, 3, 4, 5]},
        {"num_attention_heads": 2.5},
        {"rope_parameters": {"full_attention": 3}},
        {"num_key_value_heads": 0},
    ],
)
def test_nonsense_in_the_settings(tmp_path: Path, text: dict[str, Any]) -> None:
    assert "config.json" in refused(write(tmp_path, changed(TARGET, **text), target_weights()))


def test_other_files(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_target(tmp_path))
    assert checkpoint.generation == checkpoint.tokenizer_config == {}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 106]}')
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<bos>"}')
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.generation == {"eos_token_id": [1, 106]}
    assert checkpoint.tokenizer_config == {"bos_token": "<bos>"}
    assert checkpoint.tokenizer == tmp_path / "tokenizer.json"
    (tmp_path / "generation_config.json").write_text("{")
    assert "generation_config.json" in refused(tmp_path)


@pytest.mark.parametrize("digits", ["7" * 5000, "7" * 50, "²", "-1"])
def test_a_layer_of_any_number_is_only_unknown(tmp_path: Path, digits: str) -> None:
    weights = drafter_weights()
    weights[f"model.layers.{digits}.self_attn.k_proj.weight"] = np.zeros((1, 1), np.float32)
    assert "is unknown" in refused(write(tmp_path / "x", DRAFTER, weights))
