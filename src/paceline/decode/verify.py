"""Acceptance of drafted tokens: exactly those that the target draws itself.

Accept-if-equal makes the committed tokens the target's own whatever was drafted, so the text cannot depend on the
drafter. Plain decoding is the case of no drafts.
"""

from __future__ import annotations

from collections.abc import Sequence

from paceline.decode.sampling import Sampling
from paceline.types import Commit, Float32


def verify(logits: Float32, drafts: Sequence[int], sampling: Sampling, position: int) -> Commit:
    """Draw the target's tokens along a drafted line, up to and including the first that was not drafted.

    Args:
        logits: [K + 1, vocabulary]: row 0 follows the newest token, row i the i-th draft.
        drafts: the K drafted tokens.
        sampling: how tokens are drawn.
        position: absolute position of the newest token; the drafts stand at position + 1, ...
    """
    tokens: list[int] = []
    for depth, row in enumerate(logits):
        token = sampling.draw(row, position + 1 + depth)
        tokens.append(token)
        if depth == len(drafts) or drafts[depth] != token:
            break
    return Commit(tuple(tokens), accepted=len(tokens) - 1)
