"""What a target and a drafter are made of on a device: matrices that are read together stand together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from paceline.backends.torch.matrix import Matrix
from paceline.config import DrafterConfig, Layer, Stack, TargetConfig


class Source(Protocol):
    """Gives a model's weights by their canonical names (see `checkpoint.names`), on a device and in a format."""

    @property
    def device(self) -> torch.device: ...

    def matrix(self, *names: str) -> Matrix:
        """The matrices of these names as one; experts' stand one below the other."""

    def plain(self, name: str) -> Matrix:
        """A matrix that is never quantised."""

    def vector(self, name: str) -> Tensor: ...

    def number(self, name: str) -> float: ...

    def ordered_head(self, centroids: int) -> tuple[Matrix, Tensor]:
        """A drafter's plain head in the order of its centroids, and the tokens [centroids, tokens of each]."""


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
    active: int  # experts a row
    dense_norm: Tensor
    norm: Tensor
    routed_norm: Tensor
    gate_up: Matrix  # [experts * 2 * I, H]
    down: Matrix  # [experts * H, I]


@dataclass(frozen=True)
class Block:
    """A decoder layer. Norms are [H] but for those of heads, [head_dim]."""

    settings: Layer
    owns_kv: bool
    qkv: Matrix  # queries alone where the layer has no K/V of its own; no values where they are the keys
    query_norm: Tensor
    key_norm: Tensor | None
    out: Matrix
    gate_up: Matrix
    down: Matrix
    input_norm: Tensor
    attention_norm: Tensor  # behind attention
    feedforward_norm: Tensor  # before the MLP
    branch_norm: Tensor  # behind the MLP
    scale: float
    ple: PerLayer | None = None
    moe: MoE | None = None


@dataclass(frozen=True)
class TargetLayers:
    """A whole target."""

    config: TargetConfig
    embedding: Matrix  # and LM head
    blocks: tuple[Block, ...]
    norm: Tensor
    frequencies: dict[bool, Tensor]  # by `sliding`
    ple_table: Matrix | None = None
    ple_projection: Matrix | None = None
    ple_norm: Tensor | None = None


@dataclass(frozen=True)
class DrafterLayers:
    """A whole drafter. With centroids the head's rows are in the order of `tokens`."""

    config: DrafterConfig
    before: Matrix  # 2 * backbone -> hidden
    after: Matrix  # hidden -> backbone
    blocks: tuple[Block, ...]
    norm: Tensor
    frequencies: dict[bool, Tensor]
    head: Matrix
    centroids: Matrix | None = None
    tokens: Tensor | None = None  # [centroids, tokens of each]


def nbytes(part: object) -> int:
    """Bytes of all tensors in a structure of these."""
    if isinstance(part, Tensor | Matrix):
        return part.nbytes
    if isinstance(part, tuple):
        return sum(map(nbytes, part))
    return sum(map(nbytes, vars(part).values())) if isinstance(part, TargetLayers | Block | PerLayer | MoE) else 0


def place_target(config: TargetConfig, w: Source) -> TargetLayers:
    """Put a target's weights onto a device; its router and per-layer table keep their precision."""
    layers = TargetLayers(
        config=config,
        embedding=w.matrix("embed_tokens.weight"),
        blocks=tuple(_block(config, index, w) for index in range(len(config.layers))),
        norm=w.vector("norm.weight"),
        frequencies=_frequencies(config, w.device),
    )
    if not config.ple_size:
        return layers
    return replace(
        layers,
        ple_table=w.plain("embed_tokens_per_layer.weight"),
        ple_projection=w.matrix("per_layer_model_projection.weight"),
        ple_norm=w.vector("per_layer_projection_norm.weight"),
    )


