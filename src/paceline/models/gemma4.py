"""The readable truth: the text part of a Gemma 4 target, in execution order.

Written to be read next to a checkpoint: attribute names are the checkpoint's tensor names, shapes stand beside the
tensors, every fast backend is compared with this file. B is a batch of sequences that stand at the same length, T the
rows run in this pass, S the rows visible to them (cache and this pass), H the hidden size. It knows nothing of
files, slots, sampling or drafters.

Source of the architecture: the Gemma 4 implementation in transformers 5.17.0, which parity tests compare with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paceline.config import Experts, Layer, Rope, Stack, TargetConfig
from paceline.errors import CheckpointError

KeysValues = tuple[Tensor, Tensor]  # each [B, kv_heads, S, head_dim]; keys normed and rotated, values normed
Rotation = tuple[Tensor, Tensor]  # cos and sin, each [B or 1, T, head_dim]
PREFIXES = ("model.language_model.", "model.")
SKIPPED = ("vision_tower.", "embed_vision.", "audio_tower.", "embed_audio.", "vision_embedder.")


@dataclass
class Cache:
    """Keys and values of every layer that has its own, for B sequences of one length; rollback is a shorter length.

    Sliding layers keep all rows too: the mask, not the cache, forgets.
    """

    capacity: int
    length: int = 0
    rows: dict[int, KeysValues] = field(default_factory=dict)  # per layer [B, kv_heads, capacity, head_dim]

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> KeysValues:
        """Write T rows of one layer behind the first `length` and return all rows so far."""
        end = self.length + keys.shape[2]
        if end > self.capacity:
            raise ValueError(f"{end} rows do not fit a cache of {self.capacity}")
        if layer not in self.rows:
            empty = keys.new_zeros(*keys.shape[:2], self.capacity, keys.shape[3])
            self.rows[layer] = (empty, empty.clone())
        for kept, new in zip(self.rows[layer], (keys, values), strict=True):
            kept[:, :, self.length : end] = new
        return self.visible(layer, 0, end)

    def visible(self, layer: int, start: int, end: int) -> KeysValues:
        keys, values = self.rows[layer]
        return keys[:, :, start:end], values[:, :, start:end]

    def truncate(self, length: int) -> None:
        """Forget all rows from `length` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate {self.length} rows to {length}")
        self.length = length


@dataclass(frozen=True)
class Pass:
    """What one pass through the decoder layers gives."""

    hidden: Tensor  # [B, T, H] after the final norm: input of the LM head and of the drafter
    keys_values: dict[int, KeysValues]  # of every layer with K/V of its own, all rows so far


