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

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from paceline import _cpu
from paceline.backends.cpu.backend import CpuBackend
from paceline.checkpoint.names import EMBEDDING
from paceline.checkpoint.sizes import cache_bytes
from paceline.config import TargetConfig
from paceline.decode.constraints import constraint_of
from paceline.train.shape import sources
from paceline.train.work import write_bytes
from paceline.types import Draft, Float32, Int32, SamplingParams, Work

SHARD = 16  # texts
TOGETHER = 64  # texts written at once
CACHE_BYTES = 2 << 30  # of their KV cache
KEPT = 64  # best logits of a position: official settings sample from no more
ROWS = 32  # of a prompt in one pass
KINDS = {"sliding": True, "full": False}


def position_bytes(config: TargetConfig) -> int:
    """Bytes that are kept of a position."""
    layers = [config.layers[index] for index in sources(config)]
    keys_values = sum(2 * layer.kv_heads * layer.head_dim for layer in layers)
    return 2 * (config.hidden_size + keys_values) + (4 + 2) * min(KEPT, config.vocab_size) + 4


def at_once(config: TargetConfig, length: int) -> int:
    """How many texts of a length are written together, as far as memory goes: whole shards, or a part of one."""
    most = max(1, min(TOGETHER, CACHE_BYTES // cache_bytes(config, length)))
    return most // SHARD * SHARD or most


@dataclass
class Recording:
    """A text that the target continues, and what it does at every position.

    Args:
        tokens: the prompt; what the target writes is appended.
        params: how it is sampled.
    """

    tokens: list[int]
    params: SamplingParams
    slot: int = -1
    ended: bool = False
    states: list[Float32] = field(default_factory=list)  # [rows, H] each
    ids: list[Int32] = field(default_factory=list)  # [rows, K] each, as are the next
    logits: list[Float32] = field(default_factory=list)
    rows: dict[str, list[Float32]] = field(default_factory=lambda: {kind: [] for kind in KINDS})  # keys and values
    cached: int = 0  # tokens in the KV cache
    kept: int = 0  # of which keys and values were read

    def __post_init__(self) -> None:
        self._constraint = constraint_of(self.params, self.tokens, None)

    def work(self) -> Work:
        """What to run next: of the prompt `ROWS` tokens, of the text one."""
        first, *rest = self.tokens[self.cached : self.cached + ROWS]
        draft = Draft(tuple(rest), simulated=len(rest))  # accepted whole, whatever is sampled
        return Work(self.slot, self.cached, [first], self.params, draft, self._constraint)

    def tensors(self, length: int) -> dict[str, Tensor]:
        """What was kept, padded to `length` positions; see above, without the first dimension."""
        padding = length - len(self.tokens)
        logits = np.concatenate(self.logits)
        out = {
            "tokens": torch.tensor([*self.tokens, *[0] * padding], dtype=torch.int32),
            "lengths": torch.tensor(len(self.tokens), dtype=torch.int32),
            "states": _padded(torch.from_numpy(np.concatenate(self.states)).bfloat16(), 0, padding),
            "top_ids": _padded(torch.from_numpy(np.concatenate(self.ids)), 0, padding),
            "top_logits": _padded(torch.from_numpy(logits - logits[:, :1]).half(), 0, padding),
        }
        for kind, parts in self.rows.items():
            both = _padded(torch.from_numpy(np.concatenate(parts, axis=2)).bfloat16(), 2, padding)
            out |= {f"{kind}.keys": both[0], f"{kind}.values": both[1]}
        return out


@dataclass(frozen=True)
class Recorder:
    """Lets a target write texts, all at once, and records what it does.

    Args:
        backend: the target, with a slot for each text.
        config: its settings.
        stop_ids: tokens that end a text.
        length: tokens of a text at most.
    """

    backend: CpuBackend
    config: TargetConfig
    stop_ids: Collection[int]
    length: int

    def record(self, texts: Sequence[Recording]) -> None:
        """Run prompts, then continue them together until each has `length` tokens or ends."""
        try:
            for text in texts:
                text.slot = self.backend.open_slot()
                while text.cached < len(text.tokens) - 1:
                    self._advance([text])
            while running := [text for text in texts if not text.ended]:
                self._advance(running)
        finally:
            for text in texts:
                if text.slot >= 0:
                    self.backend.close_slot(text.slot)

    def _advance(self, texts: Sequence[Recording]) -> None:
        works = [text.work() for text in texts]
        results = self.backend.run(works)
        states, (ids, logits) = self.backend.states(), self.backend.best(min(KEPT, self.config.vocab_size))
        first = 0
        for text, result in zip(texts, results, strict=True):
            mine = slice(first, first + len(result.sampled))
            first = mine.stop
            text.states.append(states[mine])
            text.ids.append(ids[mine])
            text.logits.append(logits[mine])
            text.cached += len(result.sampled)
            if text.cached == len(text.tokens):
                token = result.sampled[-1]
                text.ended = token in self.stop_ids or len(text.tokens) >= self.length
                if not text.ended:
                    text.tokens.append(token)
            self._keep(text)

    def _keep(self, text: Recording) -> None:
        """Read keys and values now and then: sliding rings forget."""
        count = text.cached - text.kept
        if count < ROWS and not text.ended:
            return
        for kind, layer in zip(KINDS, sources(self.config), strict=True):
            text.rows[kind].append(self.backend.keys_values(layer, text.slot, text.kept, count))
        text.kept = text.cached


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

    def size(self, number: int) -> int:
        """Tokens of a shard, padding not counted."""
        with safe_open(self.path(number), "pt") as file:
            return int(file.get_tensor("lengths").sum())

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
