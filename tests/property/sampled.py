"""Drafters that make any kind of round, and a loop that draws many short continuations of one prompt.

Imports nothing heavy, so that worker processes start quickly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from paceline import _cpu
from paceline.backends.base import Backend
from paceline.backends.native_sampler import native_draw
from paceline.decode import rules
from paceline.decode.rules import TARGET_STREAM, Coupled, Rejection, Rule
from paceline.decode.sampler import draw, gumbel, uniform_bits
from paceline.engine.sequence import Sequence
from paceline.engine.step import step
from paceline.types import Anchors, Batch, Drafts, Float32, Output, SamplingParams
from tests.support import any_backend, sequence

LENGTH = 3  # tokens of a continuation that are looked at
SLOTS = 128
PROMPT = (3, 1, 4, 1, 5, 9)
NOISE = 1.0  # of a blended drafter's logits


class Wrapper:
    """A backend with another drafter."""

    can_draft = True
    stops_early = True

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> object:
        return getattr(self._backend, name)


class Informed(Wrapper):
    """A drafter that knows each slot's text, lies now and then, stops anywhere, and is sure of anything at all."""

    def __init__(self, backend: Backend, honesty: float, confidence: float | None, seed: int) -> None:
        """Know nothing yet: `texts` is to be filled, by slot, with prompts and what follows them.

        Args:
            backend: the model.
            honesty: share of drafts that are the text's own tokens.
            confidence: of every draft, NaN included; None for anything between 0 and 1.
            seed: of lies, confidence and lengths.
        """
        super().__init__(backend)
        self.texts: dict[int, list[int]] = {}
        self._honesty, self._confidence = honesty, confidence
        self._random = np.random.default_rng(seed)

    def draft(self, anchors: Anchors) -> Drafts:
        depth = max(plan.depth for plan in anchors.plans)
        shape = len(anchors.slots), depth
        tokens = self._random.integers(0, self._backend.vocab_size, shape)
        honest = self._random.random(shape) < self._honesty
        for row, (slot, position) in enumerate(zip(anchors.slots.tolist(), anchors.positions.tolist(), strict=True)):
            known = np.array(self.texts[slot][position + 1 : position + 1 + depth], np.int64)
            tokens[row, : len(known)] = np.where(honest[row, : len(known)], known, tokens[row, : len(known)])
        lengths = np.full(len(anchors.slots), depth)
        if any(plan.floors for plan in anchors.plans):
            lengths = self._random.integers(0, depth + 1, len(anchors.slots))
            tokens[np.arange(depth) >= lengths[:, None]] = -1  # void: nobody may look at these
        sure = self._random.random(shape) if self._confidence is None else np.full(shape, self._confidence)
        return Drafts(tokens.astype(np.int32), sure.astype(np.float32), lengths.astype(np.int32))


class Mirror(Wrapper):
    """A drafter that is the target: it runs each guess through the target itself and draws as the target does."""

    def draft(self, anchors: Anchors) -> Drafts:
        depth = max(plan.depth for plan in anchors.plans)
        newest, drafts = anchors.tokens, []
        for k in range(depth):
            wanted = np.ones(len(newest), np.bool_)
            rows = self._backend.forward(Batch(anchors.slots, anchors.positions + np.int32(k), newest, wanted)).logits
            draws = zip(rows, anchors.samplings, anchors.positions.tolist(), anchors.streams, strict=True)
            newest = np.array([draw(x, s, position + 1 + k, stream) for x, s, position, stream in draws], np.int32)
            drafts.append(newest)
        for slot, position in zip(anchors.slots.tolist(), anchors.positions.tolist(), strict=True):
            self._backend.truncate(slot, position)
        tokens = np.stack(drafts, axis=1)
        return Drafts(tokens, np.ones(tokens.shape, np.float32), np.full(len(tokens), depth, np.int32))


