"""A pass of the target and the steps of a drafter, as fixed sequences of operations on tensors of fixed shape.

Nothing here looks at the contents of a tensor, so a pass does the same work whatever its rows hold: it can be recorded
once, as a CUDA graph, and run again. M is the number of rows, padding included: those with a position below 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from paceline.backends.torch import ops
from paceline.backends.torch.layers import Block, DrafterLayers, MoE, TargetLayers
from paceline.backends.torch.matrix import Matrix
from paceline.backends.torch.memory import SlotMemory
from paceline.backends.torch.ops import scores_of, times

WHOLE = 1 << 30  # the window of layers without one
Angles = dict[bool, tuple[Tensor, Tensor]]  # cos and sin [M, head_dim / 2] by `sliding`


@dataclass(frozen=True)
class Rows:
    """Rows of a pass."""

    tokens: Tensor  # [M] int64
    slots: Tensor  # [M] int64
    positions: Tensor  # [M] int64

    def picked(self, numbers: Tensor) -> Rows:
        """Some of them; padding where a number is below 0."""
        at = numbers.clamp(min=0)
        return Rows(self.tokens[at], self.slots[at], torch.where(numbers < 0, -1, self.positions[at]))


class TargetProgram:
    """The target's passes over K/V memory.

    Args:
        layers: its weights.
        memory: of all slots.
        dtype: of activations.
    """

    def __init__(self, layers: TargetLayers, memory: SlotMemory, dtype: torch.dtype) -> None:
        self._layers, self._memory, self._dtype = layers, memory, dtype
        self._config = layers.config
        self._factor = factor(layers.config.hidden_size, dtype)
        self._ple_factor = factor(layers.config.ple_size, dtype)
        self._last_kv = max(index for index, block in enumerate(layers.blocks) if block.owns_kv)

    def run(self, rows: Rows, wanted: Tensor | None, span: int) -> Tensor | None:
        """Write the rows' keys and values, and compute what is wanted.

        Args:
            rows: M rows.
            wanted: [W] numbers of rows, below 0 for padding; None if nobody wants any.
            span: more than any position of the rows.

        Returns:
            States [W, hidden] after the final norm, or None.
        """
        config, blocks = self._config, self._layers.blocks
        x = self.embed(rows.tokens)  # [M, H]
        per_layer = self._per_layer(rows.tokens, x)  # [M, layers, ple]
        angles = angles_of(self._layers.frequencies, rows.positions, x.dtype)
        h: Tensor = ops.norm(x, blocks[0].input_norm, config.rms_eps)
        for index, block in enumerate(blocks):
            rotate = angles[block.settings.sliding]
            keys, values = self._memory.rows[block.settings.kv_source]
            at = rows.slots, rows.positions
            queries = heads(times(h, block.qkv), block, rotate, (keys, values), at, config.heads, config.rms_eps)
            if index == self._last_kv:  # from here on rows that nobody wants are of no use
                if wanted is None:
                    return None
                keep = wanted.clamp(min=0)
                rows, x, queries = rows.picked(wanted), x[keep], queries[keep]
                per_layer = per_layer[keep] if per_layer is not None else None
                angles = {sliding: (cos[keep], sin[keep]) for sliding, (cos, sin) in angles.items()}
            window = config.sliding_window if block.settings.sliding else WHOLE
            mixed = ops.attend(queries, keys, values, rows.slots, rows.positions, window, span)
            following = blocks[index + 1].input_norm if index + 1 < len(blocks) else self._layers.norm
            ple = per_layer[:, index] if per_layer is not None else None
            attended = times(mixed, block.out)
            x, h = behind_attention(x, attended, block, following, rows.positions, config.rms_eps, ple)
        return h

    def logits(self, states: Tensor, out: Tensor) -> None:
        """Logits of states [W, H] into `out` [W, vocabulary], float32, after the soft cap."""
        head = self._layers.embedding
        ops.scores(states, head.values, head.scales, out, self._config.softcap or 0.0)

    def embed(self, tokens: Tensor) -> Tensor:
        """[M] -> [M, H]"""
        return (self._layers.embedding.rows(tokens) * self._factor).to(self._dtype)

    def _per_layer(self, tokens: Tensor, x: Tensor) -> Tensor | None:
        """See `models.gemma4.Gemma4.per_layer_inputs`."""
        layers, config = self._layers, self._config
        if layers.ple_table is None or layers.ple_projection is None or layers.ple_norm is None:
            return None
        shape = (len(tokens), len(config.layers), config.ple_size)
        table = (layers.ple_table.rows(tokens) * self._ple_factor).to(self._dtype).view(shape)
        context = times(x, layers.ple_projection) * config.hidden_size**-0.5
        context = ops.norm(context.view(-1, config.ple_size), layers.ple_norm, config.rms_eps).view(shape)
        both: Tensor = (context + table) * 2.0**-0.5
        return both


@dataclass(frozen=True)
class Guesses:
    """What A anchors guessed in K steps."""

    tokens: Tensor  # [A, K] int64
    confidence: Tensor  # [A, K] float32
    logits: Tensor | None  # [A, K, vocabulary] float32


class DrafterProgram:
    """A drafter's steps over the target's K/V memory.

    Args:
        layers: its weights.
        target: whose embeddings it takes.
        memory: of all slots.
        sources: the target's layers whose K/V its sliding and full layers read.
    """

    def __init__(
        self, layers: DrafterLayers, target: TargetProgram, memory: SlotMemory, sources: dict[bool, int]
    ) -> None:
        self._layers, self._target, self._memory, self._sources = layers, target, memory, sources

    def run(
        self, rows: Rows, hidden: Tensor, settings: Tensor, *, depth: int, span: int, ranked: bool, with_logits: bool
    ) -> Guesses:
        """All steps of a round.

        Args:
            rows: A anchors with their newest tokens.
            hidden: [A, backbone] the target's state before each.
            settings: [A, device_sampler.COLUMNS] how guesses are drawn.
            depth: steps.
            span: more than any position of the anchors.
            ranked: see `ops.draw`.
            with_logits: whether to keep what guesses were drawn from.
        """
        angles = angles_of(self._layers.frequencies, rows.positions, hidden.dtype)
        seen = torch.where(rows.positions < 0, -1, rows.positions - 1)  # an anchor sees what is below it
        token, tokens, confidence, kept = rows.tokens, [], [], []
        for step in range(depth):
            x = times(torch.cat((self._target.embed(token), hidden), -1), self._layers.before)
            state = self._state(x, rows.slots, seen, angles, span)
            hidden = times(state, self._layers.after)
            logits = self._logits(state, rows.positions)
            drawn_at = torch.where(rows.positions < 0, -1, rows.positions + 1 + step)
            token, sure = ops.draw(logits, settings, drawn_at, ranked)
            tokens.append(token)
            confidence.append(sure)
            kept += [logits] if with_logits else []
        return Guesses(torch.stack(tokens, 1), torch.stack(confidence, 1), torch.stack(kept, 1) if kept else None)

    def _state(self, x: Tensor, slots: Tensor, seen: Tensor, angles: Angles, span: int) -> Tensor:
        """x [A, H] through the layers and the final norm."""
        config, blocks = self._layers.config, self._layers.blocks
        h: Tensor = ops.norm(x, blocks[0].input_norm, config.rms_eps)
        for index, block in enumerate(blocks):
            sliding = block.settings.sliding
            memory = self._memory.rows[self._sources[sliding]]
            queries = heads(
                times(h, block.qkv), block, angles[sliding], memory, (slots, seen), config.heads, config.rms_eps
            )
            mixed = ops.attend(queries, *memory, slots, seen, config.sliding_window if sliding else WHOLE, span)
            following = blocks[index + 1].input_norm if index + 1 < len(blocks) else self._layers.norm
            x, h = behind_attention(x, times(mixed, block.out), block, following, seen, config.rms_eps)
        return h

    def _logits(self, state: Tensor, positions: Tensor) -> Tensor:
        layers = self._layers
        if layers.centroids is None or layers.tokens is None:
            return scores_of(state, layers.head)
        chosen = scores_of(state, layers.centroids).topk(layers.config.centroid_top_k, dim=-1).indices
        scores: Tensor = ops.centroid_scores(state, chosen, layers.head.values, layers.tokens, positions)
        return scores


def heads(
    projected: Tensor,
    block: Block,
    rotate: tuple[Tensor, Tensor],
    memory: tuple[Tensor, Tensor],
    at: tuple[Tensor, Tensor],
    count: int,
    eps: float,
) -> Tensor:
    """See `ops.heads`."""
    queries: Tensor = ops.heads(
        projected,
        block.query_norm,
        block.key_norm,
        *rotate,
        *memory,
        *at,
        count,
        block.settings.has_v_proj,
        eps,
    )
    return queries


def behind_attention(
    x: Tensor,
    attended: Tensor,
    block: Block,
    following: Tensor,
    positions: Tensor,
    eps: float,
    ple: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What a layer does once attention [M, H] is known: the stream behind it, and its norm for the next layer."""
    x, h = ops.join(x, attended, block.attention_norm, block.feedforward_norm, 1.0, eps)
    branch = mlp(h, block.gate_up, block.down)
    if block.moe:
        routed = with_experts(x, block.moe, positions, eps)
        branch = ops.norm(branch, block.moe.dense_norm, eps) + ops.norm(routed, block.moe.routed_norm, eps)
    if ple is None or block.ple is None:
        return ops.join(x, branch, block.branch_norm, following, block.scale, eps)  # type: ignore[no-any-return]
    x, _ = ops.join(x, branch, block.branch_norm, None, 1.0, eps)
    branch = times(ops.gated(times(x, block.ple.gate), ple), block.ple.projection)
    return ops.join(x, branch, block.ple.norm, following, block.scale, eps)  # type: ignore[no-any-return]


