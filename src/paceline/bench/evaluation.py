"""What weight formats cost in quality: perplexity over texts, and the distance of predictions from a reference's.

Every model runs over the same windows of the same texts. A pass is a round whose drafted tokens are the text's own, so
that the logits of all its rows come back. The reference's logits wait in an unnamed file, four bytes for each token of
the vocabulary and position. So one model is in memory at a time, and beside it a few times `ROWS` rows of logits.
"""

from __future__ import annotations

import gc
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paceline.backends.base import Backend
from paceline.bench.audit import finite
from paceline.bench.loading import machine_of
from paceline.checkpoint import Checkpoint, locate, resolve
from paceline.checkpoint.names import PLE_TABLE, expected_tensors
from paceline.config import TargetConfig
from paceline.engine.engine import Engine
from paceline.errors import BackendError, PairError, PromptError, SettingsError
from paceline.files import cache_folder
from paceline.quant.recipes import RECIPES
from paceline.types import GREEDY, Draft, Float32, Work

ROWS = 32  # of one pass; with a vocabulary of 262,144 the logits of a row are a megabyte
TIMED = 9  # passes of one row, of which the first is not counted
FULL_WIDTH = {"F32", "F16", "BF16"}  # element types that are not quantised

Progress = Callable[[str, int, int], None]  # what is done, positions done, of how many


@dataclass(frozen=True)
class Choice:
    """A model in a weight format, with a KV cache in a format."""

    model: str
    quant: str
    kv: str = "auto"


@dataclass(frozen=True)
class Window:
    """A stretch of a text. Each token but the first is predicted from those before it."""

    text: int
    tokens: list[int]

    @property
    def positions(self) -> int:
        return len(self.tokens) - 1


@dataclass
class Scores:
    """What one model made of the windows, position by position."""

    loss: list[float] = field(default_factory=list)  # nats
    kl: list[float] = field(default_factory=list)  # of the reference's distribution to this one's, nats
    same: list[bool] = field(default_factory=list)  # whether both have the same most likely token


@dataclass(frozen=True)
class Measured:
    """A row of the table."""

    model: str
    quant: str
    kv: str
    weight_bytes: int
    bits_per_weight: float
    tokens_per_s: float  # passes of one row, as in plain decoding
    scores: Scores


# -- what is compared --------------------------------------------------------------------------------------------------


def choose(model: str, quants: Sequence[str], reference: str | None, kv: str = "auto") -> tuple[Choice, list[Choice]]:
    """The reference, and what is compared with it.

    Args:
        model: a model's name.
        quants: recipes, or auto; by default a quantised file as it is, or all recipes smaller than the reference.
        reference: a recipe, another model, or None for the model in the precision of its files.
        kv: format of the KV cache of what is compared; the reference's is always auto.

    Raises:
        CheckpointError: a model cannot be opened.
        SettingsError: a converted folder without a reference, or nothing to compare.
    """
    own, quantised = _stored(model)
    recipes = list(RECIPES)
    if reference in (*recipes, "auto"):
        against = Choice(model, str(reference))
    elif reference is not None:
        against = Choice(reference, _stored(reference)[0])
    elif own == "auto":
        raise SettingsError(f"{model}: holds packed weights alone; name the model to compare it with by --reference")
    else:
        against = Choice(model, own)
    if quants:
        chosen = list(dict.fromkeys(quants))
    elif quantised:
        chosen = ["auto"]
    else:
        widest = against.quant if against.model == model and against.quant in recipes else own
        chosen = recipes[recipes.index(widest) + (against.model == model) :]
    if not chosen:
        raise SettingsError(f"there is no format smaller than {against.quant}; name what to compare with it by --quant")
    return against, [Choice(model, quant, kv) for quant in chosen]


