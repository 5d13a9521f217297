"""The shape of a new drafter, in the official form, and the weights it begins with.

Like official drafters it has three sliding layers and a full one, over the K/V of the target's last layer of each kind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paceline.checkpoint.names import DRAFT_TOKENS, EMBEDDING, Shapes, drafter_tensors
from paceline.config import DrafterConfig, Rope, TargetConfig
from paceline.errors import PairError
from paceline.train.optimizer import Parameters
from paceline.types import Float32, Int32

WIDE = 2560  # of a target's hidden size: up to there official drafters are 256 wide, and 1,024 beyond
ARCHITECTURES = {
    "gemma4_assistant": "Gemma4AssistantForCausalLM",
    "gemma4_unified_assistant": "Gemma4UnifiedAssistantForCausalLM",
}
SAMPLE = 32768  # rows of an embedding that its principal components are computed from

Rows = Callable[[Int32], Float32]
"""Rows [n, width] of a table by their numbers [n]."""


def sources(target: TargetConfig) -> tuple[int, int]:
    """The target's layers whose K/V a drafter reads: the last sliding and the last full one.

    Raises:
        PairError: it has layers of one kind only.
    """
    found = target.last_layer(sliding=True), target.last_layer(sliding=False)
    if found[0] is None or found[1] is None:
        kind = "sliding" if found[0] is None else "full"
        raise PairError(f"the target has no {kind}-attention layers, and a drafter reads the K/V of both kinds")
    return found[0], found[1]


def new_config(
    target: TargetConfig,
    hidden_size: int | None = None,
    intermediate_size: int | None = None,
    draft_vocabulary: int | None = None,
) -> DrafterConfig:
    """Settings of a new drafter for a target.

    Args:
        target: its settings.
        hidden_size: None for what official drafters of such targets have.
        intermediate_size: None for eight times that, as they have.
        draft_vocabulary: tokens of the head; None for all, which is the only form that other programs read.

    Raises:
        PairError: the target does not have layers of both kinds.
        CheckpointError: sizes that no drafter can have.
    """
    hidden = hidden_size or (256 if target.hidden_size <= WIDE else 1024)
    sliding, full = (
        replace(target.layers[index], intermediate_size=intermediate_size or 8 * hidden, kv_source=-1, has_v_proj=False)
        for index in sources(target)
    )
    unified = target.model_type.startswith("gemma4_unified")
    return DrafterConfig(
        vocab_size=target.vocab_size,
        hidden_size=hidden,
        heads=_heads(target, hidden),
        layers=(sliding, sliding, sliding, full),
        sliding_window=target.sliding_window,
        rms_eps=target.rms_eps,
        rope_sliding=target.rope(sliding),
        rope_full=target.rope(full),
        query_pre_attn_scalar=1.0,
        value_norm=True,
        layer_scalar=True,
        model_type="gemma4_unified_assistant" if unified else "gemma4_assistant",
        backbone_hidden_size=target.hidden_size,
        draft_vocab_size=draft_vocabulary or target.vocab_size,
        centroids=0,
        centroid_top_k=0,
    )


def official_json(config: DrafterConfig, target: TargetConfig) -> dict[str, Any]:
    """`config.json` of a drafter in the official spelling."""
    kinds = {layer.sliding: layer for layer in config.layers}
    sliding, full = kinds.get(True, config.layers[0]), kinds.get(False, config.layers[0])
    head: dict[str, Any] = {"use_ordered_embeddings": bool(config.centroids)}
    if config.centroids:
        head |= {"num_centroids": config.centroids, "centroid_intermediate_top_k": config.centroid_top_k}
    if config.restricted:
        head["draft_vocab_size"] = config.draft_vocab_size
    return {
        "architectures": [ARCHITECTURES[config.model_type]],
        "model_type": config.model_type,
        "dtype": "bfloat16",
        "backbone_hidden_size": config.backbone_hidden_size,
        **head,
        "tie_word_embeddings": True,
        "text_config": {
            "model_type": "gemma4_text",
            "dtype": "bfloat16",
            "vocab_size": config.vocab_size,
            "vocab_size_per_layer_input": 0,
            "hidden_size": config.hidden_size,
            "hidden_size_per_layer_input": 0,
            "intermediate_size": sliding.intermediate_size,
            "num_hidden_layers": len(config.layers),
            "layer_types": [f"{'sliding' if layer.sliding else 'full'}_attention" for layer in config.layers],
            "num_kv_shared_layers": len(config.layers),
            "use_double_wide_mlp": False,
            "num_attention_heads": config.heads,
            "num_key_value_heads": sliding.kv_heads,
            "head_dim": sliding.head_dim,
            "global_head_dim": full.head_dim,
            "attention_k_eq_v": full.kv_heads != sliding.kv_heads,
            "num_global_key_value_heads": full.kv_heads,
            "attention_bias": False,
            "enable_moe_block": False,
            "hidden_activation": "gelu_pytorch_tanh",
            "sliding_window": config.sliding_window,
            "max_position_embeddings": target.max_positions,
            "rms_norm_eps": config.rms_eps,
            "rope_parameters": {
                "sliding_attention": _rope_json(config.rope_sliding),
                "full_attention": _rope_json(config.rope_full),
            },
            "tie_word_embeddings": True,
        },
    }


def _heads(target: TargetConfig, hidden: int) -> int:
    """As many as the target has, but no more than four in a narrow drafter, if the target's K/V heads allow it."""
    most = max(layer.kv_heads for layer in target.layers)
    return max(4, most) if hidden <= 256 and max(4, most) % most == 0 else target.heads