class Gemma4(nn.Module):
    """A Gemma 4 target: `forward` runs rows, `logits` applies the tied LM head to the rows that are wanted."""

    def __init__(self, config: TargetConfig) -> None:
        super().__init__()
        self.config = config
        width = len(config.layers) * config.ple_size
        self.embed_tokens = ScaledEmbedding(config.vocab_size, config.hidden_size)
        if config.ple_size:
            self.embed_tokens_per_layer = ScaledEmbedding(config.ple_vocab_size, width, config.ple_size)
            self.per_layer_model_projection = nn.Linear(config.hidden_size, width, bias=False)
            self.per_layer_projection_norm = RMSNorm(config.ple_size, config.rms_eps)
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer, layer.kv_source == index, config.ple_size, config.experts)
            for index, layer in enumerate(config.layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_eps)

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Pass:
        """Run `tokens` [B, T] behind the rows in `cache` (from position 0 without one) and append their K/V to it."""
        config = self.config
        start = cache.length if cache else 0
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)  # [T]
        x = self.embed_tokens(tokens)  # [B, T, H]
        per_layer = self.per_layer_inputs(tokens, x)  # [B, T, layers, ple]
        masks = {sliding: self.mask(start, tokens.shape[1], sliding=sliding) for sliding in (True, False)}
        keys_values: dict[int, KeysValues] = {}
        rotations: dict[tuple[Rope, int], Rotation] = {}
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            settings = config.layers[index]
            rope = (config.rope(settings), settings.head_dim)
            if rope not in rotations:
                rotations[rope] = rotation(*rope, positions[None], x.dtype)
            rotate = rotations[rope]
            normed = layer.input_layernorm(x)  # [B, T, H]
            if settings.kv_source == index:
                own = layer.self_attn.keys_values(normed, rotate)  # [B, kv_heads, T, head_dim]
                keys_values[index] = cache.extend(index, *own) if cache else own  # [B, kv_heads, S, head_dim]
            visible = keys_values[settings.kv_source]
            ple = per_layer[:, :, index] if per_layer is not None else None
            x = layer(x, normed, rotate, visible, masks[settings.sliding], ple)
        if cache:
            cache.length += tokens.shape[1]
        return Pass(self.norm(x), keys_values)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., vocabulary], after the soft cap."""
        logits = F.linear(hidden, self.embed_tokens.weight)
        cap = self.config.softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def mask(self, start: int, rows: int, *, sliding: bool) -> Tensor:
        """Which of the rows 0..S-1 the rows from `start` on see: [T, S]. Sliding layers see the last
        `sliding_window` rows, the row itself included."""
        device = self.norm.weight.device
        visible = torch.arange(start + rows, device=device)  # [S]
        distance = visible[start:, None] - visible[None]
        seen = distance >= 0
        return seen & (distance < self.config.sliding_window) if sliding else seen

    def per_layer_inputs(self, tokens: Tensor, x: Tensor) -> Tensor | None:
        """Per-layer embeddings: what the token is (a table) plus what its embedding says: [B, T, layers, ple]."""
        if not self.config.ple_size:
            return None
        shape = (*tokens.shape, len(self.config.layers), self.config.ple_size)
        table: Tensor = self.embed_tokens_per_layer(tokens).view(shape)
        context: Tensor = self.per_layer_model_projection(x) * self.config.hidden_size**-0.5
        context = self.per_layer_projection_norm(context.view(shape))
        both: Tensor = (context + table) * 2.0**-0.5
        return both


class ScaledEmbedding(nn.Module):
    """A table whose rows are multiplied by sqrt(width), a factor rounded to the table's dtype as transformers does."""

    def __init__(self, rows: int, columns: int, width: int | None = None) -> None:
        super().__init__()
        self.factor = (width or columns) ** 0.5
        self.weight = nn.Parameter(torch.zeros(rows, columns))

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight) * torch.tensor(self.factor, dtype=self.weight.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) * weight in float32; the weight is plain (no +1)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return (normalise(x.float(), self.eps) * self.weight.float()).type_as(x)


def normalise(x: Tensor, eps: float) -> Tensor:
    """x / rms(x) over the last dimension."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def rotation(rope: Rope, head_dim: int, positions: Tensor, dtype: torch.dtype) -> Rotation:
    """cos and sin [B, T, head_dim] of `positions` [B, T]; pairs beyond the rotating ones get angle 0."""
    pairs = rope.rotating_pairs(head_dim)
    frequencies = torch.zeros(head_dim // 2, dtype=torch.float32, device=positions.device)
    exponents = torch.arange(0, 2 * pairs, 2, device=positions.device).float() / head_dim
    frequencies[:pairs] = 1.0 / rope.theta**exponents
    angles = positions[..., None].float() * frequencies  # [B, T, head_dim / 2]
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate_heads(x: Tensor, rotate: Rotation) -> Tensor:
    """Rotate the pairs (i, i + head_dim / 2) of x [B, heads, T, head_dim]."""
    cos, sin = (part[:, None] for part in rotate)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Grouped-query attention with normed queries, keys and values and scale 1."""

    def __init__(self, stack: Stack, layer: Layer, owns_kv: bool) -> None:
        super().__init__()
        self.heads, self.layer, self.eps = stack.heads, layer, stack.rms_eps
        self.q_proj = nn.Linear(stack.hidden_size, stack.heads * layer.head_dim, bias=False)
        self.q_norm = RMSNorm(layer.head_dim, stack.rms_eps)
        if owns_kv:
            self.k_proj = nn.Linear(stack.hidden_size, layer.kv_heads * layer.head_dim, bias=False)
            self.k_norm = RMSNorm(layer.head_dim, stack.rms_eps)
        if owns_kv and layer.has_v_proj:
            self.v_proj = nn.Linear(stack.hidden_size, layer.kv_heads * layer.head_dim, bias=False)
        self.o_proj = nn.Linear(stack.heads * layer.head_dim, stack.hidden_size, bias=False)

    def keys_values(self, normed: Tensor, rotate: Rotation) -> KeysValues:
        """[B, T, H] -> [B, kv_heads, T, head_dim] twice. Without v_proj the values are the keys before their norm."""
        keys = self.split(self.k_proj(normed))
        values = self.split(self.v_proj(normed)) if self.layer.has_v_proj else keys
        values = normalise(values.float(), self.eps).type_as(values)  # no weight, no rotation
        return rotate_heads(self.k_norm(keys), rotate), values

    def forward(self, normed: Tensor, rotate: Rotation, visible: KeysValues, mask: Tensor) -> Tensor:
        """Queries of `normed` [B, T, H] over the visible rows, where `mask` [T, S] allows it."""
        queries = rotate_heads(self.q_norm(self.split(self.q_proj(normed))), rotate)  # [B, heads, T, head_dim]
        return self.o_proj(mix(queries, visible, mask))  # type: ignore[no-any-return]  # [B, T, H]

    def split(self, x: Tensor) -> Tensor:
        """[B, T, n * head_dim] -> [B, n, T, head_dim]"""
        return x.view(*x.shape[:2], -1, self.layer.head_dim).transpose(1, 2)


