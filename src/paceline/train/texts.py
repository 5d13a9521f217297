"""Texts that a drafter is trained on: prompts, each continued by the target itself, because that is what it drafts for.

A prompt is a line of a file, or the beginning of a stretch of a text. One in `HELD_OUT` is kept for measurements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import paceline
from paceline.engine.engine import Engine
from paceline.errors import ContextError, PromptError
from paceline.sampling_params import or_official
from paceline.types import SamplingParams

HELD_OUT = 10  # one prompt in so many
GREEDY_SHARE = 4  # one text in so many is greedy
SHORTEST = 4  # tokens of a prompt that is cut from a text


@dataclass(frozen=True)
class Prompts:
    """Token ids of prompts."""

    training: list[list[int]]
    held_out: list[list[int]]

    def text(self, number: int, *, held_out: bool) -> list[int]:
        """The prompt of a text: all take turns."""
        prompts = self.held_out if held_out else self.training
        return prompts[number % len(prompts)]


def read_prompts(
    engine: Engine,
    lines: Sequence[str],
    texts: Sequence[str],
    length: int,
    seed: int,
    notify: Callable[[str], None] = lambda _: None,
) -> Prompts:
    """Prompts in an order of chance.

    Args:
        engine: its tokenizer, and its chat template for lines, if it has one.
        lines: prompts; those that leave less than a half of a text to the target are left out.
        texts: they are cut into stretches of `length` tokens, of which up to a half is given to the target.
        length: tokens of a text that is trained on.
        seed: of the order, and of how much of each stretch is given.
        notify: is told how many lines are left out.

    Raises:
        PromptError: fewer than two prompts.
    """
    dice = np.random.default_rng(seed)
    prompts, long = [], 0
    for line in lines:
        try:
            tokens = engine.encode(line, raw=engine.chat_template is None)
        except ContextError:
            long += 1
            continue
        long += len(tokens) > length // 2
        if len(tokens) <= length // 2:
            prompts.append(tokens)
    if long:
        notify(f"prompts: {long} of {len(lines)} are left out because they are longer than half of --length {length}")
    first = [] if engine.tokenizer.bos_id is None else [engine.tokenizer.bos_id]
    for text in texts:
        tokens = engine.tokenizer.encode(text)
        for start in range(0, len(tokens), length):
            given = int(dice.integers(SHORTEST, length // 2))
            prompts.append(first + tokens[start : start + given])
    prompts = [prompts[i] for i in dice.permutation(len(prompts)) if prompts[i]]
    distinct = list(dict.fromkeys(map(tuple, prompts)))  # a prompt given twice is held out as a whole
    if len(distinct) < 2:
        raise PromptError("there is too little text; give two prompts or more, or a longer text")
    held_out = distinct[: max(1, len(distinct) // HELD_OUT)]
    known = set(held_out)
    return Prompts([prompt for prompt in prompts if tuple(prompt) not in known], [list(one) for one in held_out])


def bundled_prompts(engine: Engine) -> list[str]:
    """Short prompts that come with paceline: questions for a model with a chat template, else beginnings of texts."""
    name = "raw.txt" if engine.chat_template is None else "chat.txt"
    return (Path(paceline.__file__).parent / "assets" / "prompts" / name).read_text(encoding="utf-8").splitlines()


def params_of(engine: Engine, number: int, seed: int) -> SamplingParams:
    """How a text is sampled: one in `GREEDY_SHARE` greedily, each with a seed of its own."""
    own = or_official(engine.sampling)
    return replace(own, seed=(seed << 20) + number) if number % GREEDY_SHARE else replace(own, temperature=0.0)
