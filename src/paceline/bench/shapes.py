"""The official model shapes, as `config.json` of each target and its drafter, for measurements on random weights."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from paceline.checkpoint.config_json import drafter_config, target_config
from paceline.checkpoint.names import target_tensors
from paceline.config import DrafterConfig, TargetConfig

VOCABULARY = 262144


def _pattern(sliding: int, count: int) -> list[str]:
    return [*["sliding_attention"] * sliding, "full_attention"] * (count // (sliding + 1))


def _target(
    hidden: int, intermediate: int, layers: list[str], heads: int, kv_heads: int, **other: Any
) -> dict[str, Any]:
    return {
        "model_type": "gemma4_text",
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": len(layers),
        "layer_types": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 256,
        "global_head_dim": 512,
        "final_logit_softcapping": 30.0,
        **other,
    }


def _small(sharing: int, **other: Any) -> dict[str, Any]:
    per_layer = {"hidden_size_per_layer_input": 256, "vocab_size_per_layer_input": VOCABULARY}
    return {
        "sliding_window": 512,
        "max_position_embeddings": 131072,
        "num_kv_shared_layers": sharing,
        **per_layer,
        **other,
    }


def _large(global_kv_heads: int, **other: Any) -> dict[str, Any]:
    return {
        "sliding_window": 1024,
        "max_position_embeddings": 262144,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": global_kv_heads,
        **other,
    }


MOE = {"enable_moe_block": True, "num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704}

TARGETS: dict[str, dict[str, Any]] = {
    "e2b": _target(1536, 6144, _pattern(4, 35), 8, 1, **_small(20, use_double_wide_mlp=True)),
    "e4b": _target(2560, 10240, _pattern(5, 42), 8, 2, **_small(18)),
    "12b": _target(3840, 15360, _pattern(5, 48), 16, 8, **_large(1)),
    "26b": _target(2816, 2112, _pattern(5, 30), 16, 8, **_large(2, **MOE)),
    "31b": _target(5376, 21504, _pattern(5, 60), 32, 16, **_large(4)),
}

# hidden, intermediate, heads, and whether the head goes through centroids
DRAFTERS = {
    "e2b": (256, 2048, 4, True),
    "e4b": (256, 2048, 4, True),
    "12b": (1024, 8192, 16, False),
    "26b": (1024, 8192, 16, False),
    "31b": (1024, 8192, 32, False),
}


def official_target(shape: str) -> TargetConfig:
    """Settings of a shape: e2b, e4b, 12b, 26b or 31b."""
    return target_config(TARGETS[shape])


def official_drafter(shape: str) -> DrafterConfig:
    """Settings of that shape's drafter."""
    return drafter_config(drafter_settings(shape))


def drafter_settings(shape: str) -> dict[str, Any]:
    """The same as `config.json` has them."""
    target = TARGETS[shape]
    hidden, intermediate, heads, ordered = DRAFTERS[shape]
    same = ("vocab_size", "num_key_value_heads", "head_dim", "global_head_dim", "sliding_window")
    also = ("attention_k_eq_v", "num_global_key_value_heads")
    text = {
        **{key: target[key] for key in same},
        **{key: target[key] for key in also if key in target},
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_hidden_layers": 4,
        "layer_types": _pattern(3, 4),
    }
    return {
        "model_type": "gemma4_assistant",
        "backbone_hidden_size": target["hidden_size"],
        "use_ordered_embeddings": ordered,
        "num_centroids": 2048,
        "centroid_intermediate_top_k": 32,
        "text_config": text,
    }


def in_prompt(config: TargetConfig) -> Callable[[str], bool]:
    """Whether a prompt's rows pass the tensor of a name: the layers up to the last with K/V of its own."""
    last = max(index for index, layer in enumerate(config.layers) if layer.kv_source == index)

    def passes(name: str) -> bool:
        layer = re.match(r"layers\.(\d+)\.", name)
        return int(layer[1]) <= last if layer else not name.startswith(("embed_tokens", "lm_head"))

    return passes


def prompt_multiply_accumulates(config: TargetConfig) -> int:
    """Multiplications with weights that a prompt row takes."""
    passes = in_prompt(config)
    total = 0
    for name, shape in target_tensors(config).items():
        if len(shape) > 1 and passes(name):
            share = config.experts.active / config.experts.count if config.experts and ".experts." in name else 1
            total += int(math.prod(shape) * share)
    return total
