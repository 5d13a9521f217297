"""A model pair in PyTorch: the three verbs over programs of fixed shape and static K/V memory.

A pass has 16 rows, or a power of two more on CUDA devices, whatever of it is padding, and a row of it is computed in an
order that depends on that row alone. So a row's bits do not depend on its company, and one recording of a pass serves
all batches of up to that many rows.

A round waits for the device once: guesses stay there, with stand-ins for them here (see `types.Drafts`), until the pass
that checks them is done, and come back with the tokens drawn from it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from paceline.backends import native_sampler
from paceline.backends.torch import ops
from paceline.backends.torch.cuda_graphs import Program, Recorder
from paceline.backends.torch.device_sampler import COLUMNS, DeviceRow, DeviceRows, on_device, pack_settings
from paceline.backends.torch.layers import Source, nbytes, place_drafter, place_target
from paceline.backends.torch.matrix import FORMATS, plain_format
from paceline.backends.torch.memory import SlotMemory, TorchSnapshot
from paceline.backends.torch.program import DrafterProgram, Rows, TargetProgram
from paceline.config import DrafterConfig, TargetConfig, check_pair
from paceline.errors import BackendError
from paceline.types import GREEDY, Anchors, Batch, Drafts, Float32, Int32, Output, Row, SamplingParams

TILE = 16  # rows of the smallest pass
LEAST_SPAN = 1024  # positions that the smallest recording can look back on
MOST_DRAFTS = 15  # of an anchor


class TorchBackend:
    """A loaded model pair and its K/V memory; see `backends.base.Backend` for the verbs.

    Args:
        target: settings and weights.
        drafter: the same of the drafter, or None for plain decoding.
        quant: format of the target's weights.
        context: positions a slot can hold.
        slots: sequences held at once.
        max_rows: most rows of one slot in one batch.

    Raises:
        PairError: the drafter is another target's.
    """

    stops_early = False  # every stop would wait for the device

    def __init__(
        self,
        target: tuple[TargetConfig, Source],
        drafter: tuple[DrafterConfig, Source] | None = None,
        *,
        quant: str,
        context: int,
        slots: int = 1,
        max_rows: int = 256,
    ) -> None:
        config, source = target
        if drafter:
            check_pair(config, drafter[0])
        self.device = source.device
        self.vocab_size, self.context, self.max_rows, self.slots = config.vocab_size, context, max_rows, slots
        self.threads = torch.get_num_threads()
        self._hidden_size = config.hidden_size
        self._dtype = FORMATS[plain_format(quant)]
        layers = place_target(config, source)
        self.weight_bytes = nbytes(replace(layers, ple_table=None))  # of that one, a row is read
        self._memory = SlotMemory(config, slots, context, max_rows, self._dtype, self.device)
        self._target = TargetProgram(layers, self._memory, self._dtype)
        self._drafter = None
        if drafter:
            sources = {sliding: config.last_layer(sliding=sliding) for sliding in (True, False)}
            known = {sliding: index for sliding, index in sources.items() if index is not None}
            self._drafter = DrafterProgram(place_drafter(*drafter), self._target, self._memory, known)
        self._recorder = Recorder(self.device)
        self._tallest = height(max_rows) if self.device.type == "cuda" else TILE
        # Guesses of the last call of `draft`: stand-in -1 - n is number n of them.
        self._guesses = torch.zeros(height(slots) * MOST_DRAFTS, dtype=torch.int64, device=self.device)
        self._sure = torch.zeros(len(self._guesses), dtype=torch.float32, device=self.device)
        self._round, self._known = 0, Known(0, np.zeros(0, np.int32), np.zeros(0, np.float32))
        self._logits: dict[int, Tensor] = {}  # by rows wanted, of the last pass
        self._free = list(range(slots))[::-1]

    @property
    def can_draft(self) -> bool:
        return self._drafter is not None

    def open_slot(self) -> int:
        if not self._free:
            raise BackendError("all cache slots are taken; finish or cancel a sequence first")
        return self._free.pop()

    def close_slot(self, slot: int) -> None:
        self._memory.clear(slot)
        self._free.append(slot)

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Output:
        """See `Backend.forward`. Logits that stay on the device are overwritten by the next call."""
        self._check(batch)
        several = len(batch) > self._tallest
        samplings = iter(batch.samplings)
        found: list[DeviceRow] = []
        hidden = [np.zeros((0, self._hidden_size), np.float32)]
        for start in range(0, len(batch), self._tallest):
            part = slice(start, start + self._tallest)
            wanted = np.flatnonzero(batch.wanted[part])
            drawing = [next(samplings, None) for _ in wanted]
            rows = self._pass(batch.slots[part], batch.positions[part], batch.tokens[part], wanted, drawing)
            found += [replace(row, logits=row.logits.clone()) for row in rows[0]] if several else rows[0]
            hidden.append(rows[1])
        for slot, position in zip(batch.slots.tolist(), batch.positions.tolist(), strict=True):
            self._memory.extend(slot, position + 1)
        return Output(DeviceRows(tuple(found)), np.concatenate(hidden))

    def _pass(
        self,
        slots: Int32,
        positions: Int32,
        tokens: Int32,
        wanted: NDArray[np.int64],
        drawing: list[SamplingParams | None],
    ) -> tuple[list[DeviceRow], Float32]:
        """Run the rows of one pass: the wanted ones, and their hidden states [W, hidden]."""
        count, width = height(len(tokens)), height(len(wanted)) if len(wanted) else 0
        settings = [s if s and on_device(s) else None for s in drawing]
        drawn_at = np.where([s is not None for s in settings], positions[wanted] + 1, -1)
        ranked = any(s and s.temperature > 0 and s.top_k for s in settings)
        span = span_of(int(positions.max()) + 1)
        words = np.concatenate(
            [
                padded(tokens, count, 0),
                padded(slots, count, 0),
                padded(positions, count, -1),
                padded(wanted, width, -1),
                padded(drawn_at, width, -1),
                pack_settings([s or GREEDY for s in settings], [0] * len(settings), width).ravel(),
            ]
        )
        program = self._checks(count, width, span, ranked)
        outputs = self._recorder.run(("pass", count, width, span, ranked), program, words)
        (found,) = self._recorder.fetch(*outputs)
        if not width:
            return [], np.zeros((0, self._hidden_size), np.float32)
        drawn, guesses, sure, states = np.split(found, np.cumsum([width, len(self._guesses), len(self._guesses)]))
        self._known = Known(self._round, guesses, sure.view(np.float32))
        logits = self._logits[width]
        rows = [
            DeviceRow(logits[row], int(drawn[row]) if s else -1, s, int(drawn_at[row]))
            for row, s in enumerate(settings)
        ]
        return rows, states.view(np.float32).reshape(width, -1)[: len(wanted)]

    def _checks(self, count: int, width: int, span: int, ranked: bool) -> Program:
        """A pass of `count` rows of which `width` are wanted, as words to words; logits stay on the device."""
        if width not in self._logits:  # of its own: what recordings allocate is other recordings' to overwrite
            self._logits[width] = torch.empty((width, self.vocab_size), dtype=torch.float32, device=self.device)
        logits = self._logits[width]

        def program(words: Tensor) -> tuple[Tensor, ...]:
            tokens, slots, positions = words[: 3 * count].long().view(3, -1)
            wanted, drawn_at = words[3 * count : 3 * count + 2 * width].long().view(2, -1)
            known = torch.where(tokens < 0, self._guesses[(-1 - tokens).clamp(min=0)], tokens)
            states = self._target.run(Rows(known, slots, positions), wanted if width else None, span)
            if states is None:
                return (self._sure,)
            self._target.logits(states, logits)
            settings = words[3 * count + 2 * width :].view(-1, COLUMNS)
            drawn, _ = ops.draw(logits, settings, drawn_at, ranked)
            found = [drawn.int(), self._guesses.int(), self._sure.view(torch.int32)]
            return (torch.cat([*found, states.float().view(torch.int32).flatten()]),)

        return program

    @torch.inference_mode()
    def draft(self, anchors: Anchors) -> Drafts:
        if self._drafter is None:
            raise BackendError("no drafter is loaded")
        depths = [plan.depth for plan in anchors.plans]
        count, depth = height(len(depths)), max(depths)
        span = span_of(int(anchors.positions.max()))
        ranked = any(s.temperature > 0 and s.top_k for s in anchors.samplings)
        hidden = np.zeros((count, self._hidden_size), np.float32)
        hidden[: len(depths)] = anchors.hidden
        words = np.concatenate(
            [
                padded(anchors.tokens, count, 0),
                padded(anchors.slots, count, 0),
                padded(anchors.positions, count, -1),
                pack_settings(anchors.samplings, anchors.streams, count).ravel(),
                hidden.view(np.int32).ravel(),
            ]
        )
        program = self._guessing(count, depth, span, ranked, anchors.with_logits)
        key = ("draft", count, depth, span, ranked, anchors.with_logits)
        logits = tuple(part.clone() for part in self._recorder.run(key, program, words))
        self._round += 1
        shape = len(depths), depth
        stand_ins = -1 - np.arange(shape[0] * depth, dtype=np.int32).reshape(shape)
        lengths = np.array(depths, np.int32)
        if anchors.with_logits and self.device.type == "cuda":  # these must be drawn as they say, and some cannot be
            lengths[[not on_device(s) for s in anchors.samplings]] = 0
        later = partial(self._settled, self._round, shape, lengths, logits)
        return Drafts(stand_ins, np.zeros(shape, np.float32), lengths, None, later)

    def _guessing(self, count: int, depth: int, span: int, ranked: bool, with_logits: bool) -> Program:
        """The steps of a round for `count` anchors; guesses stay on the device."""
        drafter = self._drafter
        assert drafter is not None

        def program(words: Tensor) -> tuple[Tensor, ...]:
            tokens, slots, positions = words[: 3 * count].long().view(3, -1)
            settings = words[3 * count : (3 + COLUMNS) * count].view(-1, COLUMNS)
            hidden = words[(3 + COLUMNS) * count :].view(torch.float32).view(count, -1).to(self._dtype)
            guesses = drafter.run(
                Rows(tokens, slots, positions),
                hidden,
                settings,
                depth=depth,
                span=span,
                ranked=ranked,
                with_logits=with_logits,
            )
            self._guesses[: count * depth] = guesses.tokens.flatten()
            self._sure[: count * depth] = guesses.confidence.flatten()
            return () if guesses.logits is None else (guesses.logits,)

        return program

    def _settled(self, number: int, shape: tuple[int, int], lengths: Int32, logits: tuple[Tensor, ...]) -> Drafts:
        """What the stand-ins of a call of `draft` stood for."""
        if self._known.number != number:  # no pass has brought them yet
            assert number == self._round
            guesses, sure = self._recorder.fetch(self._guesses.int(), self._sure.view(torch.int32))
            self._known = Known(number, guesses, sure.view(np.float32))
        size = shape[0] * shape[1]
        tokens, confidence = self._known.guesses[:size].reshape(shape), self._known.sure[:size].reshape(shape)
        rows = logits[0][: shape[0]].cpu().numpy() if logits else None
        return Drafts(tokens, confidence, lengths, rows)

    def draw(self, logits: Row, sampling: SamplingParams, position: int) -> int:
        if isinstance(logits, DeviceRow):
            token = logits.drawn(sampling, position)
            if token is not None:
                return token
        return native_sampler.draw(logits, sampling, position)

    def allowed(self, logits: Row, sampling: SamplingParams) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        return native_sampler.allowed(logits, sampling)

    def truncate(self, slot: int, length: int) -> None:
        self._memory.truncate(slot, length)

    def save(self, slot: int) -> TorchSnapshot:
        return self._memory.save(slot)

    def restore(self, slot: int, snapshot: TorchSnapshot) -> None:
        self._memory.restore(slot, snapshot)

    def _check(self, batch: Batch) -> None:
        """Refuse rows that do not continue their slot's cache."""
        expected: dict[int, int] = {}
        previous = -1
        for slot, position in zip(batch.slots.tolist(), batch.positions.tolist(), strict=True):
            if not 0 <= slot < self.slots or (slot in expected and slot != previous):
                raise BackendError(f"a batch the caches cannot take: slot {slot}")
            start = expected.get(slot, self._memory.length[slot])
            if position != start or position >= self.context:
                raise BackendError(f"a batch the caches cannot take: position {position} where {start} follows")
            if position - self._memory.length[slot] >= self.max_rows:
                raise BackendError(f"a batch the caches cannot take: more than {self.max_rows} rows of a slot")
            expected[slot], previous = position + 1, slot


@dataclass(frozen=True)
class Known:
    """The guesses that a call of `draft` left, on the host."""

    number: int  # of the call
    guesses: Int32
    sure: Float32


def height(rows: int) -> int:
    """Rows of the pass that so many are padded to."""
    return max(TILE, power_of_two(rows))


def span_of(positions: int) -> int:
    """Positions that the recording for so many can look back on: few sizes, so that few are recorded."""
    span = LEAST_SPAN
    while span < positions:
        span *= 4
    return span


def power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


def padded(numbers: NDArray[Any], length: int, filling: int) -> Int32:
    out = np.full(length, filling, np.int32)
    out[: len(numbers)] = numbers
    return out