def mix(queries: Tensor, visible: KeysValues, mask: Tensor) -> Tensor:
    """Values mixed by how queries [B, heads, T, head_dim] meet the visible keys: [B, T, heads * head_dim]"""
    keys, values = visible
    shape = (*keys.shape[:2], -1, *mask.shape)  # [B, kv_heads, group, T, S]
    # The heads of a group share their K/V, so their queries stand together as rows of one product.
    scores = (queries.reshape(*keys.shape[:2], -1, keys.shape[3]) @ keys.mT).view(shape)
    shares = scores.float().masked_fill(~mask, -torch.inf).softmax(-1).type_as(values)
    mixed = (shares.flatten(2, 3) @ values).view_as(queries)
    return mixed.transpose(1, 2).flatten(2)


class MLP(nn.Module):
    """down(gelu(gate(x)) * up(x))"""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(gelu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


class Router(nn.Module):
    """Chooses experts from the residual stream: top k of a softmax, renormalised, times a scale per expert."""

    def __init__(self, hidden_size: int, experts: Experts, eps: float) -> None:
        super().__init__()
        self.active, self.eps = experts.active, eps
        self.proj = nn.Linear(hidden_size, experts.count, bias=False)
        self.scale = nn.Parameter(torch.ones(hidden_size))
        self.per_expert_scale = nn.Parameter(torch.ones(experts.count))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [N, H] -> weights and expert numbers, each [N, active]."""
        normed = normalise(x.float(), self.eps).type_as(x) * self.scale * x.shape[-1] ** -0.5
        shares = self.proj(normed).softmax(-1, dtype=torch.float32)
        weights, chosen = shares.topk(self.active, dim=-1)
        return weights / weights.sum(-1, keepdim=True) * self.per_expert_scale[chosen], chosen


class ExpertBank(nn.Module):
    """The experts' MLPs as two stacked tensors; in `gate_up_proj` the gate rows come first."""

    def __init__(self, hidden_size: int, experts: Experts) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(experts.count, 2 * experts.intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.zeros(experts.count, hidden_size, experts.intermediate_size))

    def forward(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """x [N, H], weights and chosen [N, active] -> [N, H]"""
        out = torch.zeros_like(x)
        for expert in sorted(set(chosen.flatten().tolist())):
            rows, ranks = torch.where(chosen == expert)
            gate, up = F.linear(x[rows], self.gate_up_proj[expert]).chunk(2, dim=-1)
            part = F.linear(gelu(gate) * up, self.down_proj[expert])
            out.index_add_(0, rows, (part * weights[rows, ranks, None]).to(out.dtype))
        return out


class DecoderLayer(nn.Module):
    """Attention, MLP (with experts beside it in MoE models), per-layer embedding, a scalar over the whole stream."""

    def __init__(self, stack: Stack, layer: Layer, owns_kv: bool, ple_size: int, experts: Experts | None) -> None:
        super().__init__()
        size, eps = stack.hidden_size, stack.rms_eps
        self.input_layernorm = RMSNorm(size, eps)
        self.self_attn = Attention(stack, layer, owns_kv)
        self.post_attention_layernorm = RMSNorm(size, eps)
        self.pre_feedforward_layernorm = RMSNorm(size, eps)
        self.mlp = MLP(size, layer.intermediate_size)
        self.has_experts = experts is not None
        if experts is not None:
            self.post_feedforward_layernorm_1 = RMSNorm(size, eps)
            self.router = Router(size, experts, eps)
            self.pre_feedforward_layernorm_2 = RMSNorm(size, eps)
            self.experts = ExpertBank(size, experts)
            self.post_feedforward_layernorm_2 = RMSNorm(size, eps)
        self.post_feedforward_layernorm = RMSNorm(size, eps)
        if ple_size:
            self.per_layer_input_gate = nn.Linear(size, ple_size, bias=False)
            self.per_layer_projection = nn.Linear(ple_size, size, bias=False)
            self.post_per_layer_input_norm = RMSNorm(size, eps)
        self.layer_scalar = nn.Parameter(torch.ones(1))

    def forward(
        self, x: Tensor, normed: Tensor, rotate: Rotation, visible: KeysValues, mask: Tensor, ple: Tensor | None = None
    ) -> Tensor:
        """x [B, T, H], its `input_layernorm` in `normed`, per-layer embeddings `ple` [B, T, ple] -> [B, T, H]"""
        x = x + self.post_attention_layernorm(self.self_attn(normed, rotate, visible, mask))
        x = x + self.post_feedforward_layernorm(self.feed_forward(x))
        if ple is not None:
            gated = gelu(self.per_layer_input_gate(x)) * ple  # [B, T, ple]
            x = x + self.post_per_layer_input_norm(self.per_layer_projection(gated))
        return x * self.layer_scalar

    def feed_forward(self, x: Tensor) -> Tensor:
        dense: Tensor = self.mlp(self.pre_feedforward_layernorm(x))
        if not self.has_experts:
            return dense
        flat = x.flatten(0, -2)  # [N, H]
        routed = self.experts(self.pre_feedforward_layernorm_2(flat), *self.router(flat)).view_as(x)
        return self.post_feedforward_layernorm_1(dense) + self.post_feedforward_layernorm_2(routed)  # type: ignore[no-any-return]


def load_target(model: Gemma4, tensors: Mapping[str, Tensor]) -> None:
    """Fill `model` from a checkpoint's tensors under their official names.

    Vision and audio tensors, a stored copy of the tied LM head and the unused K/V of sharing layers are passed over.

    Raises:
        CheckpointError: a tensor is missing, left over or of another shape.
    """
    prefix = PREFIXES[0] if any(name.startswith(PREFIXES[0]) for name in tensors) else PREFIXES[1]
    unused = {
        f"{prefix}layers.{index}.self_attn.{part}.weight"
        for index in range(model.config.first_shared_layer, len(model.config.layers))
        for part in ("k_proj", "v_proj", "k_norm")
    }
    unused.add("lm_head.weight")
    towers = tuple(f"model.{tower}" for tower in SKIPPED)
    wanted = {name: tensor for name, tensor in tensors.items() if name not in unused and not name.startswith(towers)}
    load_exactly(model, wanted, prefix)


def load_exactly(model: nn.Module, tensors: Mapping[str, Tensor], prefix: str = "") -> None:
    """Copy `tensors` into `model`, whose state has the same names without `prefix`; nothing may be missing or left."""
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    for what, names in (("missing", state.keys() - tensors.keys()), ("left over", tensors.keys() - state.keys())):
        if names:
            raise CheckpointError(f"{len(names)} tensors are {what}: {_list(names)}; use the files as published")
    with torch.no_grad():
        for name, tensor in state.items():
            if tensor.shape != tensors[name].shape:
                raise CheckpointError(f"{name} is {list(tensors[name].shape)}, config.json says {list(tensor.shape)}")
            tensor.copy_(tensors[name])


def official_state(model: Gemma4, prefix: str = "model.") -> dict[str, Tensor]:
    """The weights under their checkpoint names."""
    return {prefix + name: tensor.detach() for name, tensor in model.state_dict().items()}


def _list(names: Iterable[str]) -> str:
    first = sorted(names)
    return ", ".join(first[:3]) + (", ..." if len(first) > 3 else "")
