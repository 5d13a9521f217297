"""The five official shapes as their `config.json` has them (text part), for tests of settings and sizes."""

from typing import Any

ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
}


def _text(kind: str, layers: int, every: int, **settings: Any) -> dict[str, Any]:
    return {
        "model_type": kind,
        "vocab_size": 262144,
        "num_hidden_layers": layers,
        "layer_types": ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(layers)],
        "head_dim": 256,
        "global_head_dim": 512,
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "final_logit_softcapping": 30.0,
        "rope_parameters": ROPE,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "sliding_window": 1024,
        "max_position_embeddings": 262144,
    } | settings


E2B = _text(
    "gemma4_text",
    35,
    5,
    hidden_size=1536,
    intermediate_size=6144,
    num_attention_heads=8,
    num_key_value_heads=1,
    num_kv_shared_layers=20,
    use_double_wide_mlp=True,
    hidden_size_per_layer_input=256,
    vocab_size_per_layer_input=262144,
    sliding_window=512,
    max_position_embeddings=131072,
)
E4B = E2B | _text(
    "gemma4_text",
    42,
    6,
    hidden_size=2560,
    intermediate_size=10240,
    num_attention_heads=8,
    num_key_value_heads=2,
    num_kv_shared_layers=18,
    use_double_wide_mlp=False,
    hidden_size_per_layer_input=256,
    sliding_window=512,
    max_position_embeddings=131072,
)
K_IS_V = {"num_attention_heads": 16, "num_key_value_heads": 8, "attention_k_eq_v": True}
B12 = _text(
    "gemma4_unified_text",
    48,
    6,
    hidden_size=3840,
    intermediate_size=15360,
    num_global_key_value_heads=1,
    **K_IS_V,
)
A4B = _text(
    "gemma4_text",
    30,
    6,
    hidden_size=2816,
    intermediate_size=2112,
    num_global_key_value_heads=2,
    enable_moe_block=True,
    num_experts=128,
    top_k_experts=8,
    moe_intermediate_size=704,
    **K_IS_V,
)
B31 = _text(
    "gemma4_text",
    60,
    6,
    hidden_size=5376,
    intermediate_size=21504,
    num_global_key_value_heads=4,
    **(K_IS_V | {"num_attention_heads": 32, "num_key_value_heads": 16}),
)
TEXTS = {"E2B": E2B, "E4B": E4B, "12B": B12, "26B-A4B": A4B, "31B": B31}


def target(name: str) -> dict[str, Any]:
    """The whole `config.json` of a target, images and all."""
    kind = "gemma4_unified" if name == "12B" else "gemma4"
    return {"model_type": kind, "text_config": TEXTS[name], "vision_config": {}, "eos_token_id": [1, 106]}


def drafter(name: str) -> dict[str, Any]:
    """The `config.json` of the drafter of a target."""
    of = TEXTS[name]
    small = "num_global_key_value_heads" not in of
    text = _text(
        of["model_type"],
        4,
        4,
        hidden_size=256 if small else 1024,
        intermediate_size=2048 if small else 8192,
        num_attention_heads=4 if small else of["num_attention_heads"],
        num_key_value_heads=of["num_key_value_heads"],
        num_global_key_value_heads=of.get("num_global_key_value_heads"),
        attention_k_eq_v=of.get("attention_k_eq_v", False),
        num_kv_shared_layers=4,
        sliding_window=of["sliding_window"],
    )
    return {
        "model_type": "gemma4_unified_assistant" if name == "12B" else "gemma4_assistant",
        "text_config": text,
        "backbone_hidden_size": of["hidden_size"],
        "use_ordered_embeddings": small,
        "num_centroids": 2048,
        "centroid_intermediate_top_k": 32,
    }
