"""An index over the rows of a dense draft head, so that a draft step reads a part of it.

Small official drafters are trained with a head of this kind: 2,048 centroids, each with a list of tokens, of which the
best 32 are scored. Here the lists are found in the head itself: a balanced tree halves its rows again and again, and a
list's centroid is their mean, so that its score is the list's mean logit. Tokens of lists that are not chosen cannot be
drafted, which costs acceptance (docs/benchmarks.md) and cannot change the text.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paceline import _cpu
from paceline.checkpoint import TensorRef
from paceline.config import DrafterConfig
from paceline.quant.bf16 import from_bf16
from paceline.types import Float32

LEAST_TOKENS = 1 << 16  # of a head that is worth it
LIST = 32  # tokens of a list, two panels; on a real model smaller lists lost less, and their centroids would cost more
CHOSEN = 8  # one list in so many is scored: a real model lost 1.8 % of its tokens, with one in sixteen 3.7 %
MOST_COLUMNS = 2048  # official heads have 1,024; the time for the axes grows with the third power
HUGE = 1e9  # no weight of a whole file is larger, and squares of smaller ones can be summed up
DIMENSIONS = 128  # that rows are compared in: more took longer and lost as much
STEPS = 6  # of two-means: fewer lost more, ten no less
CHUNK = 1 << 14  # rows


@dataclass(frozen=True)
class HeadIndex:
    """Lists of tokens, and the centroids that were found for them."""

    tokens: NDArray[np.int32]  # [lists, tokens of each]; -1: padding
    centroids: Float32 | None = None  # [lists, columns]; None: the files have them


def indexed(config: DrafterConfig) -> DrafterConfig:
    """The settings that the native code gets: a large dense head has centroids of our own."""
    lists, large = config.vocab_size // LIST, config.vocab_size >= LEAST_TOKENS and config.hidden_size <= MOST_COLUMNS
    if config.centroids or config.restricted or not large or not divides(config.vocab_size):
        return config
    return replace(config, centroids=lists, centroid_top_k=max(1, lists // CHOSEN))


def divides(tokens: int) -> bool:
    """Whether so many tokens are a power of two of lists, as all official vocabularies are."""
    lists = tokens // LIST
    return lists > 0 and lists * LIST == tokens and lists & (lists - 1) == 0


def build_index(head: TensorRef) -> HeadIndex:
    """The index of a head [tokens, columns] whose tokens are a power of two of lists (`divides`).

    It takes seconds, and memory for 256 numbers a token.

    Raises:
        CheckpointError: the file has shrunk since its header was read.
    """
    starts = range(0, head.rows, CHUNK)
    axes = _principal_axes(np.concatenate([_values(head, start)[::8].copy() for start in starts]))
    tokens = _lists(np.concatenate([_values(head, start) @ axes for start in starts]))
    of = np.empty(head.rows, np.int64)
    of[tokens] = np.arange(len(tokens))[:, None]
    centroids = np.zeros((len(tokens), head.shape[1]), np.float32)
    for start in starts:
        by_list = np.argsort(of[start : start + CHUNK], kind="stable")
        present, first = np.unique(of[start : start + CHUNK][by_list], return_index=True)
        centroids[present] += np.add.reduceat(_values(head, start)[by_list], first) / np.float32(LIST)
    return HeadIndex(tokens.astype(np.int32), centroids)


def _values(head: TensorRef, start: int) -> Float32:
    """A chunk of rows; of damaged files, what cannot be weights is zero."""
    rows: NDArray[Any] = head.read(start, min(start + CHUNK, head.rows))
    if head.block_type:
        rows = _cpu.dequantise(rows, head.block_type, head.shape[1])
    elif rows.dtype == np.uint16:
        rows = from_bf16(rows)
    rows = rows.astype(np.float32, copy=False)
    sane = np.abs(rows) < HUGE  # NaN is not
    return rows if sane.all() else np.where(sane, rows, np.float32(0))


def _principal_axes(rows: Float32) -> Float32:
    """[columns, DIMENSIONS at most]: the directions in which rows differ most."""
    _, axes = np.linalg.eigh(rows.T @ rows)
    return np.ascontiguousarray(axes[:, -DIMENSIONS:])


def _lists(rows: Float32) -> NDArray[np.int64]:
    """Numbers of rows [lists, LIST]: all rows, halved until a list is left of each part."""
    dice = np.random.default_rng(0)
    numbers = np.arange(len(rows))[None]
    parts = rows[None]  # [parts, rows of each, dimensions]
    while numbers.shape[1] > LIST:
        order = _halve(parts, dice.standard_normal((len(parts), rows.shape[1]), np.float32))
        halves = 2 * len(parts), parts.shape[1] // 2
        numbers = np.take_along_axis(numbers, order, 1).reshape(halves)
        parts = np.take_along_axis(parts, order[:, :, None], 1).reshape(*halves, -1)
    return numbers


def _halve(parts: Float32, direction: Float32) -> NDArray[np.int64]:
    """An order [parts, rows] in which each part's halves are apart: two-means with halves of equal size.

    Args:
        parts: [parts, rows, dimensions].
        direction: [parts, dimensions] to start from.
    """
    middle = parts.shape[1] // 2
    for _ in range(STEPS):  # to the line between the halves' means
        along = (parts @ direction[:, :, None])[:, :, 0]
        lower = along < np.partition(along, middle, axis=1)[:, middle, None]
        direction = (np.where(lower, np.float32(-1), np.float32(1))[:, None] @ parts)[:, 0]
    return np.argpartition((parts @ direction[:, :, None])[:, :, 0], middle, axis=1)
