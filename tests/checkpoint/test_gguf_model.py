"""GGUF files of every kind of model give the settings and tensors of the checkpoint they were written from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from paceline.checkpoint import Checkpoint, drafter_tensors, resolve, target_tensors
from paceline.checkpoint.config_json import drafter_config, target_config
from paceline.errors import CheckpointError
from tests.fixtures import checkpoints, shapes
from tests.fixtures.gguf_files import DRAFTERS, write_gguf

MOE: dict[str, Any] = {
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 32,
    "attention_k_eq_v": True,
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 1,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "use_double_wide_mlp": False,
}
PLAIN = {key: MOE[key] for key in MOE if key.endswith(("per_layer_input", "shared_layers", "wide_mlp"))}
CONFIGS = {
    "edge": checkpoints.TARGET,
    "moe": checkpoints.changed(checkpoints.TARGET, **MOE),
    "dense": checkpoints.changed(checkpoints.TARGET, **PLAIN, final_logit_softcapping=None),
    "own widths": checkpoints.changed(
        checkpoints.TARGET, per_layer_config={"1": {"intermediate_size": 96, "head_dim": 32}}
    ),
}


def scaled(name: str) -> dict[str, Any]:
    """An official shape with its layers and kinds, and small sizes."""
    config = shapes.target(name)
    text = config["text_config"]
    small = {"hidden_size": 32, "intermediate_size": 32, "head_dim": 16, "global_head_dim": 32, "vocab_size": 64}
    small |= {"moe_intermediate_size": 32, "num_experts": 8} if text.get("enable_moe_block") else {}
    small |= {"hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 64} if name in ("E2B", "E4B") else {}
    return {**config, "text_config": text | small, "eos_token_id": 1}


def opened(path: Path) -> Checkpoint:
    return Checkpoint.open(path)


def random(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    dice = np.random.default_rng(seed)
    return {
        name: dice.permutation(shape[0]).astype(np.int64)
        if name.endswith("token_ordering")
        else dice.standard_normal(shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def assert_same_tensors(checkpoint: Checkpoint, weights: Mapping[str, np.ndarray]) -> None:
    assert checkpoint.tensors.keys() == weights.keys()
    for name, values in weights.items():
        np.testing.assert_array_equal(checkpoint.tensors[name].read(), values)


@pytest.mark.parametrize("kind", CONFIGS)
def test_targets(kind: str, tmp_path: Path) -> None:
    expected = target_config(CONFIGS[kind])
    weights = random(target_tensors(expected))
    found = opened(write_gguf(tmp_path / "m.gguf", CONFIGS[kind], weights))
    stops = {"model_type": "gemma4_text", "stop_ids": (1,)}  # the file says nothing of token ids
    assert found.target_config() == replace(expected, **stops)
    assert_same_tensors(found, weights)


@pytest.mark.parametrize("name", shapes.TEXTS)
def test_official_shapes(name: str, tmp_path: Path) -> None:
    expected = target_config(scaled(name))
    weights = {name: np.zeros(shape, np.float32) for name, shape in target_tensors(expected).items()}
    found = opened(write_gguf(tmp_path / "m.gguf", scaled(name), weights))
    assert found.target_config() == replace(expected, model_type="gemma4_text")
    assert found.tensors.keys() == weights.keys()


GEMMA3: dict[str, Any] = {
    "model_type": "gemma3_text",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 7,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 8,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
}


def scale_rope(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(8.0)


@pytest.mark.parametrize("scaled", [False, True])
def test_gemma_3(scaled: bool, tmp_path: Path) -> None:
    """Every sixth layer is full, all heads are of one size, rotary is scaled in larger models; norms are whole."""
    ropes = {"rope_scaling": {"rope_type": "linear", "factor": 8.0}} if scaled else {}
    expected = target_config(GEMMA3 | ropes)
    weights = random(target_tensors(expected))
    change = scale_rope if scaled else lambda _: None
    found = opened(write_gguf(tmp_path / "m.gguf", GEMMA3 | ropes, weights, dialect="gemma3", change=change))
    assert found.target_config() == replace(expected, norms_include_one=True)
    assert [layer.sliding for layer in expected.layers] == [True] * 5 + [False, True]
    assert expected.rope_full.scaling == (8.0 if scaled else 1.0)
    assert_same_tensors(found, weights)


def test_gemma_3_27b_scales_attention_by_its_width(tmp_path: Path) -> None:
    config = GEMMA3 | {"num_hidden_layers": 62, "hidden_size": 64, "num_attention_heads": 2}
    weights = {name: np.zeros(shape, np.float32) for name, shape in target_tensors(target_config(config)).items()}
    found = opened(write_gguf(tmp_path / "m.gguf", config, weights, dialect="gemma3")).target_config()
    assert found.query_pre_attn_scalar == 32


@pytest.mark.parametrize("head", ["centroids", "dense"])
@pytest.mark.parametrize("dialect", DRAFTERS)
def test_drafters(dialect: str, head: str, tmp_path: Path) -> None:
    if (dialect, head) == ("gemma4", "centroids"):
        pytest.skip("this dialect has no names for such a head")
    config = checkpoints.DRAFTER | {"use_ordered_embeddings": head == "centroids"}
    expected = drafter_config(config)
    weights = random(drafter_tensors(expected))
    found = opened(write_gguf(tmp_path / "d.gguf", config, weights, dialect=dialect))
    assert found.drafter_config() == expected
    assert_same_tensors(found, weights)
    with pytest.raises(CheckpointError, match="this is a drafter; pass it as --drafter"):
        found.target_config()


def test_a_drafter_names_its_target(tmp_path: Path) -> None:
    config = checkpoints.DRAFTER | {"backbone_hidden_size": 1536, "use_ordered_embeddings": False}
    weights = {name: np.zeros(shape, np.float32) for name, shape in drafter_tensors(drafter_config(config)).items()}
    refused(
        write_gguf(tmp_path / "d.gguf", config, weights, dialect="gemma4-assistant"),
        "this is a drafter of Gemma 4 E2B; pass it as --drafter, not as the model",
    )


def test_a_drafter_says_its_targets_size_or_its_tensors_do(tmp_path: Path) -> None:
    def without(writer: gguf.GGUFWriter) -> None:
        del writer.kv_data[0]["gemma4-assistant.embedding_length_out"]

    weights = random(drafter_tensors(drafter_config(checkpoints.DRAFTER)))
    path = write_gguf(tmp_path / "d.gguf", checkpoints.DRAFTER, weights, dialect="gemma4-assistant", change=without)
    assert opened(path).drafter_config().backbone_hidden_size == 32


def test_settings_of_a_head_that_is_not_there(tmp_path: Path) -> None:
    """llama.cpp's conversion leaves the centroids out and their settings in."""
    weights = random(drafter_tensors(drafter_config(checkpoints.DRAFTER)))
    del weights["masked_embedding.centroids.weight"], weights["masked_embedding.token_ordering"]
    path = write_gguf(tmp_path / "d.gguf", checkpoints.DRAFTER, weights, dialect="gemma4-assistant")
    assert opened(path).drafter_config().centroids == 0


