"""The operations of `models.ops` as operators of `torch.library`, and those that work on slots and sampling parameters.

On any device they run the plain form; on CUDA devices the kernels of `kernels/` take its place. As operators they are
opaque to tracing: a pass can be recorded once and run again with other contents of the same tensors, which is what CUDA
graphs do. A position below 0 marks padding: nothing is stored for it, and what comes out is void.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from paceline.backends.torch.device_sampler import sample_rows
from paceline.models import ops as plain


def operator(form: Callable[..., Any], fake: Callable[..., Any] | None = None) -> Any:
    """An operator of the name of its plain form; `fake` gives results without contents where that form cannot."""
    made = torch.library.custom_op(f"paceline::{form.__name__}", form, mutates_args=())
    made.register_fake(fake or form)
    return made


norm = operator(plain.norm)
join = operator(plain.join)
matmul = operator(plain.matmul)
scores = operator(plain.scores)
gate_up = operator(plain.gate_up)
gated = operator(plain.gated)
choose = operator(plain.choose)
experts = operator(plain.experts, lambda x, *_: torch.empty_like(x))
centroid_scores = operator(plain.centroid_scores)


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
    eps: float,
    value_norm: bool,
) -> Tensor:
    """Norm and rotate the heads in x, see `models.ops.split_heads`, and store keys and values.

    Args:
        x: [M, (queries + keys + values) * head_dim].
        query_norm: [head_dim].
        key_norm: [head_dim]; None if x holds queries alone, and nothing is stored.
        cos: [M, head_dim / 2], of the rows' positions.
        sin: likewise.
        keys: KV cache [slots, kv_heads, ring, head_dim]; position p is in place p modulo ring.
        values: likewise.
        slots: [M].
        positions: [M].
        count: of query heads.
        eps: of the norms.
        value_norm: whether values are normed.

    Returns:
        Queries [M, count * head_dim].
    """
    queries, *new = plain.split_heads(x, query_norm, key_norm, cos, sin, count, keys.shape[1], eps, value_norm)
    valid = (positions >= 0).nonzero()[:, 0]
    at = slots[valid], slice(None), positions[valid] % keys.shape[2]
    for stored, rows in zip((keys, values), new, strict=True):
        if rows is not None:
            stored[at] = rows[valid]
    return queries.flatten(1)


@torch.library.custom_op("paceline::attend", mutates_args=())
def attend(
    queries: Tensor, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor, window: int, span: int
) -> Tensor:
    """Attention of each row over its slot's cache up to its position: [M, heads * head_dim] both ways.

    Args:
        queries: normed and rotated; the heads that share K/V are adjacent.
        keys: KV cache, see `heads`.
        values: likewise.
        slots: [M]; rows of a slot are adjacent, positions ascending.
        positions: [M].
        window: positions a row sees at most, including its own.
        span: more than any position, for kernels whose grid must be known beforehand.
    """
    out = torch.zeros_like(queries)
    for row, (slot, position) in enumerate(zip(slots.tolist(), positions.tolist(), strict=True)):
        if position < 0:
            continue
        places = torch.arange(max(0, position + 1 - window), position + 1, device=keys.device) % keys.shape[2]
        query = queries[row].view(1, -1, 1, keys.shape[3])
        mask = torch.ones(1, len(places), dtype=torch.bool, device=keys.device)
        out[row] = plain.mix(query, keys[slot, :, places][None], values[slot, :, places][None], mask)[0, 0]
    return out


@torch.library.custom_op("paceline::sample", mutates_args=())
def sample(logits: Tensor, settings: Tensor, positions: Tensor, ranked: bool) -> tuple[Tensor, Tensor]:
    """A token from each row of logits [M, vocabulary], float32, and its probability among those it could be.

    Args:
        logits: [M, vocabulary].
        settings: [M, device_sampler.COLUMNS] int32, see `device_sampler.pack_settings`.
        positions: [M] of the tokens sampled.
        ranked: whether some row has a top-k, and candidates must be ranked.

    Returns:
        Tokens [M] int64, the same as the reference sampler's, and float32 [M].
    """
    sampled = sample_rows(logits.cpu().numpy(), settings.cpu().numpy(), positions.cpu().numpy())
    return torch.from_numpy(sampled[0]).to(logits.device), torch.from_numpy(sampled[1]).to(logits.device)


@heads.register_fake
def _(x: Tensor, query_norm: Tensor, *others: Any) -> Tensor:
    count: int = others[7]
    return x.new_empty(len(x), count * len(query_norm))


@attend.register_fake
def _(queries: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(queries)


@sample.register_fake
def _(logits: Tensor, settings: Tensor, positions: Tensor, ranked: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(positions), torch.empty_like(positions, dtype=torch.float32)
