"""Tiny checkpoints written by hand: random weights, the official files' names, no PyTorch."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from paceline.checkpoint import drafter_tensors, target_tensors
from paceline.config import drafter_config, target_config

VOCAB = 416  # room for the tokenizers of text_samples, and a multiple of the centroids
PREFIX = "model.language_model."

TEXT: dict[str, Any] = {
    "model_type": "gemma4_text",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 5,
    "layer_types": ["sliding_attention", "full_attention"] * 2 + ["full_attention"],
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 8,
    "max_position_embeddings": 4096,
    "final_logit_softcapping": 30.0,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "num_kv_shared_layers": 1,
    "use_double_wide_mlp": True,
    "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": VOCAB,
    "tie_word_embeddings": True,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
TARGET: dict[str, Any] = {"model_type": "gemma4", "text_config": TEXT, "eos_token_id": [1, 5]}
DRAFTER: dict[str, Any] = {
    "model_type": "gemma4_assistant",
    "backbone_hidden_size": 32,
    "use_ordered_embeddings": True,
    "num_centroids": 8,
    "centroid_intermediate_top_k": 4,
    "text_config": TEXT
    | {
        "num_hidden_layers": 2,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "use_double_wide_mlp": False,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 0,
    },
}


def target_weights(config: Mapping[str, Any] = TARGET, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights under the official names, with the extras that official files hold."""
    random = np.random.default_rng(seed)
    weights = {PREFIX + n: _random(random, n, s) for n, s in target_tensors(target_config(config)).items()}
    weights["model.vision_tower.patch.weight"] = np.zeros((3, 4), np.float32)
    weights["model.audio_tower.softcap"] = np.zeros((), np.float32)
    return weights


def drafter_weights(config: Mapping[str, Any] = DRAFTER, seed: int = 1) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    weights = {}
    for name, shape in drafter_tensors(drafter_config(config)).items():
        top = name.startswith(("pre_projection", "post_projection", "masked_embedding"))
        weights[name if top else "model." + name] = _random(random, name, shape)
    return weights


def _random(random: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name == "masked_embedding.token_ordering":
        return random.permutation(shape[0]).astype(np.int64)
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    return (random.standard_normal(shape) * 0.2).astype(np.float32)


def write(folder: Path, config: Mapping[str, Any], weights: dict[str, np.ndarray], shards: int = 1) -> Path:
    """Write a checkpoint in one file or in several with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return folder
    names, weight_map = sorted(weights), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        save_file({name: weights[name] for name in names[shard::shards]}, folder / file)
        weight_map |= dict.fromkeys(names[shard::shards], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def write_target(folder: Path, seed: int = 0) -> Path:
    return write(folder, TARGET, target_weights(seed=seed))


def write_drafter(folder: Path, seed: int = 1) -> Path:
    return write(folder, DRAFTER, drafter_weights(seed=seed))


def changed(config: Mapping[str, Any], **text: Any) -> dict[str, Any]:
    """A copy of a config with other settings in its text part."""
    result = copy.deepcopy(dict(config))
    result["text_config"] |= text
    return result