def test_keys_and_values_of_layers_that_share_them(tmp_path: Path) -> None:
    """Early files have them, later ones have not."""
    expected = target_config(CONFIGS["edge"])
    extra = {"blk.4.attn_k.weight": (32, 32), "blk.4.attn_v.weight": (32, 32), "blk.4.attn_k_norm.weight": (32,)}
    weights = random(target_tensors(expected))
    found = opened(write_gguf(tmp_path / "m.gguf", CONFIGS["edge"], weights, tensors=random(extra)))
    assert found.target_config().layers == expected.layers
    assert resolve(found, found.target_config()).refs.keys() == weights.keys()


def test_ollamas_conversion(tmp_path: Path) -> None:
    """Towers in the same file, another name of the experts' scales, gates and values of the experts apart."""
    config = CONFIGS["moe"]
    weights = random(target_tensors(target_config(config)))
    written, expected = dict(weights), {}
    for name, values in weights.items():
        if name.endswith("gate_up_proj"):
            del written[name]
            layer = name.split(".")[1]
            gate, up = values[:, :32], values[:, 32:]
            written |= {f"model.layers.{layer}.experts.gate": gate, f"model.layers.{layer}.experts.up": up}
            expected |= {f"layers.{layer}.experts.gate_proj": gate, f"layers.{layer}.experts.up_proj": up}
        else:
            expected[name] = values
    apart = {
        f"blk.{name.split('.')[2]}.ffn_{name.split('.')[-1]}_exps.weight": written.pop(name)
        for name in list(written)
        if name.endswith(("experts.gate", "experts.up"))
    }
    towers = {name: np.zeros((2, 2), np.float32) for name in ("v.patch.weight", "a.conv.weight", "mm.proj.weight")}
    path = write_gguf(
        tmp_path / "sha256-1",
        config,
        written,
        tensors=apart | towers,
        rename=lambda name: name.replace("ffn_down_exps.scale", "ffn_gate_inp.per_expert_scale"),
    )
    found = opened(path).tensors
    assert {name for name in found if name not in expected} == {
        "vision_tower.patch.weight",
        "audio_tower.conv.weight",
        "embed_vision.proj.weight",
    }
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name].read(), values)


