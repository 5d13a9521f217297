"""Gemma 3's settings in all spellings, and its tensors."""

import json
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from paceline.checkpoint import Checkpoint, resolve, target_tensors
from paceline.checkpoint.config_json import target_config
from paceline.config import Rope, TargetConfig
from paceline.errors import CheckpointError
from tests.fixtures.checkpoints import write

# The text parts of the official files, as they are: what 4B and more leave out are the class's defaults.
G270M: dict[str, Any] = {
    "model_type": "gemma3_text",
    "_sliding_window_pattern": 6,
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 640,
    "intermediate_size": 2048,
    "layer_types": [*["sliding_attention"] * 5, "full_attention"] * 3,
    "max_position_embeddings": 32768,
    "num_attention_heads": 4,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": 512,
    "use_bidirectional_attention": False,
    "vocab_size": 262144,
}
G4B: dict[str, Any] = {
    "model_type": "gemma3",
    "eos_token_id": [1, 106],
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {},
}
G27B = G4B | {
    "text_config": G4B["text_config"]
    | {
        "head_dim": 128,
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "num_attention_heads": 32,
        "num_hidden_layers": 62,
        "num_key_value_heads": 16,
        "query_pre_attn_scalar": 168,
    }
}
TINY: dict[str, Any] = {
    "model_type": "gemma3_text",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "sliding_window": 8,
    "sliding_window_pattern": 2,
}


def changed(config: dict[str, Any], **text: Any) -> TargetConfig:
    return target_config(config | text)


def test_the_smallest() -> None:
    config = target_config(G270M)
    assert [i for i, layer in enumerate(config.layers) if not layer.sliding] == [5, 11, 17]
    assert {(la.head_dim, la.kv_heads, la.intermediate_size, la.has_v_proj) for la in config.layers} == {
        (256, 1, 2048, True)
    }
    assert [layer.kv_source for layer in config.layers] == list(range(18))
    assert (config.rope_sliding, config.rope_full) == (Rope(1e4), Rope(1e6))
    assert config.attention_scale == 1 / 16
    assert (config.value_norm, config.layer_scalar, config.norms_include_one) == (False, False, False)
    assert (config.softcap, config.ple_size, config.experts, config.tied_head) == (None, 0, None, True)
    assert (config.sliding_window, config.max_positions, config.stop_ids, config.bos_id) == (512, 32768, (1,), 2)


def test_files_that_say_little() -> None:
    config = target_config(G4B)
    assert (config.vocab_size, config.heads, len(config.layers), config.max_positions) == (262208, 8, 34, 131072)
    assert [i for i, layer in enumerate(config.layers) if not layer.sliding] == [5, 11, 17, 23, 29]
    assert {(la.head_dim, la.kv_heads) for la in config.layers} == {(256, 4)}
    assert (config.rope_sliding, config.rope_full) == (Rope(1e4), Rope(1e6, scaling=8.0))
    assert config.stop_ids == (1, 106)
    large = target_config(G27B)
    assert large.attention_scale == 168**-0.5
    assert {(la.head_dim, la.kv_heads) for la in large.layers} == {(128, 16)}


@pytest.mark.parametrize("config", [G270M, G4B, G27B])
def test_transformers_agrees(config: dict[str, Any]) -> None:
    """What transformers makes of a file, and saves in its own spelling, are the same settings."""
    transformers = pytest.importorskip("transformers")
    text = {key: value for key, value in config.get("text_config", config).items() if key != "model_type"}
    saved = json.loads(transformers.Gemma3TextConfig(**text).to_json_string())
    ours = target_config(config)
    assert target_config(saved) == replace(ours, model_type="gemma3_text", stop_ids=(1,))


