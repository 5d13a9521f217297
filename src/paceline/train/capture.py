"""What a target does at every position of its texts, captured once by the native backend and kept on disk.

A shard is one safetensors file with `SHARD` texts of at most T positions, padded:

* `tokens` [SHARD, T], and `lengths` [SHARD];
* `states` [SHARD, T, H]: the hidden states that logits are made of, bfloat16;
* `top_ids` and `top_logits` [SHARD, T, K]: the best logits less the very best one, float16;
* `sliding.keys`, `sliding.values`, `full.keys` and `full.values` [SHARD, kv_heads, T, head_dim], bfloat16: of the two
  layers that a drafter reads.

The last text of a shard is of a held-out prompt. `embeddings.safetensors` has what the texts' tokens are to the target.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from paceline import _cpu
from paceline.backends.cpu.backend import CpuBackend
from paceline.checkpoint.names import EMBEDDING
from paceline.config import TargetConfig
from paceline.errors import SettingsError
from paceline.files import atomic_file
from paceline.train.shape import sources
from paceline.types import GREEDY, Draft, Float32, Int32, Work

SHARD = 16  # texts, written by the target at once
KEPT = 64  # best logits of a position: official settings sample from no more
ROWS = 32  # of one pass; with a vocabulary of 262,144 the logits of a row are a megabyte
BLOCKS = 1024  # of a row, whose maxima tell where the best logits begin
KINDS = {"sliding": True, "full": False}


def position_bytes(config: TargetConfig) -> int:
    """Bytes that are kept of a position."""
    layers = [config.layers[index] for index in sources(config)]
    keys_values = sum(2 * layer.kv_heads * layer.head_dim for layer in layers)
    return 2 * (config.hidden_size + keys_values) + (4 + 2) * min(KEPT, config.vocab_size) + 4


def captured(backend: CpuBackend, config: TargetConfig, tokens: Sequence[int], length: int) -> dict[str, Tensor]:
    """What the target does over a text, padded to `length` positions; see above, without the first dimension."""
    layers = dict(zip(KINDS, sources(config), strict=True))
    states, tops, rows = [], [], {kind: [] for kind in KINDS}  # type: ignore[var-annotated]
    slot = backend.open_slot()
    try:
        for start in range(0, len(tokens), ROWS):
            first, *rest = tokens[start : start + ROWS]
            draft = Draft(tuple(rest), simulated=len(rest))  # accepted whole, whatever is sampled
            [result] = backend.run([Work(slot, start, [first], GREEDY, draft, logits=True)])
            assert result.logits is not None
            states.append(backend.states())
            tops += [best(row) for row in result.logits]
            for kind, layer in layers.items():
                rows[kind].append(backend.keys_values(layer, slot, start, len(rest) + 1))
    finally:
        backend.close_slot(slot)
    padding = length - len(tokens)
    ids, logits = (torch.from_numpy(np.stack(part)) for part in zip(*tops, strict=True))
    out = {
        "tokens": torch.tensor([*tokens, *[0] * padding], dtype=torch.int32),
        "lengths": torch.tensor(len(tokens), dtype=torch.int32),
        "states": _padded(torch.from_numpy(np.concatenate(states)).bfloat16(), 0, padding),
        "top_ids": _padded(ids, 0, padding),
        "top_logits": _padded(logits.half(), 0, padding),
    }
    for kind in KINDS:
        both = _padded(torch.from_numpy(np.concatenate(rows[kind], axis=2)).bfloat16(), 2, padding)
        out |= {f"{kind}.keys": both[0], f"{kind}.values": both[1]}
    return out


def best(logits: Float32) -> tuple[Int32, Float32]:
    """The KEPT best tokens of a row [vocabulary], best first, and their logits less the best."""
    count, width = min(KEPT, len(logits)), len(logits) // BLOCKS or 1
    # The maxima of disjoint blocks are logits, too, so the best of all are no worse than the best of them.
    maxima = logits[: len(logits) // width * width].reshape(-1, width).max(axis=1)
    least = np.partition(maxima, len(maxima) - count)[len(maxima) - count]
    found = np.flatnonzero(logits >= least)  # few of many: sorting them all would take milliseconds
    found = found[np.argsort(-logits[found], kind="stable")[:count]]
    return found.astype(np.int32), logits[found] - logits[found[0]]


def _padded(x: Tensor, dim: int, padding: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] = padding
    return torch.cat((x, x.new_zeros(shape)), dim).contiguous()


@dataclass(frozen=True)
class Shards:
    """The shards in a folder."""

    folder: Path

    def path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.safetensors"

    def write(self, number: int, texts: Sequence[dict[str, Tensor]]) -> None:
        """Raises `SettingsError` where there is no room."""
        data = save({name: torch.stack([text[name] for text in texts]) for name in texts[0]})
        write_bytes(self.path(number), data)

    def read(self, number: int, rows: Sequence[int]) -> dict[str, Tensor]:
        """Some texts of a shard."""
        with safe_open(self.path(number), "pt") as file:
            names = list(file.keys())
            return {name: torch.stack([file.get_slice(name)[row] for row in rows]) for name in names}

    def tokens(self, count: int) -> Iterator[Tensor]:
        """Of each shard [SHARD, T]."""
        for number in range(count):
            with safe_open(self.path(number), "pt") as file:
                yield file.get_tensor("tokens")

    def top_shares(self, count: int, vocabulary: int) -> Tensor:
        """How much probability the target gave to each token of the vocabulary, over all texts: [vocabulary]."""
        total = torch.zeros(vocabulary)
        for number in range(count):
            with safe_open(self.path(number), "pt") as file:
                ids, logits = file.get_tensor("top_ids"), file.get_tensor("top_logits")
                seen = torch.arange(ids.shape[1]) < file.get_tensor("lengths")[:, None]
            total.index_add_(0, ids[seen].flatten().long(), logits[seen].float().softmax(-1).flatten())
        return total


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file at once.

    Raises:
        SettingsError: there is no room, or no leave to write.
    """
    try:
        with atomic_file(path) as file:
            file.write(data)
    except OSError as error:
        cure = "free some, or give a smaller --budget" if error.errno == errno.ENOSPC else "give another OUT"
        raise SettingsError(f"{path.parent}: cannot be written ({error.strerror}); {cure}") from error


def embeddings(backend: CpuBackend, tokens: Int32) -> Float32:
    """What tokens [n] are to the target: [n, H]."""
    tensors = backend.weights.tensors
    table, scale = tensors[EMBEDDING], tensors["embed_tokens.scale"]
    assert isinstance(table, _cpu.Matrix)
    assert isinstance(scale, np.ndarray)
    out = np.empty((len(tokens), table.shape[1]), np.float32)
    for row, token in enumerate(tokens):
        out[row] = table.row(token)
    out *= scale
    return out