def mlp(h: Tensor, gate_up: Matrix, down: Matrix) -> Tensor:
    """down(gelu(gate(h)) * up(h))"""
    return times(ops.gate_up(h, gate_up.values, gate_up.scales, gate_up.outputs), down)


def with_experts(x: Tensor, moe: MoE, positions: Tensor, eps: float) -> Tensor:
    """The experts' part of x [M, H]."""
    scores = scores_of(ops.norm(x, moe.router_norm, eps), moe.router)
    weights, chosen = ops.choose(scores, moe.expert_scale, moe.active)
    chosen = torch.where(positions[:, None] < 0, chosen[:1], chosen)  # padding has no wishes of its own
    routed: Tensor = ops.experts(
        ops.norm(x, moe.norm, eps),
        weights,
        chosen,
        moe.gate_up.values,
        moe.gate_up.scales,
        moe.down.values,
        moe.down.scales,
        moe.router.outputs,
    )
    return routed


def factor(width: int, dtype: torch.dtype) -> float:
    """What rows of an embedding are multiplied by: sqrt(width), rounded as the reference does."""
    return torch.tensor(width**0.5, dtype=dtype).item()


def angles_of(frequencies: dict[bool, Tensor], positions: Tensor, dtype: torch.dtype) -> Angles:
    """cos and sin of positions [M]."""
    places = positions.clamp(min=0)[:, None].float()
    angles = {sliding: places * table for sliding, table in frequencies.items()}
    return {sliding: (angle.cos().to(dtype), angle.sin().to(dtype)) for sliding, angle in angles.items()}
