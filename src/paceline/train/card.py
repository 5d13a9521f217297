"""The card of a trained drafter, from the report of its training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TEMPLATE = """\
---
base_model: {target}
library_name: paceline
---
# MTP drafter for {target}

Proposes tokens that {target} verifies, so that its text comes faster; the text cannot depend on the drafter. Trained by
`paceline train` {version}{start}. It is derived from {target}: that model's licence and terms of use apply to it, too.

    paceline generate -m {target} --drafter THIS_FOLDER "..."

## Acceptance on held-out prompts
4 drafts a round, texts of at most {max_tokens} tokens; texts that repeat a stretch of 20 tokens are left out.

| | tokens a round | accepted at depth 1, 2, 3, 4 | texts | left out |
| --- | --- | --- | --- | --- |
{rows}

## Training
{texts} texts that the target wrote itself (weights: {quant}), {tokens:,} tokens, at most {length} each, after prompts
from {data}. {positions:,} positions drafted from, four steps unrolled, in {minutes:.0f} minutes. Loss: KL divergence
from the target's distribution, weighted by the chance that decoding reaches a step. Seed {seed}.
"""


def card(report: Mapping[str, Any]) -> str:
    """Markdown of the card."""
    settings = report["settings"]
    rows = [
        f"| {when}, {sampling} | {one['tokens_a_round']:.2f} | {', '.join(f'{x:.2f}' for x in one['by_depth'])} "
        f"| {one['texts']} | {one['loops_left_out']} |"
        for when, found in report["acceptance"].items()
        for sampling, one in found.items()
    ]
    return TEMPLATE.format(
        target=settings["target"],
        version=report["version"],
        start=f", starting from {settings['start']}" if settings["start"] else "",
        max_tokens=settings["max_tokens"],
        rows="\n".join(rows),
        texts=report["texts"],
        tokens=report["tokens"],
        quant=report["weights"],
        length=settings["length"],
        data=", ".join(settings["data"]),
        positions=report["drafted_positions"],
        minutes=report["training_seconds"] / 60,
        seed=settings["seed"],
    )
