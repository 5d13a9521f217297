"""Acceptance: the longest common prefix of what was drafted and what the target samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from paceline.types import Work


def accept(work: Work, drafted: Sequence[int], sample: Callable[[int], int]) -> tuple[int, ...]:
    """The tokens sampled after the rows of a round, up to and including the first that was not drafted.

    Row i follows the committed tokens and drafted[:i], so what it samples is the target's own token as long as all of
    drafted[:i] were sampled, too. Plain decoding is the case of no drafts.

    Args:
        work: the round; its constraint is told of every token.
        drafted: [K] tokens.
        sample: the token that the target samples after row 0, 1, ..., K.
    """
    sampled = []
    for row in range(len(drafted) + 1):
        token = sample(row)
        if work.draft.simulated is not None and row < len(drafted):
            token = drafted[row] if row < work.draft.simulated else int(drafted[row] == 0)
        if work.constraint:
            work.constraint.commit(token)
        sampled.append(token)
        if row == len(drafted) or token != drafted[row]:
            break
    return tuple(sampled)
