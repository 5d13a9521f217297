"""The text part of a Gemma 4 or Gemma 3 target, in execution order.

Functions over M rows of any sequences, written once for training, parity tests and the PyTorch backend. Three things
are arguments: the weights (`load_target` collects them by canonical name), the operations (`models.ops`, or the
operators of `backends.torch.ops`), and the KV cache with the places of the rows in it (`KeysValues`). H is the hidden
size. Nothing here looks at the contents of a tensor, so that a pass can be recorded as a CUDA graph.

Source of the architecture: the implementations in transformers 5.17.0, which parity tests compare with.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Protocol, Self

import torch
from torch import Tensor

from paceline.checkpoint.names import EMBEDDING, PLE_TABLE
from paceline.config import Layer, Stack, TargetConfig
from paceline.models.matrix import Matrix
from paceline.quant.bf16 import embedding_factor

WHOLE = 1 << 30  # the window of full-attention layers
Angles = dict[bool, tuple[Tensor, Tensor]]  # cos and sin [M, head_dim / 2] by `sliding`


class TensorSource(Protocol):
    """A model's weights by canonical name; see `checkpoint.names`."""

    @property
    def dtype(self) -> torch.dtype:
        """Of activations, and of K/V."""

    def matrix(self, *names: str, precise: bool = False) -> Matrix:
        """The matrices of these names, one below the other, experts' too; `precise` ones are plain."""

    def table(self, name: str) -> Matrix:
        """A matrix that single rows are read of; nothing of it is rounded to a grid."""

    def in_bf16(self, name: str) -> bool:
        """Whether the checkpoint holds a tensor in bf16."""

    def vector(self, name: str) -> Tensor:
        """A tensor that is no matrix: in float32, or of whole numbers. Norms are the values to multiply by."""


class KeysValues(Protocol):
    """Keys and values of every layer, and the places of a pass's M rows in them."""

    @property
    def last(self) -> Tensor:
        """[M] the last position that each row sees; below 0 for padding, whose results are void."""

    def heads(self, block: Block, x: Tensor, angles: tuple[Tensor, Tensor], heads: int, eps: float) -> Tensor:
        """Norm and rotate the heads in x, see `ops.split_heads`; keep keys and values: queries [M, n * head_dim]."""

    def attend(self, block: Block, queries: Tensor, window: int) -> Tensor:
        """Attention of each row over `window` positions up to its last one: [M, n * head_dim] both ways."""

    def picked(self, numbers: Tensor) -> Self:
        """Some of the rows; padding where a number is below 0."""


@dataclass(frozen=True)
class PerLayer:
    """A layer's part in per-layer embeddings."""

    gate: Matrix
    projection: Matrix
    norm: Tensor


@dataclass(frozen=True)
class MoE:
    """A layer's experts and what chooses them."""

    router_norm: Tensor  # [H], the router's scale, in float32
    router: Matrix
    expert_scale: Tensor  # [experts]
    active: int  # experts of a row
    dense_norm: Tensor
    norm: Tensor
    routed_norm: Tensor
    gate_up: Matrix  # [experts * 2 * I, H]
    down: Matrix  # [experts * H, I]


@dataclass(frozen=True)
class Block:
    """A decoder layer. Norms are [H], those of heads [head_dim], in float32: 1 + w of Gemma 3 must not be rounded."""

    layer: Layer
    kv_source: int  # the target's layer whose keys and values it attends to
    input_norm: Tensor
    qkv: Matrix  # queries alone where it has no K/V of its own; no values where they are the keys
    query_norm: Tensor  # times the scale of attention scores
    key_norm: Tensor | None  # None: it has no K/V of its own
    value_norm: bool  # values are normed
    out: Matrix
    attention_norm: Tensor  # after attention
    feedforward_norm: Tensor  # before the MLP
    gate_up: Matrix
    down: Matrix
    branch_norm: Tensor  # after the MLP
    scale: Tensor | None  # [1]
    moe: MoE | None = None
    ple: PerLayer | None = None


@dataclass(frozen=True)
class Decoder:
    """The decoder layers of a target or of a drafter."""

    config: Stack
    blocks: tuple[Block, ...]
    norm: Tensor
    frequencies: dict[bool, Tensor]  # [head_dim / 2] by `sliding`
    dtype: torch.dtype  # of activations


@dataclass(frozen=True)
class Target:
    """A whole target."""

    config: TargetConfig
    embedding: Matrix
    embedding_factor: float
    head: Matrix  # the embedding, where it is tied
    decoder: Decoder
    ple_table: Matrix | None = None
    ple_factor: float = 0.0
    ple_projection: Matrix | None = None
    ple_norm: Tensor | None = None


