"""A model pair in PyTorch: rounds as programs of fixed shape over static KV caches.

A pass has 16 rows, or a power of two more on CUDA devices, padding included, and a row of it is computed in an order
that depends on that row alone. So a row's bits do not depend on the rest of the batch, and one recording of a pass
serves all batches of up to that many rows.

Drafted tokens and the states that drafting continues from stay on the device. The host waits for it once a round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, is_dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from paceline.backends import native_sampler
from paceline.backends.torch import ops
from paceline.backends.torch.cuda_graphs import Program, Recorder
from paceline.backends.torch.device_sampler import COLUMNS, on_device, pack_settings, ranked
from paceline.backends.torch.measure import device_name
from paceline.backends.torch.memory import SlotMemory, SlotRows, TorchSnapshot
from paceline.config import DrafterConfig, TargetConfig, check_pair
from paceline.decode.acceptance import accept
from paceline.errors import BackendError
from paceline.models import drafter as drafters
from paceline.models import gemma4
from paceline.models.gemma4 import TensorSource
from paceline.models.matrix import Matrix
from paceline.types import GREEDY, MAX_DRAFT, BackendInfo, Float32, Int32, Result, Work

TILE = 16  # rows of the smallest pass
LEAST_SPAN = 1024  # positions that the smallest recording can look back on


class TorchBackend:
    """A loaded model pair and its KV cache; see `backends.base.Backend` for the methods.

    Args:
        target: config and weights.
        drafter: the same of the drafter, or None for plain decoding.
        quant: format of the target's weights.
        context: positions a slot holds.
        slots: sequences held at once.
        max_rows: most rows of one slot in one step.

    Raises:
        PairError: the drafter is another target's.
    """

    def __init__(
        self,
        target: tuple[TargetConfig, TensorSource],
        drafter: tuple[DrafterConfig, TensorSource] | None = None,
        *,
        quant: str,
        context: int,
        slots: int = 1,
        max_rows: int = 256,
    ) -> None:
        config = target[0]
        if drafter:
            check_pair(config, drafter[0])
        self._target = gemma4.load_target(*target)
        self._drafter = drafters.load_drafter(drafter[0], config, drafter[1]) if drafter else None
        self.device, self._dtype = self._target.decoder.norm.device, self._target.decoder.dtype
        self.info = BackendInfo(
            vocab_size=config.vocab_size,
            context=context,
            slots=slots,
            max_rows=max_rows,
            has_drafter=drafter is not None,
            stops_early=False,  # every stop would wait for the device
            quant=quant,
            kv="f32" if self._dtype == torch.float32 else "bf16",
            # Of these two, single rows are read; a tied embedding counts as the head.
            weight_bytes=nbytes(self._target) - nbytes(self._target.embedding) - nbytes(self._target.ple_table),
            device=device_name(self.device),
        )
        self._memory = SlotMemory(config, slots, context, max_rows, self._dtype, self.device)
        self._recorder = Recorder(self.device)
        self._tallest = height(max_rows) if self.device.type == "cuda" else TILE
        # Drafted tokens of the round, MAX_DRAFT for each sequence that drafts, and the drafter's confidence in them.
        self._drafted = torch.zeros(height(slots) * MAX_DRAFT, dtype=torch.int64, device=self.device)
        self._confidence = torch.zeros(len(self._drafted), dtype=torch.float32, device=self.device)
        # States of the rows of each slot's last round, and one for padding; drafting continues from `_last_row`.
        self._states = torch.zeros(slots * max_rows + 1, config.hidden_size, dtype=self._dtype, device=self.device)
        self._last_row: dict[int, int] = {}  # by slot
        self._free = list(range(slots))[::-1]

    @property
    def threads(self) -> int:
        return torch.get_num_threads()

    @threads.setter
    def threads(self, count: int) -> None:
        torch.set_num_threads(count)

    def open_slot(self) -> int:
        if not self._free:
            raise BackendError("all cache slots are taken; finish or cancel a sequence first")
        return self._free.pop()

    def close_slot(self, slot: int) -> None:
        self._memory.clear(slot)
        self._last_row.pop(slot, None)
        self._free.append(slot)

    def truncate(self, slot: int, length: int) -> None:
        self._memory.truncate(slot, length)

    def save(self, slot: int) -> TorchSnapshot:
        return self._memory.save(slot)

    def restore(self, slot: int, snapshot: TorchSnapshot) -> None:
        self._memory.restore(slot, snapshot)

    @torch.inference_mode()
    def run(self, works: Sequence[Work]) -> list[Result]:
        """See `Backend.run`."""
        self._check(works)
        rounds = [_Round(work) for work in works]
        self._propose([round for round in rounds if round.work.draft.length])
        rows = np.concatenate([round.rows() for round in rounds])
        ends = np.cumsum([len(round.work.tokens) + round.drafts for round in rounds]).tolist()
        sampling = [
            (end - round.sampled_rows + row, round, row)
            for end, round in zip(ends, rounds, strict=True)
            for row in range(round.sampled_rows)
        ]
        for start in range(0, len(rows), self._tallest):
            part = rows[start : start + self._tallest]
            self._verify(part, [(at - start, *of) for at, *of in sampling if 0 <= at - start < len(part)])
        return [self._accept(round) for round in rounds]

    def _propose(self, rounds: list[_Round]) -> None:
        """Start the drafter. Its tokens stay on the device, where the target's pass takes them."""
        if not rounds:
            return
        works = [round.work for round in rounds]
        count, depth = height(len(works)), max(work.draft.length for work in works)
        for number, round in enumerate(rounds):
            round.first_draft = number * depth
        params = [work.params or GREEDY for work in works]
        rank = any(map(ranked, params))
        span = span_of(max(work.position for work in works))
        words = np.concatenate(
            [
                padded([work.tokens[0] for work in works], count, 0),
                padded([work.slot for work in works], count, 0),
                padded([work.position for work in works], count, -1),
                padded([self._last_row[work.slot] for work in works], count, 0),
                pack_settings(params, count).ravel(),
            ]
        )
        self._recorder.run(("draft", count, depth, span, rank), self._drafter_program(count, depth, span, rank), words)

    def _drafter_program(self, count: int, depth: int, span: int, rank: bool) -> Program:
        """All draft steps of a round for `count` sequences."""
        target, drafter = self._target, self._drafter
        assert drafter is not None

        def program(words: Tensor) -> tuple[Tensor, ...]:
            token, slots, positions, state_rows = words[: 4 * count].long().view(4, -1)
            settings = words[4 * count :].view(-1, COLUMNS)
            padding = positions < 0
            rows = SlotRows(self._memory.rows, slots, torch.where(padding, -1, positions - 1), span)
            angles = gemma4.angles_of(drafter.decoder, positions, self._dtype)
            hidden = self._states[state_rows]
            tokens, confidence = [], []
            for step in range(depth):
                state, hidden = drafters.step(drafter, ops, gemma4.embed(target, token), hidden, rows, angles)
                logits = drafters.logits(drafter, ops, state, positions)
                token, share = ops.sample(logits, settings, torch.where(padding, -1, positions + 1 + step), rank)
                tokens.append(token)
                confidence.append(share)
            self._drafted[: count * depth] = torch.stack(tokens, 1).flatten()
            self._confidence[: count * depth] = torch.stack(confidence, 1).flatten()
            return ()

        return program

    def _verify(self, rows: Int32, sampling: list[tuple[int, _Round, int]]) -> None:
        """Run the rows of a pass through the target, and sample a token after some of them.

        Args:
            rows: see `_Round.rows`.
            sampling: after which: number in the pass, round, and number in the round.
        """
        count, width = height(len(rows)), height(len(sampling)) if sampling else 0
        params = [round.work.params if round.on_device else None for _, round, _ in sampling]
        rank = any(ranked(p) for p in params if p)
        span = span_of(int(rows[:, 3].max()) + 1)
        places = [round.work.slot * self.info.max_rows + row for _, round, row in sampling]
        sampled_at = [rows[at, 3] + 1 if p else -1 for (at, *_), p in zip(sampling, params, strict=True)]
        words = np.concatenate(
            [
                *(padded(column, count, void) for column, void in zip(rows.T, (0, -1, 0, -1), strict=True)),
                padded([at for at, *_ in sampling], width, -1),
                padded(places, width, len(self._states) - 1),
                padded(sampled_at, width, -1),
                pack_settings([p or GREEDY for p in params], width).ravel(),
            ]
        )
        program = self._target_program(count, width, span, rank)
        outputs, *logits = self._recorder.run(("pass", count, width, span, rank), program, words)
        on_host = [logits[0][number] for number, (_, round, _) in enumerate(sampling) if round.needs_logits]
        found, *fetched = self._recorder.fetch(outputs, *on_host)
        sampled, drafted, confidence = np.split(found, [width, width + len(self._drafted)])
        host_rows = iter(fetched)
        for token, (_, round, _) in zip(sampled.tolist(), sampling, strict=False):
            round.sampled.append(token)
            if round.needs_logits:
                round.logits.append(next(host_rows))
            mine = slice(round.first_draft, round.first_draft + round.work.draft.length)
            round.drafted, round.confidence = drafted[mine], confidence.view(np.float32)[mine]

    def _target_program(self, count: int, width: int, span: int, rank: bool) -> Program:
        """A pass of `count` rows after `width` of which a token is sampled."""
        target = self._target

        def program(words: Tensor) -> tuple[Tensor, ...]:
            tokens, drafts, slots, positions = words[: 4 * count].long().view(4, -1)
            keep, places, sampled_at = words[4 * count : 4 * count + 3 * width].long().view(3, -1)
            settings = words[4 * count + 3 * width :].view(-1, COLUMNS)
            tokens = torch.where(drafts < 0, tokens, self._drafted[drafts.clamp(min=0)])
            states = gemma4.run(target, ops, tokens, SlotRows(self._memory.rows, slots, positions, span), keep)
            if not width:
                return (words[:0].clone(),)
            self._states[places] = states
            logits = gemma4.logits(target, ops, states)
            sampled, _ = ops.sample(logits, settings, sampled_at, rank)
            return torch.cat([sampled.int(), self._drafted.int(), self._confidence.view(torch.int32)]), logits

        return program

    def _accept(self, round: _Round) -> Result:
        """Accept the drafted tokens that the target sampled, too, and roll back the rest."""
        work, params = round.work, round.work.params
        end = work.position + len(work.tokens)
        self._memory.extend(work.slot, end + round.drafts)
        if params is None:
            return Result()

        def sample(row: int) -> int:
            if round.on_device:
                return round.sampled[row]
            logits = round.logits[row]
            if work.constraint:
                logits = logits.copy()
                work.constraint.apply(logits)
            return native_sampler.sample(logits, params, end + row)

        drafted = work.draft.tokens or tuple(round.drafted.tolist())
        sampled = accept(work, drafted, sample)
        self._memory.truncate(work.slot, end + len(sampled) - 1)
        self._last_row[work.slot] = work.slot * self.info.max_rows + len(sampled) - 1
        logits = np.stack(round.logits[: len(sampled)]) if work.logits else None
        return Result(sampled, drafted, tuple(round.confidence.tolist()), logits)

    def _check(self, works: Sequence[Work]) -> None:
        """Refuse works that do not continue their slot's cache, or do not fit it."""
        info = self.info
        if len({work.slot for work in works}) < len(works):
            raise BackendError("two works of one slot in a step")
        for work in works:
            drafts = len(work.draft.tokens) or work.draft.length
            count = len(work.tokens) + drafts
            if not 0 <= work.slot < info.slots or work.position != self._memory.length[work.slot]:
                raise BackendError(f"slot {work.slot} cannot continue at position {work.position}")
            if work.position + count > info.context:
                raise BackendError(f"{count} rows at position {work.position} do not fit a context of {info.context}")
            if not work.tokens or count > info.max_rows:
                raise BackendError(f"a work of {count} rows, {drafts} of them drafted; the most is {info.max_rows}")
            if work.draft.length > MAX_DRAFT:
                raise BackendError(f"{work.draft.length} tokens to draft; the most is {MAX_DRAFT}")
            if work.draft.length and not self._drafter:
                raise BackendError("no drafter is loaded")
            if work.draft.length and (len(work.tokens) != 1 or work.slot not in self._last_row):
                raise BackendError(f"slot {work.slot} has no sampled token to draft after")


