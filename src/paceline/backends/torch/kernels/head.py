"""A drafter's head that scores only the tokens of chosen centroids."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from paceline.backends.torch.kernels.common import FUSED
from paceline.models.ops import UNSEEN


@triton.jit
def centroid_kernel(
    state, chosen, head, tokens, positions, out, vocabulary, K, members, MEMBERS: tl.constexpr, BLOCK: tl.constexpr
):
    """One row's scores of the members of one centroid it chose."""
    row = tl.program_id(0)
    if tl.load(positions + row) >= 0:
        centroid = tl.load(chosen + row * tl.num_programs(1) + tl.program_id(1))
        i = tl.arange(0, MEMBERS)
        inside = i < members
        token = tl.load(tokens + centroid * members + i, mask=inside, other=0)
        acc = tl.zeros((MEMBERS,), tl.float32)
        for start in range(0, K, BLOCK):
            k = start + tl.arange(0, BLOCK)
            x = tl.load(state + row * K + k, mask=k < K, other=0.0).to(tl.float32)
            mask = inside[:, None] & (k < K)[None]
            w = tl.load(head + token[:, None] * K + k[None], mask=mask, other=0.0).to(tl.float32)
            acc += tl.sum(w * x[None], 1)
        tl.store(out + row.to(tl.int64) * vocabulary + token, acc, mask=inside)


def centroid_scores(state: Tensor, chosen: Tensor, head: Tensor, tokens: Tensor, positions: Tensor) -> Tensor:
    rows, members = len(state), tokens.shape[1]
    out = torch.full((rows, len(head)), UNSEEN, dtype=torch.float32, device=state.device)
    centroid_kernel[(rows, chosen.shape[1])](
        state.contiguous(), chosen.contiguous(), head, tokens, positions, out, len(head), state.shape[1], members,
        MEMBERS=triton.next_power_of_2(members), BLOCK=64, **FUSED,
    )  # fmt: skip
    return out
