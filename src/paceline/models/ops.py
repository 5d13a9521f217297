"""The operations that a pass is made of, in plain PyTorch: differentiable, on any device.

`backends.torch.ops` holds the same operations as operators of `torch.library`, with Triton kernels on CUDA. Each of the
M rows is computed in an order that depends on that row alone. Weight matrices are passed as the fields of a
`matrix.Matrix`: values, scales, format.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from paceline.models.matrix import BLOCK, dequantise

UNSEEN = -3e38  # logit of a token that a drafter's head did not score
SLICE = 1 << 13  # outputs of a quantised matrix that are dequantised at once


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm over the last dimension of x, in float32; the weight is plain (no +1)."""
    return (normalise(x.float(), eps) * weight.float()).to(x.dtype)


def join(
    x: Tensor, branch: Tensor, branch_norm: Tensor, next_norm: Tensor | None, scale: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """(x + norm(branch)) * scale [1], and the next norm of that (void without `next_norm`): [M, H] twice."""
    total = x + norm(branch, branch_norm, eps)
    total = total if scale is None else total * scale
    return total, torch.empty_like(total) if next_norm is None else norm(total, next_norm, eps)


def matmul(x: Tensor, values: Tensor, scales: Tensor | None, fmt: str) -> Tensor:
    """x [M, K] times a matrix [N, K] transposed: [M, N] in the dtype of x."""
    return _product(x, values, scales, fmt).to(x.dtype)


def scores(x: Tensor, values: Tensor, scales: Tensor | None, fmt: str, cap: float) -> Tensor:
    """The same product in float32, after the soft cap `cap` (0: none)."""
    product = _product(x, values, scales, fmt).float()
    return torch.tanh(product / cap) * cap if cap else product


def gate_up(x: Tensor, values: Tensor, scales: Tensor | None, fmt: str) -> Tensor:
    """gelu(gate(x)) * up(x) of x [M, K], gate and up being the halves of one matrix [2 * N, K]: [M, N]."""
    gate, up = _product(x, values, scales, fmt).to(x.dtype).chunk(2, dim=-1)
    return gelu(gate) * up


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up, each [M, N] with any stride between rows."""
    return gelu(gate) * up


def split_heads(
    x: Tensor,
    query_norm: Tensor,
    key_norm: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    kv_heads: int,
    eps: float,
    value_norm: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Norm and rotate the heads in x [M, (queries + keys + values) * head_dim].

    Args:
        x: projections; without values of its own the values are the keys before their norm.
        query_norm: [head_dim].
        key_norm: [head_dim]; None if x holds queries alone.
        cos: [M, head_dim / 2], of the rows' positions.
        sin: likewise.
        heads: of the queries.
        kv_heads: of keys and of values.
        eps: of the norms.
        value_norm: whether values are normed.

    Returns:
        Queries [M, heads, head_dim], and keys and values, each [M, kv_heads, head_dim].
    """
    split = x.view(len(x), -1, query_norm.shape[0])  # [M, n, head_dim]
    queries = rotate(norm(split[:, :heads], query_norm, eps), cos, sin)
    if key_norm is None:
        return queries, None, None
    keys = split[:, heads : heads + kv_heads]
    values = split[:, -kv_heads:]  # the keys where x ends with them
    values = normalise(values.float(), eps).to(x.dtype) if value_norm else values
    return queries, rotate(norm(keys, key_norm, eps), cos, sin), values


def mix(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Grouped-query attention with scale 1: queries [B, heads, T, head_dim] over S rows, where `mask` [T, S] allows.

    Keys and values are [B, kv_heads, S, head_dim]; the result is [B, T, heads * head_dim].
    """
    shape = (*keys.shape[:2], -1, *mask.shape)  # [B, kv_heads, group, T, S]
    # The heads of a group share their K/V, so their queries are rows of one product.
    scores = (queries.reshape(*keys.shape[:2], -1, keys.shape[3]) @ keys.mT).view(shape)
    shares = scores.float().masked_fill(~mask, -torch.inf).softmax(-1).type_as(values)
    mixed = (shares.flatten(2, 3) @ values).view_as(queries)
    return mixed.transpose(1, 2).flatten(2)


def choose(scores: Tensor, expert_scale: Tensor, active: int) -> tuple[Tensor, Tensor]:
    """Weights and numbers [M, active] of the experts with the best scores [M, experts]: a softmax, renormalised."""
    shares, chosen = scores.softmax(-1, dtype=torch.float32).topk(active, dim=-1)
    return shares / shares.sum(-1, keepdim=True) * expert_scale.float()[chosen], chosen.int()


def experts(
    x: Tensor,
    weights: Tensor,
    chosen: Tensor,
    gate_up: Tensor,
    gate_up_scales: Tensor | None,
    gate_up_fmt: str,
    down: Tensor,
    down_scales: Tensor | None,
    down_fmt: str,
    count: int,
) -> Tensor:
    """Each row x [M, H] through the experts it chose, weighted and summed in the order of their numbers: [M, H].

    Args:
        x: [M, H].
        weights: [M, active].
        chosen: [M, active], numbers of experts.
        gate_up: a matrix of all experts' [2 * I, H], gate first, one after the other.
        gate_up_scales: of it.
        gate_up_fmt: of it.
        down: a matrix of all experts' [H, I].
        down_scales: of it.
        down_fmt: of it.
        count: of experts.

    An expert that any row has chosen runs for all rows, so that a row does not depend on the others' choices.
    """
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in sorted(set(chosen.flatten().tolist())):
        gate, up = _expert(x, gate_up, gate_up_scales, gate_up_fmt, expert, count).chunk(2, dim=-1)
        part = _expert(gelu(gate) * up, down, down_scales, down_fmt, expert, count).float()
        picked = chosen == expert  # [M, active]
        share = (weights * picked).sum(-1, keepdim=True)
        out = torch.where(picked.any(-1, keepdim=True), out + part * share, out)
    return out.to(x.dtype)


def centroid_scores(state: Tensor, chosen: Tensor, head: Tensor, tokens: Tensor, positions: Tensor) -> Tensor:
    """Logits [M, vocabulary] of a drafter's state [M, H], float32, for the tokens of the chosen centroids alone.

    Args:
        state: [M, H].
        chosen: [M, n], numbers of centroids.
        head: [vocabulary, H].
        tokens: [centroids, tokens of each].
        positions: [M], below 0 for padding, whose logits are void.
    """
    picked = tokens[chosen].flatten(1)  # [M, n * tokens of each]
    scores = (head[picked] @ state[..., None])[..., 0].float()
    unseen = torch.full((len(state), len(head)), UNSEEN, dtype=torch.float32, device=state.device)
    return unseen.scatter(-1, picked, scores)


def normalise(x: Tensor, eps: float) -> Tensor:
    """x / rms(x) over the last dimension."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + head_dim / 2) of x [M, n, head_dim] by angles [M, head_dim / 2]."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _product(x: Tensor, values: Tensor, scales: Tensor | None, fmt: str) -> Tensor:
    if scales is None:
        return F.linear(x, values)
    x = F.pad(x.float(), (0, len(values) * BLOCK - x.shape[1]))
    slices = zip(torch.split(values, SLICE, 1), torch.split(scales, SLICE, 1), strict=True)
    return torch.cat([F.linear(x, dequantise(v, s, fmt)) for v, s in slices], dim=1)


def _expert(x: Tensor, values: Tensor, scales: Tensor | None, fmt: str, expert: int, count: int) -> Tensor:
    """x [M, K] times the matrix of one of `count` experts, transposed."""
    if scales is None:
        return F.linear(x, values.chunk(count)[expert])
    mine = values.chunk(count, dim=1)[expert], scales.chunk(count, dim=1)[expert]
    return _product(x, *mine, fmt).to(x.dtype)
