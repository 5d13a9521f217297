"""The operations that a pass is made of, each in two forms under one name.

Here stands the readable form, in PyTorch, for any device; on CUDA devices the kernels of `kernels/` take its place.
Both compute each of the M rows in an order that the row alone determines. A position below 0 marks a row that is only
padding: nothing is written for it, and what comes out is void.

As operators of `torch.library` they are opaque to tracing: a pass can be recorded once and run again with other
contents of the same tensors, which is what CUDA graphs do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from paceline.backends.torch.device_sampler import draw_rows
from paceline.backends.torch.matrix import GROUP, Matrix, dequantise
from paceline.models.gemma4 import gelu, mix, normalise, rotate_heads

UNSEEN = -3e38  # logit of a token that a drafter's head did not look at
SLICE = 1 << 13  # outputs of a quantised matrix that the readable form unpacks at once


@torch.library.custom_op("paceline::norm", mutates_args=())
def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm of the rows of x [M, H]."""
    return _normed(x, weight, eps)


@torch.library.custom_op("paceline::join", mutates_args=())
def join(
    x: Tensor, branch: Tensor, branch_norm: Tensor, next_norm: Tensor | None, scale: float, eps: float
) -> tuple[Tensor, Tensor]:
    """(x + norm(branch)) * scale, and the norm of that, which comes next (void without `next_norm`): [M, H] twice."""
    total = (x + _normed(branch, branch_norm, eps)) * scale
    return total, torch.empty_like(total) if next_norm is None else _normed(total, next_norm, eps)


@torch.library.custom_op("paceline::matmul", mutates_args=())
def matmul(x: Tensor, values: Tensor, scales: Tensor | None, outputs: int) -> Tensor:
    """x [M, K] times a `Matrix` transposed: [M, N] in the type of x."""
    return _product(x, values, scales).to(x.dtype)


@torch.library.custom_op("paceline::scores", mutates_args=("out",))
def scores(x: Tensor, values: Tensor, scales: Tensor | None, out: Tensor, cap: float) -> None:
    """The same product into `out` [M, N], float32, after the soft cap `cap` (0: none)."""
    product = _product(x, values, scales).float()
    out.copy_(torch.tanh(product / cap) * cap if cap else product)


@torch.library.custom_op("paceline::gate_up", mutates_args=())
def gate_up(x: Tensor, values: Tensor, scales: Tensor | None, outputs: int) -> Tensor:
    """gelu(gate) * up of x [M, K], both from one `Matrix` of `outputs` rows, the gate's first: [M, outputs / 2]."""
    gate, up = _product(x, values, scales).to(x.dtype).chunk(2, dim=-1)
    return gelu(gate) * up