@dataclass
class _Round:
    """A work, and what became of it on the device."""

    work: Work
    first_draft: int = -1  # number of its first token among those that the drafter left on the device
    sampled: list[int] = field(default_factory=list)  # after each row; void unless `on_device`
    logits: list[Float32] = field(default_factory=list)  # of each row, if `needs_logits`
    drafted: Int32 = field(default_factory=lambda: np.zeros(0, np.int32))  # by the drafter
    confidence: Float32 = field(default_factory=lambda: np.zeros(0, np.float32))

    @property
    def drafts(self) -> int:
        return len(self.work.draft.tokens) or self.work.draft.length

    @property
    def sampled_rows(self) -> int:
        """Rows after which a token is sampled: the last ones."""
        return self.drafts + 1 if self.work.params else 0

    @property
    def on_device(self) -> bool:
        """Whether the device samples."""
        return self.work.params is not None and on_device(self.work.params) and not self.work.constraint

    @property
    def needs_logits(self) -> bool:
        """Whether rows of logits go to the host."""
        return self.work.logits or not self.on_device

    def rows(self) -> Int32:
        """The rows [T + K, 4] that it runs: token, number of the drafted token or -1, slot, position."""
        work = self.work
        rows = np.zeros((len(work.tokens) + self.drafts, 4), np.int32)
        rows[:, 0] = [*work.tokens, *(work.draft.tokens or [0] * self.drafts)]
        rows[:, 1] = -1
        if work.draft.length:
            rows[len(work.tokens) :, 1] = range(self.first_draft, self.first_draft + self.drafts)
        rows[:, 2] = work.slot
        rows[:, 3] = range(work.position, work.position + len(rows))
        return rows


def nbytes(part: object) -> int:
    """Bytes of all tensors in a structure of weights."""
    if isinstance(part, Tensor | Matrix):
        return part.nbytes
    if isinstance(part, tuple):
        return sum(map(nbytes, part))
    return sum(map(nbytes, vars(part).values())) if is_dataclass(part) else 0


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


def padded(numbers: ArrayLike, length: int, filling: int) -> Int32:
    out = np.full(length, filling, np.int32)
    out[: np.size(numbers)] = numbers
    return out
