"""The model card of tiny-python, written from measured figures."""

from __future__ import annotations

import platform
from dataclasses import dataclass

from tools.tiny_python.evaluate import Acceptance, Loss

from paceline.train.optimizer import Parameters

TEMPLATE = """\
---
license: psf-2.0
language: code
---
# tiny-python and tiny-python-assistant

A very small pair in the Gemma 4 architecture, made to show and test speculative decoding with an MTP drafter on any
machine. It continues Python source. It is not useful for anything else, knows no natural language beyond docstrings,
and what it writes looks like Python more often than it means something. It contains no weights of Google's models.

| | tiny-python (target) | tiny-python-assistant (drafter) |
| --- | --- | --- |
| parameters | {target_total:.2f} M | {drafter_total:.2f} M |
| of these read per token | {target_read:.2f} M | {drafter_read:.2f} M a draft step |
| layers | 10 = (4 sliding + 1 full) x 2, the last 5 share K/V | 4 = 3 sliding + 1 full, no K/V of its own |
| hidden size | 384 | 128 |
| head | tied, 4096 tokens, soft cap 30 | 128 centroids x 32 tokens, best 16 scored |

Per-layer embeddings of width 32, double-wide MLPs in the sharing layers, sliding window 128, at most 4096 positions,
bfloat16.

## Data
The source of the Python {python} standard library: {f.files} files, {f.corpus_tokens:.2f} M tokens of a byte-level BPE
trained on the same files. Tests and generated character tables are left out. {f.held_out_files} more files, chosen by a
hash of their path, were seen by neither tokenizer nor models. A quarter of the training sequences are in the chat
format: the user's turn holds the beginning of a piece of source, the model's turn its continuation. For four fifths
of the training time sequences had 256 tokens, then 1024; positions beyond 1024 are untrained.

## Figures on the held-out files
| | |
| --- | --- |
| target loss | {loss.nats_per_token:.3f} nats a token, {loss.bits_per_byte:.3f} bits a byte ({loss.tokens} tokens) |
| acceptance length on source, greedy, 4 drafts | {source.length:.2f} tokens a round ({source.rounds} rounds) |
| drafts accepted there at depth 1, 2, 3, 4 | {source} of the rounds |
| acceptance length while generating, greedy, 4 drafts | {own.length:.2f} tokens a round ({own.rounds} rounds) |
| drafts accepted there at depth 1, 2, 3, 4 | {own} of the rounds |

"On source" is the first round after 128 tokens of a held-out file, at 12 places of each file. "While generating" is 128
tokens in a row after 64 tokens from the middle of each file; it is higher because so small a model, decoding greedily,
soon repeats itself, and repetition is easy to draft.

Target: {f.target_tokens:.1f} M tokens in {f.target_minutes:.0f} minutes on {f.threads} CPU threads of a busy machine.
Drafter: distilled for {f.drafter_minutes:.0f} minutes on {f.drafter_tokens:.1f} M tokens, half of them written by the
target itself, four steps unrolled.

## Licence
The training text is under the Python Software Foundation License Version 2, copyright Python Software Foundation, and
so are passages that the model reproduces from it. The weights are published under the same licence.

## Training it again
    python -m tools.tiny_python --out DIR --minutes {f.target_minutes:.0f} \\
        --drafter-minutes {f.drafter_minutes:.0f}

The schedule is boxed in time, so the figures depend on the machine.
"""


@dataclass(frozen=True)
class Figures:
    """What the card reports; tokens in millions."""

    loss: Loss
    on_source: Acceptance
    generating: Acceptance
    files: int
    held_out_files: int
    corpus_tokens: float
    target_tokens: float
    target_minutes: float
    drafter_tokens: float
    drafter_minutes: float
    threads: int


def card(target: Parameters, drafter: Parameters, figures: Figures) -> str:
    """Markdown of the card."""
    target_total, drafter_total = _count(target), _count(drafter)
    table, centroid_rows = _count(drafter, "embed_tokens.weight"), 16 / 128
    return TEMPLATE.format(
        f=figures,
        loss=figures.loss,
        source=figures.on_source,
        own=figures.generating,
        target_total=target_total,
        target_read=target_total - _count(target, "embed_tokens_per_layer.weight"),
        drafter_total=drafter_total,
        drafter_read=drafter_total - table * (1 - centroid_rows),
        python=platform.python_version(),
    )


def _count(weights: Parameters, only: str = "") -> float:
    """Parameters in millions."""
    return sum(p.numel() for name, p in weights.items() if p.is_floating_point() and name == (only or name)) / 1e6
