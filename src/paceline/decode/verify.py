"""Acceptance of drafted tokens along a line. Plain decoding is the case of no drafts."""

from __future__ import annotations

from paceline.decode.rules import Rule
from paceline.decode.sampling_params import History, logprobs_of
from paceline.types import Commit, Line, Rows


def verify(
    logits: Rows, line: Line, rule: Rule, history: History, position: int, logprobs: int | None = None
) -> Commit:
    """Settle the tokens along a drafted line, up to and including the first that was not drafted.

    Args:
        logits: [K + 1, vocabulary]: row 0 follows the newest token, row i the i-th draft.
        line: the K drafted tokens.
        rule: how a token is settled.
        history: the tokens committed so far; those of the line are added to it.
        position: absolute position of the newest token; the drafts stand at position + 1, ...
        logprobs: how many alternatives to report with each token's own log-probability; None for no report.
    """
    tokens: list[int] = []
    reports = []
    for depth, row in enumerate(logits):
        token = rule.settle(row, position + 1 + depth, history, line, depth)
        tokens.append(token)
        history.add(token)
        if logprobs is not None:
            reports.append(logprobs_of(row, token, logprobs, rule.sampling.temperature))
        if depth == len(line.tokens) or line.tokens[depth] != token:
            break
    return Commit(tuple(tokens), accepted=len(tokens) - 1, logprobs=tuple(reports))