def test_spellings_of_rotation_and_pattern() -> None:
    assert changed(G270M, layer_types=None) == target_config(G270M)
    three = changed(G270M, layer_types=None, sliding_window_pattern=3)
    assert [layer.sliding for layer in three.layers] == [True, True, False] * 6
    assert changed(G270M, rope_scaling={"type": "linear", "factor": 2.0}).rope_full == Rope(1e6, scaling=2.0)
    ropes = {"full_attention": {"rope_type": "linear", "factor": 4, "rope_theta": 5e5}, "sliding_attention": None}
    config = changed(G270M, rope_parameters=ropes, rope_local_base_freq=2e4)
    assert (config.rope_sliding, config.rope_full) == (Rope(2e4), Rope(5e5, scaling=4.0))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0"),
        ({"query_pre_attn_scalar": "256"}, "query_pre_attn_scalar is '256'"),
        ({"layer_types": None, "sliding_window_pattern": 0}, "sliding_window_pattern is 0"),
        ({"layer_types": None, "num_hidden_layers": 10**12}, "num_hidden_layers"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, "yarn"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "factor is 0.5"),
        ({"rope_scaling": "linear"}, "rope_scaling must be"),
        ({"rope_parameters": {"full_attention": 3}}, "rope_parameters of full_attention is 3"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0"),
        ({"rope_theta": 0}, "rope_theta is 0"),
        ({"rope_local_base_freq": "x"}, "rope_theta is 'x'"),
        ({"norms_include_one": 1}, "norms_include_one is 1"),
    ],
)
def test_what_makes_no_sense_is_refused(text: dict[str, Any], says: str) -> None:
    with pytest.raises(CheckpointError, match=says) as caught:
        changed(G270M, **text)
    assert "\n" not in str(caught.value)


def test_any_values_give_settings_or_one_line() -> None:
    values: list[Any] = [None, 0, -1, 1, 2**63, 10**400, 1.5, float("nan"), float("inf"), "x", [], {}, [1], True, False]
    values += [{"a": 1}, {"rope_type": "linear"}, {"factor": 8}, {"rope_type": ["x"]}, {"full_attention": []}]
    values += [
        {"full_attention": {"factor": 10**400, "rope_type": "linear"}},
        {"0": {"intermediate_size": 5}},
        {"00": 3},
    ]
    keys = [*G270M, "rope_parameters", "sliding_window_pattern", "per_layer_config", "tie_word_embeddings"]
    keys += ["norms_include_one", "num_kv_shared_layers", "attention_k_eq_v", "text_config"]
    random, right, messages = Random(1), 0, ""
    for _ in range(2000):
        text = {random.choice(keys): random.choice(values) for _ in range(random.randint(1, 3))}
        try:
            right += len(target_tensors(changed(G270M, **text))) > 0
        except CheckpointError as error:
            messages += str(error)
    assert "\n" not in messages
    assert 100 < right < 1900


def weights_of(config: TargetConfig) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in target_tensors(config).items()}


@pytest.mark.parametrize("prefix", ["model.", "model.language_model.", "language_model.model."])
def test_its_tensors(tmp_path: Path, prefix: str) -> None:
    weights = weights_of(target_config(TINY))
    extras = {"multi_modal_projector.mm_soft_emb_norm.weight": np.ones(4, np.float32)}
    extras["vision_tower.vision_model.head.weight"] = np.ones((4, 4), np.float32)
    checkpoint = Checkpoint.open(write(tmp_path, TINY, {prefix + n: w for n, w in weights.items()} | extras))
    config = checkpoint.target_config()
    tensors = resolve(checkpoint, config)
    assert tensors.skipped == dict.fromkeys(extras, "vision")
    assert len(tensors.refs) == 2 + 2 * (6 + 7)
    for name, ref in tensors.refs.items():
        assert np.array_equal(ref.read(), weights[name])
        if ref.read().ndim == 1:
            assert np.array_equal(tensors.vector(name), np.float32(1) + weights[name])


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_norms_are_exact_sums(tmp_path: Path, kind: str) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    weights = {"model." + n: torch.from_numpy(w) for n, w in weights_of(target_config(TINY)).items()}
    write(tmp_path, TINY, {})
    save_file({n: w.to(getattr(torch, kind)) for n, w in weights.items()}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    tensors = resolve(checkpoint, checkpoint.target_config())
    stored = weights["model.norm.weight"].to(getattr(torch, kind))
    assert np.array_equal(tensors.vector("norm.weight"), (1.0 + stored.float()).numpy())
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"norms_include_one": True}))
    checkpoint = Checkpoint.open(tmp_path)
    tensors = resolve(checkpoint, checkpoint.target_config())
    assert np.array_equal(tensors.vector("norm.weight"), stored.float().numpy())