def _stored(model: str) -> tuple[str, bool]:
    """The recipe that loses nothing of a model's files (auto for packed weights), and whether they are quantised."""
    checkpoint = Checkpoint.open(locate(model))
    if checkpoint.packed:
        return "auto", True
    refs = resolve(checkpoint, checkpoint.target_config()).refs
    types = {ref.dtype for name, ref in refs.items() if len(ref.shape) > 1 and name != PLE_TABLE}
    return "bf16" if types == {"BF16"} else "f32", bool(types - FULL_WIDTH)


def bits_per_weight(config: TargetConfig, weight_bytes: int) -> float:
    """Bits of packed matrices for each weight in them, scales and padding included."""
    shapes = expected_tensors(config)
    return 8 * weight_bytes / sum(prod(s) for name, s in shapes.items() if len(s) > 1 and name != PLE_TABLE)


# -- where it is compared ----------------------------------------------------------------------------------------------


def share_out(available: Sequence[int], positions: int) -> list[int]:
    """Positions taken of each text: of all the same number, and what short ones lack from the others."""
    shares, left = [0] * len(available), positions
    for rank, index in enumerate(sorted(range(len(available)), key=available.__getitem__)):
        shares[index] = min(available[index], left // (len(available) - rank))
        left -= shares[index]
    return shares


def cut(texts: Sequence[Sequence[int]], bos_id: int | None, positions: int, context: int) -> list[Window]:
    """Windows of at most `context` tokens that predict `positions` tokens together, or as many as there are.

    Each begins with the bos token, which is not predicted; or, for a model that has none, with the token before those
    it predicts. No token is predicted twice.
    """
    first = 0 if bos_id is not None else 1
    windows = []
    shares = share_out([max(0, len(tokens) - first) for tokens in texts], positions)
    for text, (tokens, share) in enumerate(zip(texts, shares, strict=True)):
        for start in range(first, first + share, context - 1):
            lead = tokens[start - 1] if bos_id is None else bos_id
            windows.append(Window(text, [lead, *tokens[start : min(start + context - 1, first + share)]]))
    return windows


# -- comparing ---------------------------------------------------------------------------------------------------------


class LogitsFile:
    """Logits in the order of their positions, in a file without a name, which is gone when it is closed.

    Args:
        vocab_size: of a row.
        positions: rows there will be.

    Raises:
        SettingsError: there is no room for them.
    """

    def __init__(self, vocab_size: int, positions: int) -> None:
        self._width, self.nbytes, self._folder = vocab_size, 4 * vocab_size * positions, cache_folder()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(self._folder).free < self.nbytes:
                raise self._full("not enough room")
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115, closed in __exit__
        except OSError as error:
            raise self._full(error.strerror) from error

    def __enter__(self) -> LogitsFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def write(self, logits: Float32) -> None:
        """Append rows [n, vocabulary]."""
        try:
            self._file.write(np.ascontiguousarray(logits, np.float32).data)
            self._file.flush()
        except OSError as error:
            raise self._full(error.strerror) from error

    def rewind(self) -> None:
        """Read from the beginning."""
        self._file.seek(0)

    def read(self, rows: int) -> Float32:
        """The next rows [rows, vocabulary]."""
        data = self._file.read(4 * rows * self._width)
        return np.frombuffer(data, np.float32).reshape(rows, self._width)

    def _full(self, reason: str | None) -> SettingsError:
        return SettingsError(
            f"{self._folder}: cannot hold the reference's {self.nbytes / 1e9:.2f} GB of logits ({reason}); "
            "measure fewer --positions, or set PACELINE_CACHE to a folder with room"
        )


def record(backend: Backend, windows: Sequence[Window], kept: LogitsFile, progress: Callable[[int], None]) -> Scores:
    """Run the reference over the windows and keep its logits."""
    scores = Scores()
    for targets, logits in passes(backend, windows):
        kept.write(logits)
        scores.loss += [-float(log_softmax(row)[target]) for target, row in zip(targets, logits, strict=True)]
        progress(len(scores.loss))
    return scores


def compare(backend: Backend, windows: Sequence[Window], kept: LogitsFile, progress: Callable[[int], None]) -> Scores:
    """Run a model over the windows and compare its logits with those of the reference."""
    scores = Scores()
    kept.rewind()
    for targets, logits in passes(backend, windows):
        for target, row, expected in zip(targets, logits, kept.read(len(targets)), strict=True):
            ours, theirs = log_softmax(row), log_softmax(expected)
            scores.loss.append(-float(ours[target]))
            # not a dot product, whose BLAS threads compete with the backend's for processors
            scores.kl.append(float((np.exp(theirs) * (theirs - ours)).sum()))
            scores.same.append(bool(row.argmax() == expected.argmax()))
        progress(len(scores.loss))
    return scores


def log_softmax(logits: Float32) -> NDArray[np.float64]:
    """Logarithms of probabilities [vocabulary], in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max()
    shifted -= np.log(np.exp(shifted).sum())
    return shifted


def passes(backend: Backend, windows: Sequence[Window]) -> Iterator[tuple[list[int], Float32]]:
    """The tokens to predict and the logits [n, vocabulary] that predict them, `ROWS` at most at a time."""
    for window in windows:
        slot = backend.open_slot()
        try:
            for start in range(0, window.positions, ROWS):
                end = min(start + ROWS, window.positions)
                first, *rest = window.tokens[start:end]
                draft = Draft(tuple(rest), simulated=len(rest))  # accepted whole, whatever is sampled
                [result] = backend.run([Work(slot, start, [first], GREEDY, draft, logits=True)])
                if result.logits is None or not np.isfinite(result.logits).all():
                    raise BackendError(
                        f"the model's logits are no numbers ({backend.info.quant}, within the {end} first positions of "
                        "a text); its weights are damaged, or beyond what this format holds"
                    )
                yield window.tokens[start + 1 : end + 1], result.logits
        finally:
            backend.close_slot(slot)


def decode_tokens_per_s(backend: Backend, tokens: Sequence[int]) -> float:
    """Passes of one row a second after some tokens of a text: the speed of plain decoding."""
    start = list(tokens[:ROWS])
    slot = backend.open_slot()
    seconds = []
    backend.run([Work(slot, 0, start)])
    for _ in range(TIMED):
        began = time.perf_counter()
        backend.run([Work(slot, len(start), start[:1], GREEDY)])
        seconds.append(time.perf_counter() - began)
        backend.truncate(slot, len(start))
    backend.close_slot(slot)
    return 1 / statistics.median(seconds[1:])


# -- all of it ---------------------------------------------------------------------------------------------------------


@dataclass
class Evaluation:
    """A model's formats against a reference, one after the other.

    Args:
        texts: by name.
        positions: tokens to predict at most, of all texts together; once `run` has begun, as many as there are.
        context: tokens of a window at most, the bos token included; later the model's own limit if that is less.
        load: loads a model without a drafter, with one slot and `ROWS` rows a pass at least.
        progress: told of every pass.
    """

    texts: Mapping[str, str]
    positions: int
    context: int
    load: Callable[[Choice], Engine]
    progress: Progress = lambda what, done, total: None

    windows: list[Window] = field(default_factory=list)  # known when the reference has been measured
    about: dict[str, Any] = field(default_factory=dict)  # the same, and the machine when all has been measured

    def run(self, reference: Choice, choices: Sequence[Choice]) -> Iterator[Measured]:
        """Measure the reference, then each choice.

        Raises:
            PacelineError: a model cannot be loaded.
            PairError: another vocabulary than the reference's.
            PromptError: a text has no token to predict.
            SettingsError: no room for the reference's logits, or windows longer than a model's context.
        """
        engine = self.load(reference)
        tokens, vocabulary = self._tokenize(engine), engine.backend.info.vocab_size
        self.context = min(self.context, engine.backend.info.context)
        self.windows = cut(tokens, engine.tokenizer.bos_id, self.positions, self.context)
        self.positions = sum(window.positions for window in self.windows)
        total = self.positions * (1 + len(choices))

        def report(number: int, quant: str) -> Callable[[int], None]:
            return lambda done: self.progress(quant, number * self.positions + done, total)

        with LogitsFile(vocabulary, self.positions) as kept:
            self.about = {"positions": self.positions, "context": self.context, "logits_bytes": kept.nbytes}
            scores = record(engine.backend, self.windows, kept, report(0, reference.quant))
            yield self._measured(reference, engine, scores)
            for number, choice in enumerate(choices, start=1):
                del engine
                gc.collect()  # its weights are in cycles
                engine = self.load(choice)
                if choice.model != reference.model:
                    self._check(reference, choice, engine, tokens, vocabulary)
                scores = compare(engine.backend, self.windows, kept, report(number, choice.quant))
                yield self._measured(choice, engine, scores)
            self.about |= _machine(engine.backend)

    def _tokenize(self, engine: Engine) -> list[list[int]]:
        tokens = [engine.tokenizer.encode(text) for text in self.texts.values()]
        least = 1 if engine.tokenizer.bos_id is not None else 2
        for name, found in zip(self.texts, tokens, strict=True):
            if len(found) < least:
                raise PromptError(f"{name}: is too short ({len(found)} tokens); give a text of some sentences at least")
        return tokens

    def _check(
        self, reference: Choice, choice: Choice, engine: Engine, tokens: list[list[int]], vocabulary: int
    ) -> None:
        if engine.backend.info.vocab_size != vocabulary or self._tokenize(engine) != tokens:
            raise PairError(
                f"{choice.model} has another vocabulary than {reference.model}; give a --reference with the same tokens"
            )
        if engine.backend.info.context < self.context:
            raise SettingsError(
                f"windows of {self.context} tokens do not fit {choice.model}; use --context "
                f"{engine.backend.info.context} or less"
            )

    def _measured(self, choice: Choice, engine: Engine, scores: Scores) -> Measured:
        info = engine.backend.info
        return Measured(
            model=choice.model,
            quant=info.quant,
            kv=info.kv,
            weight_bytes=info.weight_bytes,
            bits_per_weight=bits_per_weight(engine.target_config, info.weight_bytes),
            tokens_per_s=decode_tokens_per_s(engine.backend, self.windows[0].tokens[:-1]),
            scores=scores,
        )

    def report(self, measured: Measured) -> dict[str, Any]:
        """Figures of a row, over all texts and for each."""
        of = np.repeat([window.text for window in self.windows], [window.positions for window in self.windows])
        return {
            "model": measured.model,
            "quant": measured.quant,
            "kv": measured.kv,
            "weight_bytes": measured.weight_bytes,
            "bits_per_weight": measured.bits_per_weight,
            "tokens_per_s": measured.tokens_per_s,
            **figures(measured.scores, of >= 0),
            "by_text": {
                name: figures(measured.scores, of == number) for number, name in enumerate(self.texts) if number in of
            },
        }


def _machine(backend: Backend) -> dict[str, Any]:
    bandwidth, about, peak_memory = machine_of(backend)
    for _ in range(3):
        bandwidth.measure()
    return {**about, "read_bandwidth_gb_s": bandwidth.median, "peak_memory_bytes": peak_memory()}


def figures(scores: Scores, chosen: NDArray[np.bool_]) -> dict[str, float | None]:
    """Perplexity, and unless this is the reference KL divergence and agreement, over some of the positions."""
    with np.errstate(over="ignore"):
        perplexity = float(np.exp(np.mean(np.array(scores.loss)[chosen])))
    kl = np.array(scores.kl)[chosen] if scores.kl else None
    return {
        "positions": int(chosen.sum()),
        "perplexity": finite(perplexity),
        "kl_mean": None if kl is None else float(kl.mean()),
        "kl_99_percent": None if kl is None else float(np.quantile(kl, 0.99)),
        "same_top_token": None if kl is None else float(np.mean(np.array(scores.same)[chosen])),
    }