class Blend(Wrapper):
    """A drafter half right: its logits are the target's, of the true context, plus a fixed disturbance."""

    def __init__(self, backend: Backend, tables: list[Float32], greedy: bool = False) -> None:
        """Take the target's logits.

        Args:
            backend: the model, with SLOTS slots.
            tables: logits behind PROMPT and 1 and 2 tokens more, [vocabulary] * 2 and [vocabulary] * 3.
            greedy: guess the most likely token, which no rule but `Coupled` may be told.
        """
        super().__init__(backend)
        random = np.random.default_rng(1)
        noisy = [(t + NOISE * random.standard_normal(t.shape)).astype(np.float32) for t in tables]
        self._behind_one, self._behind_two = noisy
        self._greedy = greedy
        self._text = np.zeros((SLOTS, backend.context), np.int32)

    def forward(self, batch: Batch) -> Output:
        self._text[batch.slots, batch.positions] = batch.tokens
        return self._backend.forward(batch)

    def draft(self, anchors: Anchors) -> Drafts:
        depth = max(plan.depth for plan in anchors.plans)
        before, newest = self._text[anchors.slots, anchors.positions - 1], anchors.tokens
        tokens = np.zeros((len(newest), depth), np.int32)
        logits = np.zeros((*tokens.shape, self._backend.vocab_size), np.float32)
        settings = [native_draw(s, stream) for s, stream in zip(anchors.samplings, anchors.streams, strict=True)]
        for k in range(depth):
            first = (anchors.positions + k == len(PROMPT))[:, None]
            logits[:, k] = np.where(first, self._behind_one[newest], self._behind_two[before, newest])
            positions = (anchors.positions + 1 + k).tolist()
            draws = zip(logits[:, k], settings, positions, strict=True)
            tokens[:, k] = [_cpu.draw(x, setting, position) for x, setting, position in draws]
            if self._greedy:
                tokens[:, k] = logits[:, k].argmax(axis=1)
            before, newest = newest, tokens[:, k]
        return Drafts(tokens, np.ones(tokens.shape, np.float32), np.full(len(tokens), depth, np.int32), logits)


class SharedNoise(Rejection):
    """A mistake on purpose: the ratio test over drafts made of the noise that replaces them."""

    stream = TARGET_STREAM


RULES: dict[str, Callable[..., Rule]] = {
    "coupled": Coupled,
    "rejection": Rejection,
    "shared noise": SharedNoise,
    "arg max": Rejection,  # another mistake: see `Job`
}


@dataclass(frozen=True)
class Job:
    """What to draw: a continuation for each seed, with the model's own drafter or a blended one."""

    folders: tuple[Path, Path]
    rule: str  # "arg max": the ratio test over drafts that are not drawn, but the drafter's most likely tokens
    sampling: SamplingParams
    depth: int
    tables: list[Float32] | None = None  # of a blended drafter


@dataclass(frozen=True)
class Count:
    continuations: np.ndarray  # [vocabulary] * LENGTH: how often each came
    rounds: int  # with drafts
    accepted: tuple[int, ...]  # rounds that accepted at least 1, 2, ... drafts


def open_backend(folders: tuple[Path, Path]) -> tuple[Backend, list[int]]:
    """A backend and its slots, PROMPT in each of them but for the last token."""
    backend = any_backend(*folders, slots=SLOTS)
    sequences = [sequence(backend, list(PROMPT), max_tokens=1) for _ in range(SLOTS)]
    step(backend, sequences, len(PROMPT))
    slots = [s.slot for s in sequences]
    for slot in slots:
        backend.truncate(slot, len(PROMPT) - 1)
    return backend, slots


def contexts(folders: tuple[Path, Path]) -> list[Float32]:
    """The target's logits behind PROMPT and 0, 1 and 2 tokens more, by plain passes over all of them."""
    backend, slots = open_backend(folders)
    vocabulary = np.arange(backend.vocab_size, dtype=np.int32)
    slots = slots[: len(vocabulary)]

    def logits(tokens: np.ndarray, position: int) -> Float32:
        for slot in slots:
            backend.truncate(slot, position)
        wanted = np.ones(len(slots), np.bool_)
        batch = Batch(np.array(slots, np.int32), np.full(len(slots), position, np.int32), tokens, wanted)
        return np.array(backend.forward(batch).logits)

    none = logits(np.full(len(slots), PROMPT[-1], np.int32), len(PROMPT) - 1)[0]
    one = logits(vocabulary, len(PROMPT))
    two = [logits(np.full(len(slots), token, np.int32), len(PROMPT) + 1) for token in vocabulary]
    return [none, one, np.stack(two, axis=1)]