def test_fused_queries_keys_and_values(tmp_path: Path) -> None:
    config = CONFIGS["dense"]
    weights = random(target_tensors(target_config(config)))
    fused, rest = {}, dict(weights)
    for index in range(5):
        parts = [rest.pop(f"layers.{index}.self_attn.{part}_proj.weight") for part in "qkv"]
        fused[f"blk.{index}.attn_qkv.weight"] = np.concatenate(parts)
    found = opened(write_gguf(tmp_path / "m.gguf", config, rest, tensors=fused))
    assert found.target_config().layers == target_config(config).layers
    assert_same_tensors(found, weights)
    fused["blk.1.attn_qkv.weight"] = fused["blk.1.attn_qkv.weight"][:-1]
    with pytest.raises(CheckpointError, match=r"blk.1.attn_qkv.weight has shape \[127, 32\] where 64 \+ 2 x 32 rows"):
        opened(write_gguf(tmp_path / "m.gguf", config, rest, tensors=fused))


def test_a_head_of_its_own(tmp_path: Path) -> None:
    weights = random(target_tensors(target_config(CONFIGS["dense"])))
    head = random({"head": (checkpoints.VOCAB, 32)})["head"]
    found = opened(write_gguf(tmp_path / "m.gguf", CONFIGS["dense"], weights, tensors={"output.weight": head}))
    assert found.config["tie_word_embeddings"] is False
    np.testing.assert_array_equal(found.tensors["lm_head.weight"].read(), head)


def test_files_without_what_may_be_missing(tmp_path: Path) -> None:
    """No pattern of layers, no factors of frequencies: heads differ in size, and Gemma 4 has one factor."""

    def without(writer: gguf.GGUFWriter) -> None:
        del writer.kv_data[0]["gemma4.attention.sliding_window_pattern"]

    weights = random(target_tensors(target_config(CONFIGS["dense"])))
    leave_out = lambda name: None if name == "rope_freqs.weight" else name  # noqa: E731
    path = write_gguf(tmp_path / "m.gguf", CONFIGS["dense"], weights, change=without, rename=leave_out)
    expected = target_config(CONFIGS["dense"])
    assert opened(path).target_config().layers == expected.layers
    assert opened(path).target_config().rope_full == expected.rope_full


@pytest.mark.parametrize("rotating", [0.5, 1.0])
def test_frequencies_that_turn(rotating: float, tmp_path: Path) -> None:
    ropes = {"full_attention": {"rope_type": "proportional", "partial_rotary_factor": rotating, "rope_theta": 5e5}}
    config = checkpoints.changed(CONFIGS["dense"], rope_parameters=ropes)
    weights = random(target_tensors(target_config(config)))
    found = opened(write_gguf(tmp_path / "m.gguf", config, weights)).target_config()
    assert found.rope_full == target_config(config).rope_full
    assert found.rope_full.rotary_factor == rotating


TYPES = (Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1)


def test_types_are_mixed(tmp_path: Path) -> None:
    """A block type is read as rows of raw blocks, whole or in slices."""
    config = CONFIGS["moe"]
    weights = random(target_tensors(target_config(config)))
    type_of = lambda name: TYPES[sum(map(ord, name)) % len(TYPES)]  # noqa: E731
    found = opened(write_gguf(tmp_path / "m.gguf", config, weights, type_of=type_of)).tensors
    seen = set()
    for name, values in weights.items():
        ref = found[name]
        seen.add(ref.dtype)
        assert ref.shape == values.shape
        if values.ndim == 1:
            continue
        stored = ref.read()
        if ref.dtype == "F16":
            np.testing.assert_array_equal(stored, values.astype(np.float16))
        else:
            raw = gguf.quantize(values, Type[ref.dtype])
            np.testing.assert_array_equal(stored, raw.view(np.uint16) if ref.dtype == "BF16" else raw)
        np.testing.assert_array_equal(ref.read(1, 3), stored[1:3])
        np.testing.assert_array_equal(ref.slice(1, 3).read(), stored[1:3])
        np.testing.assert_array_equal(ref.map(), stored)
    assert seen == {"F32", *(kind.name for kind in TYPES)}