def place_drafter(config: DrafterConfig, w: Source) -> DrafterLayers:
    """Put a drafter's weights onto a device. Of a head with centroids little is read: it keeps its precision."""
    centroids = tokens = None
    if config.centroids:
        centroids = w.plain("masked_embedding.centroids.weight")
        head, tokens = w.ordered_head(config.centroids)
    else:
        head = w.matrix("embed_tokens.weight")
    return DrafterLayers(
        config=config,
        before=w.matrix("pre_projection.weight"),
        after=w.matrix("post_projection.weight"),
        blocks=tuple(_block(config, index, w) for index in range(len(config.layers))),
        norm=w.vector("norm.weight"),
        frequencies=_frequencies(config, w.device),
        head=head,
        centroids=centroids,
        tokens=tokens,
    )


def _block(config: Stack, index: int, w: Source) -> Block:
    layer, prefix = config.layers[index], f"layers.{index}."
    attention = prefix + "self_attn."
    owns_kv = isinstance(config, TargetConfig) and layer.kv_source == index
    projections = ["q_proj", *(["k_proj"] if owns_kv else []), *(["v_proj"] if owns_kv and layer.has_v_proj else [])]
    ple = moe = None
    if isinstance(config, TargetConfig) and config.ple_size:
        ple = PerLayer(
            gate=w.matrix(prefix + "per_layer_input_gate.weight"),
            projection=w.matrix(prefix + "per_layer_projection.weight"),
            norm=w.vector(prefix + "post_per_layer_input_norm.weight"),
        )
    if isinstance(config, TargetConfig) and config.experts:
        moe = _moe(config, prefix, w)
    return Block(
        settings=layer,
        owns_kv=owns_kv,
        qkv=w.matrix(*(f"{attention}{name}.weight" for name in projections)),
        query_norm=w.vector(attention + "q_norm.weight"),
        key_norm=w.vector(attention + "k_norm.weight") if owns_kv else None,
        out=w.matrix(attention + "o_proj.weight"),
        gate_up=w.matrix(prefix + "mlp.gate_proj.weight", prefix + "mlp.up_proj.weight"),
        down=w.matrix(prefix + "mlp.down_proj.weight"),
        input_norm=w.vector(prefix + "input_layernorm.weight"),
        attention_norm=w.vector(prefix + "post_attention_layernorm.weight"),
        feedforward_norm=w.vector(prefix + "pre_feedforward_layernorm.weight"),
        branch_norm=w.vector(prefix + "post_feedforward_layernorm.weight"),
        scale=w.number(prefix + "layer_scalar"),
        ple=ple,
        moe=moe,
    )


def _moe(config: TargetConfig, prefix: str, w: Source) -> MoE:
    assert config.experts is not None
    return MoE(
        router_norm=w.vector(prefix + "router.scale").float() * config.hidden_size**-0.5,
        router=w.plain(prefix + "router.proj.weight"),
        expert_scale=w.vector(prefix + "router.per_expert_scale"),
        active=config.experts.active,
        dense_norm=w.vector(prefix + "post_feedforward_layernorm_1.weight"),
        norm=w.vector(prefix + "pre_feedforward_layernorm_2.weight"),
        routed_norm=w.vector(prefix + "post_feedforward_layernorm_2.weight"),
        gate_up=w.matrix(prefix + "experts.gate_up_proj"),
        down=w.matrix(prefix + "experts.down_proj"),
    )


def _frequencies(config: Stack, device: torch.device) -> dict[bool, Tensor]:
    """Inverse frequencies [head_dim / 2] of sliding and full layers: theta^(-2 i / head_dim), 0 for fixed pairs."""
    tables = {}
    for layer in {layer.sliding: layer for layer in config.layers}.values():
        rope = config.rope(layer)
        pairs = rope.rotating_pairs(layer.head_dim)
        table = torch.zeros(layer.head_dim // 2)
        table[:pairs] = 1.0 / rope.theta ** (torch.arange(0, 2 * pairs, 2).float() / layer.head_dim)
        tables[layer.sliding] = table.to(device)
    return tables