def run(target: Target, ops: ModuleType, tokens: Tensor, kv: KeysValues, keep: Tensor | None = None) -> Tensor:
    """Run rows, and add their keys and values to the cache.

    Args:
        target: weights.
        ops: operations.
        tokens: [M].
        kv: cache and places of the rows.
        keep: [W] numbers of the rows whose states are needed, below 0 for padding; None for all.

    Returns:
        States [W, H] after the final norm: input of the LM head and of the drafter.
    """
    x = embed(target, tokens)  # [M, H]
    per_layer = per_layer_inputs(target, ops, tokens, x)  # [M, layers, ple]
    return run_decoder(target.decoder, ops, x, kv, angles_of(target.decoder, kv.last, x.dtype), per_layer, keep)


def logits(target: Target, ops: ModuleType, states: Tensor) -> Tensor:
    """[W, H] -> [W, vocabulary], float32, after the soft cap."""
    out: Tensor = ops.scores(states, *target.head, target.config.softcap or 0.0)
    return out


def embed(target: Target, tokens: Tensor) -> Tensor:
    """[M] -> [M, H]"""
    rows = target.embedding.rows(tokens, target.config.hidden_size)
    return (rows * target.embedding_factor).to(target.decoder.dtype)


def per_layer_inputs(target: Target, ops: ModuleType, tokens: Tensor, x: Tensor) -> Tensor | None:
    """Per-layer embeddings: what the token is (a table) plus what its embedding says: [M, layers, ple]."""
    config = target.config
    if target.ple_table is None or target.ple_projection is None:
        return None
    shape = len(tokens), len(config.layers), config.ple_size
    rows = target.ple_table.rows(tokens, shape[1] * shape[2])
    table = (rows * target.ple_factor).to(x.dtype).view(shape)
    context = (ops.matmul(x, *target.ple_projection) * config.hidden_size**-0.5).view(-1, config.ple_size)
    context = ops.norm(context, target.ple_norm, config.rms_eps).view(shape)
    both: Tensor = (context + table) * 2.0**-0.5
    return both