def continuations(job: Job, seeds: Iterable[int]) -> Count:
    """Draw a continuation for each seed, many in every step. For a process of its own."""
    backend, free = open_backend(job.folders)
    seeds = list(seeds)
    rules.probabilities = remembered(rules.probabilities)
    rules.uniform_bits = ManySeeds(uniform_bits, seeds, 1)
    rules.gumbel = ManySeeds(gumbel, seeds, backend.vocab_size)
    wrapped = Blend(backend, job.tables, job.rule == "arg max") if job.tables else backend
    left, running = iter(seeds), []
    found: list[list[int]] = []
    kept = np.zeros(job.depth + 1, np.int64)
    while True:
        while free and (seed := next(left, None)) is not None:
            rule = RULES[job.rule](replace(job.sampling, seed=seed), backend.draw)
            running.append(start(backend, free.pop(), rule, job.depth))
        if not running:
            break
        for event in step(wrapped, running, len(PROMPT)):
            if event.drafted:
                kept[event.accepted] += 1
        for s in running:
            if len(s.generated) >= LENGTH:
                found.append(s.generated[:LENGTH])
                backend.truncate(s.slot, len(PROMPT) - 1)
                free.append(s.slot)
        running = [s for s in running if len(s.generated) < LENGTH]
    counts = np.zeros((backend.vocab_size,) * LENGTH, np.int64)
    np.add.at(counts, tuple(np.array(found).T), 1)
    return Count(counts, int(kept.sum()), tuple(kept[::-1].cumsum()[::-1][1:].tolist()))


def remembered(probabilities: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """The same pure function, with its results kept: a quarter of the rejection rule's time goes by in it."""
    known: dict[bytes, np.ndarray] = {}

    def get(logits: Float32, sampling: SamplingParams, lister: rules.Lister) -> np.ndarray:
        key = np.asarray(logits).tobytes()  # of one job, so of the same settings but for the seed
        if key not in known:
            known[key] = probabilities(logits, sampling, lister)
        return known[key]

    return get


class ManySeeds:
    """A function of noise, called for many seeds at once, with the results kept: half the rule's time goes by in it."""

    BLOCK = 2048

    def __init__(self, noise: Callable[..., np.ndarray], seeds: list[int], tokens: int) -> None:
        self._noise, self._seeds, self._tokens = noise, np.array(seeds, np.uint64), tokens
        self._places = {seed: i for i, seed in enumerate(seeds)}
        self._blocks: dict[tuple[int, int, int], np.ndarray] = {}  # [BLOCK, tokens]

    def __call__(self, seed: int, stream: int, position: int, ids: np.ndarray) -> np.ndarray:
        block, row = divmod(self._places[seed], self.BLOCK)
        key = block, stream, position
        if key not in self._blocks:
            if len(self._blocks) > 64:
                self._blocks.clear()
            seeds = self._seeds[block * self.BLOCK : (block + 1) * self.BLOCK, None]
            self._blocks[key] = self._noise(seeds, stream, position, np.arange(self._tokens, dtype=np.int32))
        return self._blocks[key][row, ids]


def start(backend: Backend, slot: int, rule: Rule, depth: int) -> Sequence:
    """A sequence that has all of PROMPT but its last token in the cache already."""
    return Sequence(
        slot=slot,
        tokens=list(PROMPT),
        rule=rule,
        draft_tokens=depth,
        max_tokens=1 << 30,  # so that all rounds draft to the full depth; what follows LENGTH tokens is not looked at
        limit=backend.context,
        stop_ids=frozenset(),
        detokenizer=Nothing(),
        cached=len(PROMPT) - 1,
    )


class Nothing:
    """A detokenizer that writes nothing."""

    def push(self, token: int) -> str:
        return ""

    def finish(self) -> str:
        return ""


def in_parallel(job: Job, count: int, workers: int) -> Count:
    """The continuations of seeds 0 to count - 1; which process draws which changes nothing."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        parts = list(pool.map(continuations, [job] * workers, [range(i, count, workers) for i in range(workers)]))
    accepted = tuple(int(n) for n in np.sum([part.accepted for part in parts], axis=0))
    return Count(sum(part.continuations for part in parts), sum(part.rounds for part in parts), accepted)
