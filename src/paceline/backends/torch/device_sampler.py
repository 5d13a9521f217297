"""Draws on a device: settings as tensors, rows of logits that stay there, and the readable form of drawing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from paceline.decode.sampler import allowed, draw, gap
from paceline.types import Float32, Int32, Row, SamplingParams

MOST_RANKED = 128  # candidates that a device ranks

TEMPERATURE, TOP_K, TOP_P, MIN_P, GAP, SEED, STREAM, COLUMNS = 0, 1, 2, 4, 6, 7, 9, 10  # columns; 64-bit ones take two


def on_device(sampling: SamplingParams) -> bool:
    """Whether devices draw this way: not from a nucleus of the whole vocabulary, which would have to be sorted."""
    return (
        sampling.temperature == 0 or 0 < sampling.top_k <= MOST_RANKED or (not sampling.top_k and sampling.top_p >= 1)
    )


def pack_settings(samplings: Sequence[SamplingParams], streams: Sequence[int], rows: int) -> Int32:
    """Settings of draws as 32-bit words [rows, COLUMNS]; rows beyond the given ones are greedy."""
    packed = np.zeros((rows, COLUMNS), np.int32)
    for row, (s, stream) in enumerate(zip(samplings, streams, strict=True)):
        words = packed[row]
        words[TEMPERATURE : TEMPERATURE + 1] = np.array([s.temperature], np.float32).view(np.int32)
        words[TOP_K] = min(s.top_k, (1 << 31) - 1)
        words[TOP_P:GAP] = np.array([s.top_p, s.min_p]).view(np.int32)
        words[GAP : GAP + 1] = np.array([gap(s)], np.float32).view(np.int32)
        words[SEED:STREAM] = np.array([s.seed or 0], np.uint64).view(np.int32)
        words[STREAM] = stream
    return packed


def unpack_settings(words: Int32) -> tuple[SamplingParams, int]:
    """A row of `pack_settings`: how to draw, and the stream of the noise."""
    temperature = float(words[TEMPERATURE : TEMPERATURE + 1].view(np.float32)[0])
    top_p, min_p = words[TOP_P:GAP].copy().view(np.float64).tolist()
    seed = int(words[SEED:STREAM].copy().view(np.uint64)[0])
    return SamplingParams(temperature, int(words[TOP_K]), top_p, min_p, seed=seed), int(words[STREAM])


def draw_rows(logits: Float32, settings: Int32, positions: NDArray[Any]) -> tuple[NDArray[np.int64], Float32]:
    """Tokens [M] drawn from logits [M, vocabulary], and the probability of each among those it could be."""
    tokens, sure = np.zeros(len(logits), np.int64), np.zeros(len(logits), np.float32)
    for row, position in enumerate(positions.tolist()):
        if position >= 0:
            tokens[row], sure[row] = guess(logits[row], *unpack_settings(settings[row]), position)
    return tokens, sure


def guess(logits: Float32, sampling: SamplingParams, stream: int, position: int) -> tuple[int, float]:
    """The token drawn from logits [vocabulary], and its probability among those it could be."""
    token = draw(logits, sampling, position, stream)
    if sampling.temperature == 0:
        return token, float(1 / np.exp(logits - logits[token]).sum())
    ids, weights = allowed(logits, sampling)
    return token, float(weights[ids == token].sum() / weights.sum())


@dataclass(frozen=True)
class DeviceRow:
    """A row of logits on a device, and the token drawn from it there; `numpy.asarray` fetches the logits."""

    logits: Tensor  # [vocabulary]
    token: int  # -1: not drawn
    sampling: SamplingParams | None = None  # it was drawn with
    position: int = 0  # it was drawn for

    def drawn(self, sampling: SamplingParams, position: int) -> int | None:
        """The token, if that is how it was drawn."""
        same = self.token >= 0 and sampling == self.sampling and position == self.position
        return self.token if same else None

    def copy(self) -> Float32:
        return np.asarray(self)

    def __len__(self) -> int:
        return len(self.logits)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return self.logits.cpu().numpy().astype(dtype or np.float32, copy=True)


@dataclass(frozen=True)
class DeviceRows:
    """Rows of logits; see `types.Rows`."""

    rows: tuple[DeviceRow, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    @overload
    def __getitem__(self, rows: int) -> Row: ...
    @overload
    def __getitem__(self, rows: slice) -> DeviceRows: ...
    def __getitem__(self, rows: int | slice) -> Row | DeviceRows:
        return DeviceRows(self.rows[rows]) if isinstance(rows, slice) else self.rows[rows]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array([np.asarray(row, dtype or np.float32) for row in self.rows])