def run_decoder(
    decoder: Decoder,
    ops: ModuleType,
    x: Tensor,
    kv: KeysValues,
    angles: Angles,
    per_layer: Tensor | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """x [M, H] through all layers and the final norm: [W, H]; see `run`."""
    config, blocks, eps = decoder.config, decoder.blocks, decoder.config.rms_eps
    last_kv = max([-1, *(index for index, block in enumerate(blocks) if block.key_norm is not None)])
    h = ops.norm(x, blocks[0].input_norm, eps)  # [M, H]
    for index, block in enumerate(blocks):
        sliding = block.layer.sliding
        queries = kv.heads(block, ops.matmul(h, *block.qkv), angles[sliding], config.heads, eps)
        if index == last_kv and keep is not None:  # from here on, only the rows that are kept matter
            if not len(keep):
                return x[:0]
            rows, kv = keep.clamp(min=0), kv.picked(keep)
            x, queries = x[rows], queries[rows]
            per_layer = per_layer[rows] if per_layer is not None else None
            angles = {sliding: (cos[rows], sin[rows]) for sliding, (cos, sin) in angles.items()}
        mixed = kv.attend(block, queries, config.sliding_window if sliding else WHOLE)  # [M, heads * head_dim]
        x, h = ops.join(x, ops.matmul(mixed, *block.out), block.attention_norm, block.feedforward_norm, None, eps)
        branch = feed_forward(block, ops, x, h, kv.last, eps)
        next_norm = blocks[index + 1].input_norm if index + 1 < len(blocks) else decoder.norm
        if block.ple is None or per_layer is None:
            x, h = ops.join(x, branch, block.branch_norm, next_norm, block.scale, eps)
            continue
        x, _ = ops.join(x, branch, block.branch_norm, None, None, eps)
        gated = ops.gated(ops.matmul(x, *block.ple.gate), per_layer[:, index])  # [M, ple]
        x, h = ops.join(x, ops.matmul(gated, *block.ple.projection), block.ple.norm, next_norm, block.scale, eps)
    out: Tensor = h
    return out


def feed_forward(block: Block, ops: ModuleType, x: Tensor, h: Tensor, last: Tensor, eps: float) -> Tensor:
    """The MLP of h, the norm of x, with experts beside it in MoE models: [M, H] each."""
    dense: Tensor = ops.matmul(ops.gate_up(h, *block.gate_up), *block.down)
    moe = block.moe
    if moe is None:
        return dense
    scores = ops.scores(ops.norm(x, moe.router_norm, eps), *moe.router, 0.0)  # [M, experts]
    weights, chosen = ops.choose(scores, moe.expert_scale, moe.active)
    chosen = torch.where(last[:, None] < 0, chosen[:1], chosen)  # padding runs no experts that no row needs
    count = moe.router.outputs
    routed = ops.experts(ops.norm(x, moe.norm, eps), weights, chosen, *moe.gate_up, *moe.down, count)
    both: Tensor = ops.norm(dense, moe.dense_norm, eps) + ops.norm(routed, moe.routed_norm, eps)
    return both


def angles_of(decoder: Decoder, positions: Tensor, dtype: torch.dtype) -> Angles:
    """cos and sin of positions [M]."""
    places = positions.clamp(min=0)[:, None].float()
    angles = {sliding: places * table for sliding, table in decoder.frequencies.items()}
    return {sliding: (angle.cos().to(dtype), angle.sin().to(dtype)) for sliding, angle in angles.items()}


def load_target(config: TargetConfig, w: TensorSource) -> Target:
    """Collect a target's weights."""
    blocks = tuple(load_block(config, index, layer.kv_source, w) for index, layer in enumerate(config.layers))
    ple = bool(config.ple_size)
    embedding = w.matrix(EMBEDDING)
    return Target(
        config=config,
        embedding=embedding,
        embedding_factor=embedding_factor(config.hidden_size, w.in_bf16(EMBEDDING)),
        head=embedding if config.tied_head else w.matrix("lm_head.weight"),
        decoder=load_decoder(config, blocks, w),
        ple_table=w.table(PLE_TABLE) if ple else None,
        ple_factor=embedding_factor(config.ple_size, w.in_bf16(PLE_TABLE)) if ple else 0.0,
        ple_projection=w.matrix("per_layer_model_projection.weight") if ple else None,
        ple_norm=w.vector("per_layer_projection_norm.weight") if ple else None,
    )


def load_decoder(config: Stack, blocks: tuple[Block, ...], w: TensorSource) -> Decoder:
    """Decoder layers with the final norm and the inverse frequencies of RoPE.

    They are theta^(-2 i / head_dim) / scaling, or 0 for pairs that do not rotate.
    """
    norm, frequencies = w.vector("norm.weight"), {}
    for layer in {layer.sliding: layer for layer in config.layers}.values():
        rope = config.rope(layer)
        pairs = rope.rotating_pairs(layer.head_dim)
        table = torch.zeros(layer.head_dim // 2)
        table[:pairs] = 1.0 / rope.theta ** (torch.arange(0, 2 * pairs, 2).float() / layer.head_dim) / rope.scaling
        frequencies[layer.sliding] = table.to(norm.device)
    return Decoder(config, blocks, norm, frequencies, w.dtype)


def load_block(config: Stack, index: int, kv_source: int, w: TensorSource) -> Block:
    """Collect the weights of one layer."""
    layer, at = config.layers[index], f"layers.{index}."
    owns_kv = layer.kv_source == index
    projections = ["q_proj", *(["k_proj"] if owns_kv else []), *(["v_proj"] if owns_kv and layer.has_v_proj else [])]
    return Block(
        layer=layer,
        kv_source=kv_source,
        input_norm=w.vector(at + "input_layernorm.weight"),
        qkv=w.matrix(*(f"{at}self_attn.{name}.weight" for name in projections)),
        query_norm=w.vector(at + "self_attn.q_norm.weight") * config.attention_scale,
        key_norm=w.vector(at + "self_attn.k_norm.weight") if owns_kv else None,
        value_norm=config.value_norm,
        out=w.matrix(at + "self_attn.o_proj.weight"),
        attention_norm=w.vector(at + "post_attention_layernorm.weight"),
        feedforward_norm=w.vector(at + "pre_feedforward_layernorm.weight"),
        gate_up=w.matrix(at + "mlp.gate_proj.weight", at + "mlp.up_proj.weight"),
        down=w.matrix(at + "mlp.down_proj.weight"),
        branch_norm=w.vector(at + "post_feedforward_layernorm.weight"),
        scale=w.vector(at + "layer_scalar").to(w.dtype) if config.layer_scalar else None,
        moe=_load_moe(config, at, w) if isinstance(config, TargetConfig) and config.experts else None,
        ple=PerLayer(
            gate=w.matrix(at + "per_layer_input_gate.weight"),
            projection=w.matrix(at + "per_layer_projection.weight"),
            norm=w.vector(at + "post_per_layer_input_norm.weight"),
        )
        if isinstance(config, TargetConfig) and config.ple_size
        else None,
    )


def _load_moe(config: TargetConfig, at: str, w: TensorSource) -> MoE:
    assert config.experts is not None
    return MoE(
        router_norm=w.vector(at + "router.scale") * config.hidden_size**-0.5,
        router=w.matrix(at + "router.proj.weight", precise=True),
        expert_scale=w.vector(at + "router.per_expert_scale"),
        active=config.experts.active,
        dense_norm=w.vector(at + "post_feedforward_layernorm_1.weight"),
        norm=w.vector(at + "pre_feedforward_layernorm_2.weight"),
        routed_norm=w.vector(at + "post_feedforward_layernorm_2.weight"),
        gate_up=w.matrix(at + "experts.gate_up_proj"),
        down=w.matrix(at + "experts.down_proj"),
    )