def _rope_json(rope: Rope) -> dict[str, Any]:
    if rope.scaling != 1:
        return {"rope_type": "linear", "rope_theta": rope.theta, "factor": rope.scaling}
    if rope.rotary_factor != 1:
        return {"rope_type": "proportional", "rope_theta": rope.theta, "partial_rotary_factor": rope.rotary_factor}
    return {"rope_type": "default", "rope_theta": rope.theta}


def first_weights(shapes: Shapes, seed: int) -> Parameters:
    """First weights in float32: embeddings and attention scores of about unit variance, small residual branches."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        if len(shape) == 2:
            weights[name] = torch.randn(shape, generator=generator) * shape[1] ** -0.5
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            weights[name] = torch.full(shape, 1.5 * shape[0] ** -0.25)
        else:
            weights[name] = torch.full(shape, 0.4 if ".post_" in name else 1.0)
    return weights


def new_drafter(
    config: DrafterConfig, table: Rows, query_norms: dict[bool, Tensor], tokens: Int32 | None, seed: int
) -> Parameters:
    """First weights of a new drafter in float32.

    Args:
        config: its settings.
        table: the target's embedding, whose principal components are the first head.
        query_norms: by `sliding`, what the target's own queries over the same keys are multiplied with [head_dim].
        tokens: [draft_vocab_size] of the head; None for all.
        seed: of what is random.
    """
    shapes = {name: shape for name, shape in drafter_tensors(config).items() if name != DRAFT_TOKENS}
    weights = first_weights(shapes, seed)
    for index, layer in enumerate(config.layers):
        weights[f"layers.{index}.self_attn.q_norm.weight"] = query_norms[layer.sliding].clone()
    head = np.arange(config.vocab_size, dtype=np.int32) if tokens is None else tokens
    weights[EMBEDDING] = principal_components(table, head, config.hidden_size, seed)
    if tokens is not None:
        weights[DRAFT_TOKENS] = torch.from_numpy(tokens)
    return weights


def principal_components(table: Rows, tokens: Int32, size: int, seed: int) -> Tensor:
    """The largest of the rows of tokens [n], of norms of about one: [n, size]; noise where rows are less wide."""
    sample = torch.from_numpy(table(np.random.default_rng(seed).permutation(tokens)[:SAMPLE]))
    _, directions = torch.linalg.eigh(sample.T @ sample)  # ascending
    best = directions.flip(1)[:, :size]
    out = torch.cat(
        [torch.from_numpy(table(part)) @ best for part in np.array_split(tokens, -(-len(tokens) // SAMPLE))]
    )
    out /= out.norm(dim=-1).mean().clamp(min=1e-9)
    lacking = size - out.shape[1]
    if lacking > 0:
        noise = torch.randn((len(out), lacking), generator=torch.Generator().manual_seed(seed))
        out = torch.cat((out, 0.1 * size**-0.5 * noise), dim=1)
    return out
