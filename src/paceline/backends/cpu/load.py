"""From named weights to the native structures of a target or a drafter. Knows tensor names, no files, no arithmetic."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from paceline import _cpu
from paceline.backends.cpu.weights import Weights
from paceline.config import DrafterConfig, Layer, Rope, Stack, TargetConfig
from paceline.errors import BackendError
from paceline.quant.blocks import from_bf16, to_bf16

LANES = 16  # vectors are whole native registers


def load_target(config: TargetConfig, weights: Weights) -> _cpu.TargetWeights:
    """Pack a whole target.

    Raises:
        BackendError: a width that the native kernels do not take.
    """
    _check_widths(config, config.ple_size)
    w = _cpu.TargetWeights()
    w.vocab, w.hidden, w.heads, w.eps = config.vocab_size, config.hidden_size, config.heads, config.rms_eps
    w.window, w.softcap = config.sliding_window, config.softcap or 0.0
    w.rope_sliding, w.rope_full = (_frequencies(config, sliding) for sliding in (True, False))
    w.embedding = weights.matrix("embed_tokens.weight")
    w.embed_scale = _scale(weights, "embed_tokens.weight", config.hidden_size)
    w.final_norm = weights.vector("norm.weight")
    if config.ple_size:
        w.ple_size = config.ple_size
        w.ple_scale = _scale(weights, "embed_tokens_per_layer.weight", config.ple_size)
        w.set_ple_table(weights.table("embed_tokens_per_layer.weight"))
        w.ple_projection = weights.matrix("per_layer_model_projection.weight")
        w.ple_norm = weights.vector("per_layer_projection_norm.weight")
    w.layers = [_target_layer(config, index, weights) for index in range(len(config.layers))]
    return w


def load_drafter(config: DrafterConfig, weights: Weights) -> _cpu.DrafterWeights:
    """Pack a whole drafter. Its head is put in the order of the centroids' token lists.

    Raises:
        BackendError: a width that the native kernels do not take.
    """
    _check_widths(config, config.backbone_hidden_size)
    w = _cpu.DrafterWeights()
    w.vocab, w.hidden, w.heads, w.eps = config.vocab_size, config.hidden_size, config.heads, config.rms_eps
    w.backbone = config.backbone_hidden_size
    w.pre_projection = weights.matrix("pre_projection.weight")
    w.post_projection = weights.matrix("post_projection.weight")
    w.final_norm = weights.vector("norm.weight")
    w.layers = [_layer(layer, f"layers.{index}.", weights) for index, layer in enumerate(config.layers)]
    if config.centroids:
        w.centroids = weights.matrix("masked_embedding.centroids.weight")
        w.centroid_top_k = config.centroid_top_k
        w.head, w.tokens = weights.ordered_head()
    else:
        w.head = weights.matrix("embed_tokens.weight")
    return w


def _target_layer(config: TargetConfig, index: int, weights: Weights) -> _cpu.Layer:
    layer, prefix = config.layers[index], f"layers.{index}."
    native = _layer(layer, prefix, weights)
    if layer.kv_source == index:
        native.k = weights.matrix(prefix + "self_attn.k_proj.weight")
        native.k_norm = weights.vector(prefix + "self_attn.k_norm.weight")
        if layer.has_v_proj:
            native.v = weights.matrix(prefix + "self_attn.v_proj.weight")
    if config.ple_size:
        native.ple_gate = weights.matrix(prefix + "per_layer_input_gate.weight")
        native.ple_projection = weights.matrix(prefix + "per_layer_projection.weight")
        native.ple_norm = weights.vector(prefix + "post_per_layer_input_norm.weight")
    if config.experts:
        native.experts = _experts(config, prefix, weights)
    return native


def _layer(layer: Layer, prefix: str, weights: Weights) -> _cpu.Layer:
    """What layers of targets and drafters have in common."""
    native = _cpu.Layer()
    native.sliding, native.head_dim, native.kv_heads = layer.sliding, layer.head_dim, layer.kv_heads
    native.kv_source = layer.kv_source
    native.scalar = float(weights.vector(prefix + "layer_scalar")[0])
    native.input_norm = weights.vector(prefix + "input_layernorm.weight")
    native.post_attention_norm = weights.vector(prefix + "post_attention_layernorm.weight")
    native.pre_feedforward_norm = weights.vector(prefix + "pre_feedforward_layernorm.weight")
    native.post_feedforward_norm = weights.vector(prefix + "post_feedforward_layernorm.weight")
    native.q_norm = weights.vector(prefix + "self_attn.q_norm.weight")
    native.q = weights.matrix(prefix + "self_attn.q_proj.weight")
    native.o = weights.matrix(prefix + "self_attn.o_proj.weight")
    native.gate = weights.matrix(prefix + "mlp.gate_proj.weight")
    native.up = weights.matrix(prefix + "mlp.up_proj.weight")
    native.down = weights.matrix(prefix + "mlp.down_proj.weight")
    return native


def _experts(config: TargetConfig, prefix: str, weights: Weights) -> _cpu.Experts:
    assert config.experts is not None
    native = _cpu.Experts()
    native.active = config.experts.active
    # The router decides which weights run: it keeps its precision.
    native.router = weights.matrix(prefix + "router.proj.weight", "f32" if weights.quant == "f32" else "bf16")
    native.router_norm = weights.vector(prefix + "router.scale") * np.float32(config.hidden_size**-0.5)
    native.per_expert_scale = weights.vector(prefix + "router.per_expert_scale")
    native.post_norm_dense = weights.vector(prefix + "post_feedforward_layernorm_1.weight")
    native.pre_norm = weights.vector(prefix + "pre_feedforward_layernorm_2.weight")
    native.post_norm = weights.vector(prefix + "post_feedforward_layernorm_2.weight")
    native.gate = weights.experts(prefix + "experts.gate_up_proj", "first")
    native.up = weights.experts(prefix + "experts.gate_up_proj", "second")
    native.down = weights.experts(prefix + "experts.down_proj", "whole")
    return native


def _scale(weights: Weights, name: str, size: int) -> float:
    """An embedding's factor, sqrt(size), rounded as the reference rounds it: to the table's own type."""
    exact = np.array([size**0.5], np.float32)
    return float((from_bf16(to_bf16(exact)) if weights.in_bf16(name) else exact)[0])


def _frequencies(config: Stack, sliding: bool) -> NDArray[np.float32]:
    """Inverse frequencies of the rotating pairs, theta^(-2 i / head_dim), in float32 as the reference computes them."""
    layer = next((layer for layer in config.layers if layer.sliding == sliding), None)
    if layer is None:
        return np.zeros(0, np.float32)
    rope: Rope = config.rope(layer)
    exponents = np.arange(0, 2 * rope.rotating_pairs(layer.head_dim), 2, dtype=np.float32) / np.float32(layer.head_dim)
    return np.asarray(1.0 / np.power(np.float32(rope.theta), exponents), np.float32)


def _check_widths(config: Stack, other: int) -> None:
    widths = [config.hidden_size, other, *(layer.head_dim for layer in config.layers)]
    odd = next((width for width in widths if width % LANES), None)
    if odd is not None:
        raise BackendError(f"the CPU backend takes widths that are multiples of {LANES}, and this model has {odd}")