@torch.library.custom_op("paceline::gated", mutates_args=())
def gated(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up, each [M, n] whose rows may lie apart."""
    return gelu(gate) * up


@torch.library.custom_op("paceline::heads", mutates_args=("keys", "values"))
def heads(
    x: Tensor,
    query_norm: Tensor,
    key_norm: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    positions: Tensor,
    count: int,
    has_values: bool,
    eps: float,
) -> Tensor:
    """Norm and rotate the heads in x [M, (queries + keys + values) * head_dim]; store keys and values.

    Args:
        x: projections; without `has_values` the values are the keys before their norm.
        query_norm: [head_dim].
        key_norm: [head_dim]; None if x holds queries alone.
        cos: [M, head_dim / 2], of the rows' positions.
        sin: likewise.
        keys: K/V memory [slots, kv_heads, ring, head_dim]; position p is in place p modulo ring.
        values: likewise.
        slots: [M].
        positions: [M].
        count: of query heads.
        has_values: whether x has values of its own.
        eps: of the norms.

    Returns:
        Queries [M, count * head_dim].
    """
    size = query_norm.shape[0]
    split = x.view(len(x), -1, size).transpose(0, 1)[None]  # [1, heads, M, head_dim]
    rotate = torch.cat((cos, cos), -1)[None], torch.cat((sin, sin), -1)[None]
    queries = rotate_heads(_normed(split[:, :count], query_norm, eps), rotate)
    if key_norm is not None:
        kv_heads = keys.shape[1]
        plain = split[:, count : count + kv_heads]
        raw = split[:, count + kv_heads :] if has_values else plain
        valid = (positions >= 0).nonzero()[:, 0]
        at = slots[valid], slice(None), positions[valid] % keys.shape[2]
        keys[at] = rotate_heads(_normed(plain, key_norm, eps), rotate)[0].transpose(0, 1)[valid]
        values[at] = normalise(raw.float(), eps).to(x.dtype)[0].transpose(0, 1)[valid]
    return queries[0].transpose(0, 1).flatten(1)


@torch.library.custom_op("paceline::attend", mutates_args=())
def attend(
    queries: Tensor, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor, window: int, span: int
) -> Tensor:
    """Attention of each row over its slot's memory up to its own position: [M, heads * head_dim] both ways.

    Args:
        queries: normed and rotated; the heads that share K/V stand together.
        keys: K/V memory, see `heads`.
        values: likewise.
        slots: [M]; rows of a slot stand together, positions ascending.
        positions: [M].
        window: positions a row sees at most, its own included.
        span: more than any position, for kernels whose grid must be known beforehand.
    """
    out = torch.zeros_like(queries)
    for row, (slot, position) in enumerate(zip(slots.tolist(), positions.tolist(), strict=True)):
        if position < 0:
            continue
        start = max(0, position + 1 - window)
        places = torch.arange(start, position + 1, device=keys.device) % keys.shape[2]
        visible = keys[slot, :, places][None], values[slot, :, places][None]
        query = queries[row].view(1, -1, 1, keys.shape[3])
        mask = torch.ones(1, position + 1 - start, dtype=torch.bool, device=keys.device)
        out[row] = mix(query, visible, mask)[0, 0]
    return out


@torch.library.custom_op("paceline::choose", mutates_args=())
def choose(scores: Tensor, expert_scale: Tensor, active: int) -> tuple[Tensor, Tensor]:
    """Weights and numbers [M, active] of the experts with the best scores [M, experts]: a softmax, renormalised."""
    shares, chosen = scores.softmax(-1, dtype=torch.float32).topk(active, dim=-1)
    return shares / shares.sum(-1, keepdim=True) * expert_scale.float()[chosen], chosen.int()


@torch.library.custom_op("paceline::experts", mutates_args=())
def experts(
    x: Tensor,
    weights: Tensor,
    chosen: Tensor,
    gate_up: Tensor,
    gate_up_scales: Tensor | None,
    down: Tensor,
    down_scales: Tensor | None,
    count: int,
) -> Tensor:
    """Each row x [M, H] through the experts it chose, weighted and summed in their order: [M, H].

    Args:
        x: [M, H].
        weights: [M, active].
        chosen: [M, active], numbers of experts.
        gate_up: a `Matrix` of all experts' [2 * I, H], gate first, one after the other.
        gate_up_scales: of it.
        down: a `Matrix` of all experts' [H, I].
        down_scales: of it.
        count: of experts.

    An expert that any row has chosen runs for all rows of a tile, so that a row does not depend on the others' choices.
    """
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in sorted(set(chosen.flatten().tolist())):
        gate, up = _expert(x, gate_up, gate_up_scales, expert, count).chunk(2, dim=-1)
        part = _expert(gelu(gate) * up, down, down_scales, expert, count).float()
        picked = chosen == expert  # [M, active]
        share = (weights * picked).sum(-1, keepdim=True)
        out = torch.where(picked.any(-1, keepdim=True), out + part * share, out)
    return out.to(x.dtype)


@torch.library.custom_op("paceline::centroid_scores", mutates_args=())
def centroid_scores(state: Tensor, chosen: Tensor, head: Tensor, tokens: Tensor, positions: Tensor) -> Tensor:
    """Logits [M, vocabulary] of a drafter's state [M, H], float32, for the tokens of the chosen centroids alone.

    Args:
        state: [M, H].
        chosen: [M, n], numbers of centroids.
        head: [vocabulary, H], in the order of `tokens`.
        tokens: [centroids, tokens of each].
        positions: [M].
    """
    out = torch.full((len(state), len(head)), UNSEEN, dtype=torch.float32, device=state.device)
    table = head.view(*tokens.shape, -1)
    for row in (positions >= 0).nonzero()[:, 0].tolist():
        scores = (table[chosen[row]] @ state[row][:, None])[..., 0]  # [n, tokens of each]
        out[row, tokens[chosen[row]].flatten()] = scores.flatten().float()
    return out


@torch.library.custom_op("paceline::draw", mutates_args=())
def draw(logits: Tensor, settings: Tensor, positions: Tensor, ranked: bool) -> tuple[Tensor, Tensor]:
    """A token from each row of logits [M, vocabulary], float32, and its probability among those it could be.

    Args:
        logits: [M, vocabulary].
        settings: [M, device_sampler.COLUMNS] int32, see `device_sampler.pack_settings`.
        positions: [M] of the tokens drawn.
        ranked: whether some row has a top-k, and candidates must be ranked.

    Returns:
        Tokens [M] int64, the same as `decode.sampler.draw`'s, and float32 [M].
    """
    drawn = draw_rows(logits.float().cpu().numpy(), settings.cpu().numpy(), positions.cpu().numpy())
    return torch.from_numpy(drawn[0]).to(logits.device), torch.from_numpy(drawn[1]).to(logits.device)


@norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


@join.register_fake
def _(
    x: Tensor, branch: Tensor, branch_norm: Tensor, next_norm: Tensor | None, scale: float, eps: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


@matmul.register_fake
def _(x: Tensor, values: Tensor, scales: Tensor | None, outputs: int) -> Tensor:
    return x.new_empty(len(x), outputs)


@scores.register_fake
def _(x: Tensor, values: Tensor, scales: Tensor | None, out: Tensor, cap: float) -> None:
    pass


@gate_up.register_fake
def _(x: Tensor, values: Tensor, scales: Tensor | None, outputs: int) -> Tensor:
    return x.new_empty(len(x), outputs // 2)


@gated.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@heads.register_fake
def _(x: Tensor, query_norm: Tensor, *others: Any) -> Tensor:
    count: int = others[8]
    return x.new_empty(len(x), count * len(query_norm))


@attend.register_fake
def _(queries: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(queries)


@choose.register_fake
def _(scores: Tensor, expert_scale: Tensor, active: int) -> tuple[Tensor, Tensor]:
    shape = len(scores), active
    return scores.new_empty(shape), scores.new_empty(shape, dtype=torch.int32)


@experts.register_fake
def _(x: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(x)


@centroid_scores.register_fake
def _(state: Tensor, chosen: Tensor, head: Tensor, *others: Any) -> Tensor:
    return state.new_empty(len(state), len(head), dtype=torch.float32)


@draw.register_fake
def _(logits: Tensor, settings: Tensor, positions: Tensor, ranked: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(positions), positions.new_empty(positions.shape, dtype=torch.float32)


def times(x: Tensor, matrix: Matrix) -> Tensor:
    """See `matmul`."""
    return matmul(x, matrix.values, matrix.scales, matrix.outputs)  # type: ignore[no-any-return]


def scores_of(x: Tensor, matrix: Matrix) -> Tensor:
    """See `scores`: [M, N], float32."""
    out = x.new_empty(len(x), matrix.outputs, dtype=torch.float32)
    scores(x, matrix.values, matrix.scales, out, 0.0)
    return out


def _product(x: Tensor, values: Tensor, scales: Tensor | None) -> Tensor:
    if scales is None:
        return F.linear(x, values)
    parts = [
        F.linear(_padded(x.float(), values), dequantise(v, s))
        for v, s in zip(torch.split(values, SLICE, 1), torch.split(scales, SLICE, 1), strict=True)
    ]
    return torch.cat(parts, dim=1)


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return (normalise(x.float(), eps) * weight.float()).to(x.dtype)


def _padded(x: Tensor, values: Tensor) -> Tensor:
    return F.pad(x, (0, len(values) * 2 * GROUP - x.shape[1]))


def _expert(x: Tensor, values: Tensor, scales: Tensor | None, expert: int, count: int) -> Tensor:
    """x [M, K] times the matrix of one of `count` experts, transposed."""
    if scales is None:
        return F.linear(x, values.chunk(count)[expert])
    part = dequantise(values.chunk(count, dim=1)[expert], scales.chunk(count, dim=1)[expert])
    return F.linear(_padded(x.float(), values), part).to(x.dtype)
