"""Which columns of a model's matrices matter: the mean squares of what they are multiplied with, over texts.

Quantisation then keeps the error of the products small rather than that of the weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from paceline import _cpu
from paceline.backends.cpu.backend import CpuBackend
from paceline.backends.cpu.weights import Weights, pack_checkpoint
from paceline.checkpoint import Checkpoint, Tensors, resolve
from paceline.checkpoint.sizes import weight_bytes
from paceline.config import DrafterConfig, TargetConfig
from paceline.errors import BackendError, PromptError
from paceline.memory import AUTO_SHARE, available_memory
from paceline.quant.recipes import RECIPES
from paceline.text.tokenizer import Tokenizer
from paceline.types import GREEDY, Draft, Float32, Work

ROWS = 32  # of one pass
CONTEXT = 1024  # tokens that the model sees at most before texts are cut
DRAFTED = 4  # tokens of each draft, one after every pass
LEAST_ROWS = 32  # an expert that saw fewer takes the mean over its layer's experts
NOT_SEARCHED = {"f32", "f16", "bf16", "q8_0"}  # formats whose values do not depend on importance

Progress = Callable[[str, int, int], None]  # what is done, tokens done, of how many
Importance = Mapping[str, Float32]  # [columns] with a mean of 1, by native name; experts are called `name.0`, ...


@dataclass(frozen=True)
class Calibration:
    """What a pair's matrices were multiplied with."""

    target: Importance
    drafter: Importance
    quant: str  # recipe of the target's weights meanwhile
    tokens: int
    seconds: float


def is_searched(quant: str) -> bool:
    """Whether a recipe has formats that calibration changes."""
    return RECIPES[quant].base not in NOT_SEARCHED


def calibrate(
    target: tuple[Checkpoint, TargetConfig],
    drafter: tuple[Checkpoint, DrafterConfig] | None,
    texts: Mapping[str, str],
    quant: str,
    threads: int,
    progress: Progress = lambda what, done, total: None,
) -> Calibration:
    """Run a pair over texts.

    The weights keep the precision of the files where memory allows, else bf16, else they are held by the recipe that
    they are calibrated for. The target reads the texts. After every pass the drafter drafts a few tokens, which the
    target reads too, as it does in decoding. The weights are freed on return.

    Args:
        target: checkpoint and config.
        drafter: the same of the drafter, or None.
        texts: by name.
        quant: the recipe that the weights are to be held by.
        threads: worker threads.
        progress: told of every pass.

    Raises:
        BackendError: not enough memory, or activations that are no numbers.
        CheckpointError: a file ended early, or there is no tokenizer.
        PromptError: a text is empty.
    """
    started = time.perf_counter()
    checkpoint, config = target
    tokenizer = Tokenizer.open(checkpoint.tokenizer, checkpoint.tokenizer_config, config.bos_id, config.vocab_size)
    longest = min(CONTEXT, config.max_positions)
    windows = _windows(tokenizer, texts, longest)
    total = sum(map(len, windows))
    configs: list[TargetConfig | DrafterConfig] = [config, *([drafter[1]] if drafter else [])]
    tensors = [resolve(part[0], part[1]) for part in (target, drafter) if part]
    held = _recipe(configs, tensors, quant)
    weights = [pack_checkpoint(found, one, held, threads=threads) for found, one in zip(tensors, configs, strict=True)]
    backend = CpuBackend(
        (config, weights[0]),
        (drafter[1], weights[1]) if drafter else None,
        threads=threads,
        context=longest + DRAFTED,
        max_rows=ROWS,
    )
    backend.observe()
    for done in _read(backend, windows):
        progress("calibration", done, total)
    return Calibration(
        importance(backend, weights[0]),
        importance(backend, weights[1]) if drafter else {},
        held,
        total,
        time.perf_counter() - started,
    )


def importance(backend: CpuBackend, weights: Weights) -> dict[str, Float32]:
    """The importance of the columns of all matrices that were used since `CpuBackend.observe`.

    An embedding that is the head, too, has that of the head's inputs. In rows that are read, columns matter alike, but
    they are read once for each token, and the whole head is multiplied.

    Args:
        backend: over these weights.
        weights: the target's or the drafter's.

    Raises:
        BackendError: activations were no numbers.
    """
    found = {}
    for name, tensor in weights.tensors.items():
        if not isinstance(tensor, list | _cpu.Matrix):
            continue
        experts = {f"{name}.{i}": one for i, one in enumerate(tensor)} if isinstance(tensor, list) else {name: tensor}
        seen = {key: backend.seen(matrix) for key, matrix in experts.items()}
        rows, squares = sum(n for n, _ in seen.values()), np.sum([own for _, own in seen.values()], axis=0)
        for key, (n, own) in seen.items():
            means = own / n if n >= LEAST_ROWS else squares / max(rows, 1)
            if not np.isfinite(means).all():
                raise BackendError(f"the inputs of {key} are no numbers; the model's weights are damaged")
            if means.any():
                found[key] = (means / means.mean()).astype(np.float32)
    return found


def _recipe(configs: Sequence[TargetConfig | DrafterConfig], tensors: Sequence[Tensors], quant: str) -> str:
    """The most precise recipe that fits the memory at hand."""
    for held in ("file", "bf16"):
        sizes = [weight_bytes(config, held, one.elements) for config, one in zip(configs, tensors, strict=True)]
        if sum(sizes) <= AUTO_SHARE * available_memory():
            return held
    return quant


def _windows(tokenizer: Tokenizer, texts: Mapping[str, str], longest: int) -> list[list[int]]:
    """Tokens of the texts, the bos token in front of each stretch."""
    lead = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    step = longest - len(lead)
    windows = []
    for name, text in texts.items():
        tokens = tokenizer.encode(text)
        if not tokens:
            raise PromptError(f"{name}: is empty; give a text of some pages")
        windows += [[*lead, *tokens[start : start + step]] for start in range(0, len(tokens), step)]
    return windows


def _read(backend: CpuBackend, windows: list[list[int]]) -> Iterator[int]:
    """Run the pair over the windows; gives the tokens read so far after every pass."""
    done = 0
    for tokens in windows:
        slot = backend.open_slot()
        position = 0
        while position < len(tokens):
            first, *rest = tokens[position : position + ROWS]
            # all rows are sampled from, so that the head sees them; the text's own tokens are accepted
            backend.run([Work(slot, position, [first], GREEDY, Draft(tuple(rest), simulated=len(rest)))])
            position += 1 + len(rest)
            if backend.info.has_drafter and position < len(tokens):
                drafted = Draft(length=DRAFTED, simulated=0)
                backend.run([Work(slot, position, [tokens[position]], GREEDY, drafted)])
                position += 1
            yield done + position
        backend.close_slot(slot)
        done += len(tokens)
