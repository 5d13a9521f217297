"""Gemma 4's MTP drafter, in execution order.

A few layers of queries over the target's KV cache. A draft step takes the newest token (as the target embeds it) and a
hidden state, and gives logits for the next token and the hidden state of the next step. Weights, operations and KV
cache are arguments, as in `models.gemma4`. M rows belong to any sequences. H is the
drafter's and `backbone` the target's hidden size.

Source: transformers 5.17.0, `gemma4_assistant`, with one difference: a row at position P sees exactly the target's rows
below P (full layers 0..P-1, sliding layers the last `sliding_window` of them), in every step of a round.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from paceline.checkpoint.names import DRAFT_TOKENS, TOKEN_ORDERING
from paceline.config import DrafterConfig, TargetConfig
from paceline.models.gemma4 import Angles, Decoder, KeysValues, TensorSource, load_block, load_decoder, run_decoder
from paceline.models.matrix import Matrix
from paceline.models.ops import UNSEEN


@dataclass(frozen=True)
class Drafter:
    """A whole drafter."""

    config: DrafterConfig
    before: Matrix  # 2 * backbone -> H
    after: Matrix  # H -> backbone
    decoder: Decoder
    head: Matrix
    centroids: Matrix | None = None
    tokens: Tensor | None = None  # [centroids, tokens of each]; without centroids [n], those of the head, None for all


def step(
    drafter: Drafter, ops: ModuleType, embedding: Tensor, hidden: Tensor, kv: KeysValues, angles: Angles
) -> tuple[Tensor, Tensor]:
    """One draft step.

    Args:
        drafter: weights.
        ops: operations.
        embedding: [M, backbone] the target's embedding of the newest token.
        hidden: [M, backbone] the target's state that it was sampled from, or the previous step's hidden state.
        kv: the target's cache; a row at position P sees up to P - 1.
        angles: of the rows' positions P, the same in every step; see `gemma4.angles_of`.

    Returns:
        The normed state [M, H], input of `logits`, and the hidden state [M, backbone] of the next step.
    """
    x = ops.matmul(torch.cat((embedding, hidden), dim=-1), *drafter.before)
    state = run_decoder(drafter.decoder, ops, x, kv, angles)
    return state, ops.matmul(state, *drafter.after)


def logits(drafter: Drafter, ops: ModuleType, state: Tensor, positions: Tensor) -> Tensor:
    """State [M, H] -> [M, vocabulary], float32; tokens that the head does not score get `UNSEEN`."""
    if drafter.centroids is None:
        scores: Tensor = ops.scores(state, *drafter.head, 0.0)
        if drafter.tokens is None:
            return scores
        unseen = scores.new_full((len(scores), drafter.config.vocab_size), UNSEEN)
        return unseen.index_copy(1, drafter.tokens, scores)
    chosen = ops.scores(state, *drafter.centroids, 0.0).topk(drafter.config.centroid_top_k, dim=-1).indices
    return ops.centroid_scores(state, chosen, drafter.head.values, drafter.tokens, positions)  # type: ignore[no-any-return]


def load_drafter(config: DrafterConfig, target: TargetConfig, w: TensorSource) -> Drafter:
    """Collect a drafter's weights. Of a head with centroids only few rows are used: it keeps its precision."""
    blocks = []
    for index, layer in enumerate(config.layers):
        source = target.last_layer(sliding=layer.sliding)
        assert source is not None  # check_pair has refused such a pair
        blocks.append(load_block(config, index, source, w))
    ordered, tokens = bool(config.centroids), None
    if ordered:
        tokens = w.vector(TOKEN_ORDERING).view(config.centroids, -1)
    elif config.restricted:
        tokens = w.vector(DRAFT_TOKENS).long()
    return Drafter(
        config=config,
        before=w.matrix("pre_projection.weight"),
        after=w.matrix("post_projection.weight"),
        decoder=load_decoder(config, tuple(blocks), w),
        head=w.matrix("embed_tokens.weight", precise=ordered),
        centroids=w.matrix("masked_embedding.centroids.weight", precise=True) if ordered else None,
        tokens=tokens,
    )