def refused(path: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        Checkpoint.open(path).target_config()
    assert str(path) in str(caught.value)


def rewritten(tmp_path: Path, settings: dict[str, Any]) -> Path:
    """A small target with other settings; None takes one away."""

    def change(writer: gguf.GGUFWriter) -> None:
        for key, value in settings.items():
            name = key if key.startswith("general.") else f"gemma4.{key}"
            writer.kv_data[0].pop(name, None)
            if value is not None:
                writer.add_key_value(name, value, gguf.GGUFValueType.get_type(value), *sub_type(value))

    weights = random(target_tensors(target_config(CONFIGS["dense"])))
    return write_gguf(tmp_path / "m.gguf", CONFIGS["dense"], weights, change=change)


def sub_type(value: object) -> tuple[gguf.GGUFValueType, ...]:
    return (gguf.GGUFValueType.get_type(value[0]),) if isinstance(value, list) else ()


@pytest.mark.parametrize(
    ("architecture", "match"),
    [
        ("clip", "is the part of a model that sees and hears"),
        ("dflash", "a DFlash drafter, not an MTP drafter"),
        ("eagle3", "an EAGLE-3 drafter, not an MTP drafter"),
        ("llama", "is a model of the architecture 'llama'; only Gemma 3, Gemma 4 and their MTP drafters"),
        ("gemma3n", "architecture 'gemma3n'"),
    ],
)
def test_other_models_are_named(architecture: str, match: str, tmp_path: Path) -> None:
    refused(rewritten(tmp_path, {"general.architecture": architecture}), match)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"block_count": None}, "says nothing of gemma4.block_count"),
        ({"block_count": (1 << 31) - 1}, "block_count is 2147483647; it must be between 1 and 1024"),
        ({"block_count": 0}, "block_count is 0"),
        ({"block_count": "5"}, "gemma4.block_count is '5'; it must be a whole number"),
        ({"embedding_length": True}, "gemma4.embedding_length is True; it must be a whole number"),
        ({"attention.head_count": 0}, "num_attention_heads is 0"),
        ({"attention.head_count": [2, 2, 2, 2, 4]}, "attention.head_count that differs between layers"),
        ({"attention.head_count_kv": [1, 1, 2, 1, 1]}, "head_count_kv of sliding layers that differs"),
        ({"attention.head_count_kv": [1, 1]}, "must be a list of 5 whole numbers"),
        ({"feed_forward_length": [64.0] * 5}, "must be a list of 5 whole numbers"),
        ({"attention.sliding_window_pattern": [True] * 4}, "must be a list of 5 true and false"),
        ({"attention.value_length": 16}, "keys of 32 and values of 16"),
        ({"rope.dimension_count_swa": 8}, "keys of 16 and values of 16 with 8 of them rotating"),
        ({"rope.scaling.type": "yarn"}, "rope.scaling.type 'yarn'"),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}, "'linear' with a factor of 8"),
        ({"general.architecture": 4}, "general.architecture is 4; it must be a text"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], match: str, tmp_path: Path) -> None:
    refused(rewritten(tmp_path, settings), match)


def test_unknown_tensors_are_named(tmp_path: Path) -> None:
    weights = random(target_tensors(target_config(CONFIGS["dense"])))
    extra = {"blk.0.attn_sinks.weight": np.zeros((2, 32), np.float32)}
    refused(
        write_gguf(tmp_path / "m.gguf", CONFIGS["dense"], weights, tensors=extra), r"blk.0.attn_sinks.weight \[2, 32\]"
    )
    twice = {"blk.0.ffn_gate_inp.per_expert_scale": np.zeros(4, np.float32)}
    moe = CONFIGS["moe"]
    path = write_gguf(tmp_path / "m.gguf", moe, random(target_tensors(target_config(moe))), tensors=twice)
    refused(path, "are the same one")


def test_types_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    weights = random(target_tensors(target_config(CONFIGS["dense"])))
    del weights["layers.0.mlp.up_proj.weight"]

    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("blk.0.ffn_up.weight", np.zeros((64, 66), np.uint8), raw_dtype=Type.IQ2_XXS)

    refused(
        write_gguf(tmp_path / "m.gguf", CONFIGS["dense"], weights, change=change),
        "blk.0.ffn_up.weight has type IQ2_XXS, which is not supported; take another file of this model, such as Q4_K_M",
    )


@pytest.mark.parametrize("divisors", [[1.0] * 3, [0.0] * 16, [2.0] * 16, [1.0, 8.0] * 8, [1.0] * 15 + [float("nan")]])
def test_factors_of_frequencies_switch_them_on_or_off(divisors: list[float], tmp_path: Path) -> None:
    weights = random(target_tensors(target_config(CONFIGS["dense"])))
    tensors = {"rope_freqs.weight": np.array(divisors, np.float32)}
    refused(write_gguf(tmp_path / "m.gguf", CONFIGS["dense"], weights, tensors=tensors), "rope_freqs.weight")
