"""Reports on a pair: all at one context, instruction sets one below the other, contexts of several lengths."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from paceline.bench.loading import Pair

DECODING_RUNS = 3


def whole(
    pair: Pair, repeats: int, draft_tokens: int, shares: tuple[float, ...] | None, tokens: int, prompt: int
) -> dict[str, Any]:
    """Passes, draft steps, prefill, and decoding with and without MTP.

    Args:
        pair: a pair.
        repeats: of each measurement.
        draft_tokens: of a round with MTP.
        shares: simulated acceptance by depth; None for the pair's.
        tokens: of each decoding run.
        prompt: tokens of the prompt that is measured.
    """
    run = pair.bench
    forward = run.forward_ms(repeats)
    exact = run.same_bits()
    step = run.draft_step_ms(repeats) if run.backend.info.has_drafter else None
    modes: dict[str, tuple[int | None, tuple[float, ...] | None]] = {
        "plain": (0, None),
        "mtp": (draft_tokens, shares),
        "auto": (None, shares),
        "auto_useless": (None, ()),
    }
    speeds: dict[str, list[float]] = {mode: [] for mode in modes}
    first = 0 if pair.demand else 1  # the first round on a device records what it runs
    for _ in range(first + DECODING_RUNS):  # alternating, so that changes of the machine's speed affect all modes
        for mode, (depth, accepted) in modes.items():
            speeds[mode].append(run.decode_tokens_per_s(tokens, depth, accepted))
    for seen in speeds.values():
        del seen[:first]

    def speedup(mode: str) -> float:
        return statistics.median(b / a for a, b in zip(speeds["plain"], speeds[mode], strict=True))

    return {
        **pair.report("decode"),
        **_forward(pair, forward),
        "same_bits": exact,
        "draft_step_ms": step,
        "draft_tokens": draft_tokens,
        "simulated_acceptance": shares,
        "plain_tokens_per_s": statistics.median(speeds["plain"]),
        "mtp_tokens_per_s": statistics.median(speeds["mtp"]),
        "speedup": speedup("mtp"),
        "auto_speedup": speedup("auto"),
        "auto_useless_speedup": speedup("auto_useless"),
        **pair.prompt(DECODING_RUNS, prompt),
    }


def by_isa(pairs: Sequence[Pair], repeats: int, rows: Sequence[int], prompt: int) -> dict[str, Any]:
    """Passes and prefill of the same weights with several instruction sets, in turns."""
    forward = [{n: [] for n in rows} for _ in pairs]  # type: list[dict[int, list[float]]]
    prompts: list[list[float]] = [[] for _ in pairs]
    for repeat in range(repeats):
        for index, pair in enumerate(pairs):
            for n, ms in pair.bench.forward_ms(1, rows).items():
                forward[index][n].append(ms)
            if repeat < DECODING_RUNS:
                prompts[index].append(pair.bench.prompt_tokens_per_s(1, prompt))
    reports = {}
    for pair, times, speeds in zip(pairs, forward, prompts, strict=True):
        medians = {n: statistics.median(seen) for n, seen in times.items()}
        figures = {**_forward(pair, medians), **pair.prompt_figures(statistics.median(speeds), prompt)}
        report = {**pair.report("decode"), **figures}
        reports[report["isa"]] = report
    return {"benchmark": "decode_isas", "isas": reports}


def by_context(pair: Pair, repeats: int, rows: Sequence[int], contexts: Sequence[int]) -> dict[str, Any]:
    """Passes after contexts of several lengths, the first of which the pair has already."""
    found = {}
    for context in contexts:
        if context > pair.bench.context:
            pair.bench.extend(context)
        found[str(context)] = pair.passes(pair.bench.forward_ms(repeats, rows))
    return {**pair.report("decode_contexts"), "contexts": found}


def _forward(pair: Pair, forward: dict[int, float]) -> dict[str, Any]:
    passes = pair.passes(forward)
    return {
        "forward_ms": {str(rows): ms for rows, ms in forward.items()},
        "forward_of_one_row": {str(rows): ms / forward[1] for rows, ms in forward.items()},
        "passes": passes,
        "bandwidth_fraction": passes["1"]["bandwidth_fraction"],
    }
