"""`paceline train` from beginning to end: capture, distillation, measurement, export.

Everything in between is kept in a folder beside the result, from which a run that was stopped at any moment goes on:
the settings, the shards of captured texts, the first weights, and the training state. It goes when the result is there.
"""

from __future__ import annotations

import gc
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

import paceline
from paceline.backends.cpu.backend import CpuBackend
from paceline.backends.cpu.processors import default_threads, processors
from paceline.backends.torch.load import open_device
from paceline.checkpoint import Checkpoint, Tensors, locate, resolve
from paceline.checkpoint.names import DRAFT_TOKENS, TOKEN_ORDERING, drafter_tensors
from paceline.checkpoint.tensors import BLOCKS
from paceline.config import DrafterConfig, TargetConfig, check_pair
from paceline.engine.engine import Engine
from paceline.errors import BackendError, CheckpointError, SettingsError
from paceline.models.matrix import pack
from paceline.train import acceptance, capture, texts
from paceline.train.card import card
from paceline.train.distill import DEPTH, MOST_SCORED, Batch, Data, Distillation, embeddings_path
from paceline.train.export import write_model
from paceline.train.optimizer import Parameters
from paceline.train.progress import trained
from paceline.train.run import Run, Step
from paceline.train.shape import new_config, new_drafter, official_json, sources
from paceline.train.work import WorkFolder, digest, identity, write_bytes
from paceline.train.workers import Workers

LEAST_SHARDS = 2
TEXTS, POSITIONS = 4, 96  # of a worker's part of a batch
EXAMINED = 32  # held-out texts, at every save
MEASURED = 100  # held-out prompts, at the end
REPLICA_BYTES = 2 << 30
STATE_BYTES = 30  # of disk a parameter: the training state, twice while it is saved, and the first weights
RATE_FROM = 0.25  # of the rates: what a trained drafter knows is not to be forgotten
FIRST, STATE = "first.safetensors", "state.pt"

Progress = Callable[[str, int, int], None]  # what is done, how much of it, of how much


@dataclass(frozen=True)
class Settings:
    """What a run's result depends on.

    Args:
        target: a model's name.
        start: a drafter's name to start from; empty for a new one.
        quant: format of the target's weights, which the drafter is trained for.
        tokens: positions to capture.
        length: tokens of a text at most.
        minutes: of training.
        hidden_size: of a new drafter; None for what official ones have.
        intermediate_size: likewise.
        draft_vocabulary: tokens of a new drafter's head; None for all.
        seed: of all that is random.
        max_tokens: of each text that acceptance is measured on.
        data: names of the files that prompts and texts are from.
    """

    target: str
    start: str = ""
    quant: str = "auto"
    tokens: int = 400_000
    length: int = 512
    minutes: float = 60.0
    hidden_size: int | None = None
    intermediate_size: int | None = None
    draft_vocabulary: int | None = None
    seed: int = 0
    max_tokens: int = 128
    data: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises `SettingsError` for what no run can have."""
        if not math.isfinite(self.minutes):
            raise SettingsError(f"--minutes is {self.minutes}; give a number of minutes")
        if self.start and (self.hidden_size or self.intermediate_size or self.draft_vocabulary):
            raise SettingsError("a drafter to start from has its own sizes; leave them out, or leave out --from")


@dataclass
class Training:
    """A run.

    Args:
        settings: see there.
        out: the folder to write, which must not exist.
        lines: prompts; None for those that come with paceline, unless there are documents.
        documents: whole texts.
        budget: bytes of disk that captured texts may take.
        threads: of the processor; None for as many as `paceline.load` takes.
        device: of PyTorch, for the distillation.
        notify: receives one-line notices.
        progress: told how far it is.
    """

    settings: Settings
    out: Path
    lines: Sequence[str] | None
    documents: Sequence[str]
    budget: float
    threads: int | None = None
    device: str = "cpu"
    notify: Callable[[str], None] = lambda _: None
    progress: Progress = lambda what, done, total: None
    _engine: Engine | None = field(default=None, init=False)
    _weights: str = field(default="", init=False)  # format of the target's
    _tokens: int = field(default=0, init=False)  # captured

    def run(self) -> dict[str, Any]:
        """Train, or go on where a run was stopped; returns a report for JSON.

        Raises:
            PacelineError: a model that cannot be loaded, settings or texts that cannot be used, no room.
        """
        self.settings.check()
        if (report := self.work.finished()) is not None:
            return report
        if os.path.lexists(self.out):
            raise SettingsError(f"{self.out}: exists already; give a folder that does not")
        open_device(self.device)
        sources(self.target)
        self._begin()
        shards = self._capture()
        self._first_weights(shards)
        self._release()
        weights = self._distil(shards)
        self._write(weights)
        report = self._report(shards, self._measure())
        (self.work.drafter / "README.md").write_text(card(report), encoding="utf-8")
        self.work.finish(report)
        return report

    # -- what it works on ----------------------------------------------------------------------------------------------

    @property
    def work(self) -> WorkFolder:
        return WorkFolder(self.out)

    @cached_property
    def target(self) -> TargetConfig:
        return Checkpoint.open(locate(self.settings.target, self.notify)).target_config()

    @cached_property
    def _start_files(self) -> Checkpoint:
        """Of the drafter to start from."""
        found = Checkpoint.open(locate(self.settings.start, self.notify))
        if found.packed:
            raise CheckpointError(f"{found.path}: holds packed weights alone; give the drafter as published")
        return found

    @cached_property
    def drafter(self) -> DrafterConfig:
        s = self.settings
        if s.start:
            config = self._start_files.drafter_config()
        else:
            config = new_config(self.target, s.hidden_size, s.intermediate_size, s.draft_vocabulary)
        check_pair(self.target, config)
        return config

    @property
    def _parameters(self) -> int:
        return sum(math.prod(shape) for shape in drafter_tensors(self.drafter).values())

    @property
    def _shard_bytes(self) -> int:
        return capture.SHARD * self.settings.length * capture.position_bytes(self.target)

    @property
    def _most_shards(self) -> int:
        """How many fit the budget."""
        if not 0 <= self.budget < math.inf:
            raise SettingsError(f"--budget is {self.budget / 1e9}; give a number of gigabytes")
        if self.settings.length > self.target.max_positions:
            raise SettingsError(f"--length is more than the {self.target.max_positions} tokens that the model can take")
        most = int(self.budget // self._shard_bytes)
        if most < LEAST_SHARDS:
            needed = LEAST_SHARDS * self._shard_bytes / 1e9
            raise SettingsError(f"--budget {self.budget / 1e9:g} is too small; this run needs at least {needed:.2g}")
        return most

    def _begin(self) -> None:
        """Make the work folder, or find that of a run with the same settings."""
        most, models = self._most_shards, [self.settings.target, *filter(None, [self.settings.start])]
        settings = {
            **asdict(self.settings),
            "files": [identity(locate(model, self.notify)) for model in models],
            "texts": digest(*(self.lines or ()), "", *self.documents),
        }
        settings = json.loads(json.dumps(settings))
        if self.work.begun(settings):
            self.work.remove_parts()
            self.notify(f"{self.work.path}: going on with what is there")
            return
        drafter, _ = self.drafter, self._prompts  # what is wrong with them is told before anything is written
        wanted = -(-self.settings.tokens // (capture.SHARD * self.settings.length))
        kept = STATE_BYTES * self._parameters
        self.work.begin(settings, min(most, max(LEAST_SHARDS, wanted)) * self._shard_bytes + kept)
        self.notify(f"drafter: {drafter.hidden_size} wide, head of {drafter.draft_vocab_size:,} tokens")

    # -- the steps -----------------------------------------------------------------------------------------------------

    @property
    def _texts(self) -> capture.Shards:
        return capture.Shards(self.work.path)

    def _open_engine(self) -> Engine:
        if self._engine is None:
            self._engine = paceline.load(
                self.settings.target,
                drafter="none",
                quant=self.settings.quant,
                threads=self.threads,
                context=min(self.settings.length + 1, self.target.max_positions),
                slots=capture.at_once(self.target, self.settings.length),
                prompt_chunk=capture.ROWS,
                draft_tokens=0,
                notify=self.notify,
            )
        return self._engine

    def _release(self) -> None:
        self._engine = None
        gc.collect()  # weights are in cycles

    @cached_property
    def _prompts(self) -> texts.Prompts:
        engine = self._open_engine()
        lines = self.lines
        if lines is None:
            lines = [] if self.documents else texts.bundled_prompts(engine)
        return texts.read_prompts(engine, lines, self.documents, self.settings.length, self.settings.seed, self.notify)

    def _capture(self) -> int:
        """Let the target write texts, and keep what it did, up to the tokens asked for; returns how many shards."""
        done = tokens = 0
        while done < self._most_shards and (done < LEAST_SHARDS or tokens < self.settings.tokens):
            self.progress("writing texts", tokens, self.settings.tokens)
            if not self._texts.path(done).exists():
                self._record(done)
            tokens += self._texts.size(done)
            done += 1
        if tokens < self.settings.tokens:
            self.notify(f"budget: {tokens:,} tokens of text, {self.budget / 1e9:g} GB; --budget allows more")
        self._tokens = tokens
        return done

    def _record(self, first: int) -> None:
        """Write a shard, or as many as are recorded together."""
        engine = self._open_engine()
        backend, length = engine.backend, self.settings.length
        assert isinstance(backend, CpuBackend)
        recorder = capture.Recorder(backend, self.target, engine.stop_ids, length)
        together = backend.info.slots
        shards = range(first, min(first + max(1, together // capture.SHARD), self._most_shards))
        places = [(shard, place) for shard in shards for place in range(capture.SHARD)]
        kept: list[dict[str, Tensor]] = []
        for start in range(0, len(places), together):
            recordings = [self._recording(engine, *place) for place in places[start : start + together]]
            recorder.record(recordings)
            while recordings:
                kept.append(recordings.pop(0).tensors(length))
        for shard in shards:
            self._texts.write(shard, kept[: capture.SHARD])
            del kept[: capture.SHARD]

    def _recording(self, engine: Engine, shard: int, place: int) -> capture.Recording:
        """A text of a shard, whose last one is of a held-out prompt."""
        number, held_out = capture.SHARD * shard + place, place == capture.SHARD - 1
        prompt = self._prompts.text(shard if held_out else number - shard, held_out=held_out)
        return capture.Recording(list(prompt), texts.params_of(engine, number, self.settings.seed))

    def _first_weights(self, shards: int) -> None:
        """The drafter's first weights, and what the texts' tokens are to the target."""
        path, table = self.work.path / FIRST, embeddings_path(self.work.path)
        if path.exists() and table.exists():
            return
        engine = self._open_engine()
        backend = engine.backend
        assert isinstance(backend, CpuBackend)
        tokens = torch.unique(torch.cat([torch.unique(part) for part in self._texts.tokens(shards)]))
        rows = torch.from_numpy(capture.embeddings(backend, tokens.numpy().astype(np.int32))).bfloat16()
        write_bytes(table, save({"tokens": tokens.int(), "embeddings": rows}))
        weights = self._start(backend, shards)
        write_bytes(path, save({name: tensor.contiguous() for name, tensor in weights.items()}))

    def _start(self, backend: CpuBackend, shards: int) -> Parameters:
        config = self.drafter
        if self.settings.start:
            found = resolve(self._start_files, config)
            return {name: _values(found, name) for name in found.refs}
        chosen = None
        if config.restricted:
            shares = self._texts.top_shares(shards, config.vocab_size)
            chosen = shares.topk(config.draft_vocab_size).indices.sort().values.numpy().astype(np.int32)
        norms = {}
        for index in sources(self.target):
            norm = backend.weights.tensors[f"layers.{index}.self_attn.q_norm.weight"]
            assert isinstance(norm, np.ndarray)
            norms[self.target.layers[index].sliding] = torch.from_numpy(norm.copy()) * self.target.attention_scale
        return new_drafter(config, lambda part: capture.embeddings(backend, part), norms, chosen, self.settings.seed)

    def _distil(self, shards: int) -> Parameters:
        self.progress("training", 0, int(60 * self.settings.minutes))
        data = Data.open(self._texts, shards, self.settings.seed)
        dtype = training_dtype(self.device)
        workers = self._workers()
        loss = Distillation(self.drafter, self.target, data.embeddings.to(self.device))

        def batch(share: float, step: int) -> list[Batch]:
            first = step * workers.count
            parts = (data.batch(first + part, TEXTS, POSITIONS, share) for part in range(workers.count))
            return [part.to(self.device, dtype) for part in parts]

        def examine(weights: Parameters) -> dict[str, Any]:
            sums = counts = torch.zeros(())
            for _, held_out in zip(range(EXAMINED), data.held_out(POSITIONS), strict=False):
                found = loss.agreement(weights, held_out.to(self.device, dtype))
                sums, counts = sums + found[0].cpu(), counts + found[1].cpu()
            return {"agreement": [round(float(x), 4) for x in sums / counts.clamp(min=1)]}

        run = Run[Batch](
            path=self.work.path / STATE,
            minutes=self.settings.minutes,
            workers=workers,
            rate=RATE_FROM if self.settings.start else 1.0,
            dtype=dtype,
            device=self.device,
            report=self._report_step,
            examine=examine,
        )
        try:
            return run.train(load_file(self.work.path / FIRST), loss.loss, batch)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if "memory" not in str(error):
                raise
            raise BackendError(
                "not enough memory to train; use fewer --threads, a shorter --length, or a smaller drafter"
            ) from error

    def _workers(self) -> Workers:
        """A replica for each thread, as far as memory goes; the threads that are left work inside of them."""
        if self.device != "cpu":
            return Workers(1)
        threads, drafter = min(self.threads or default_threads(), processors()), self.drafter
        scores = len(drafter.layers) * drafter.heads * self.settings.length + min(drafter.draft_vocab_size, MOST_SCORED)
        # weights and gradients in bfloat16; scores, their softmax and its gradient in float32
        size = 4 * self._parameters + 12 * DEPTH * TEXTS * POSITIONS * scores
        count = max(1, min(threads, REPLICA_BYTES // size))
        return Workers(count, threads // count)

    def _report_step(self, step: Step) -> None:
        self.progress(f"training, loss {step.loss:.3f}", int(step.seconds), int(step.total))

    def _write(self, weights: Parameters) -> None:
        """The drafter as a model folder, with the `config.json` of what it was started from, if that is official."""
        whole = (DRAFT_TOKENS, TOKEN_ORDERING)
        kept = {name: w if name in whole else w.detach().bfloat16() for name, w in weights.items()}
        as_published = self.settings.start and self._start_files.path.is_dir()
        config = self._start_files.config if as_published else official_json(self.drafter, self.target)
        shutil.rmtree(self.work.drafter, ignore_errors=True)
        self.work.drafter.mkdir()
        write_model(self.work.drafter, config, kept)

    @property
    def _measuring(self) -> float:
        """Seconds that each measurement may take, of large models that would take hours."""
        return max(60.0, 6 * self.settings.minutes)

    def _measure(self) -> dict[str, dict[str, Any]]:
        """Acceptance on held-out prompts, of the drafter that was started from, too."""
        found, prompts = {}, self._prompts.held_out[:MEASURED]
        self._release()
        drafters = {"before": self.settings.start} if self.settings.start else {}
        for name, drafter in {**drafters, "after": str(self.work.drafter)}.items():
            measured = self._acceptance(name, drafter, prompts)
            gc.collect()  # of a model's weights only one copy
            found[name] = {sampling: one.report() for sampling, one in measured.items()}
            prompts = prompts[: min(one.texts for one in measured.values())]
        before, after = found.get("before", {}), found["after"]
        if before and all(after[way]["tokens_a_round"] <= one["tokens_a_round"] for way, one in before.items()):
            self.notify("the drafter did not get better; keep the one you have, or train on more --tokens")
        return found

    def _acceptance(self, name: str, drafter: str, prompts: Sequence[list[int]]) -> dict[str, acceptance.Acceptance]:
        engine = paceline.load(
            self.settings.target,
            drafter=drafter,
            quant=self.settings.quant,
            threads=self.threads,
            context=min(self.settings.length + self.settings.max_tokens, self.target.max_positions),
        )
        self._weights = engine.backend.info.quant

        def report(done: int) -> None:
            self.progress(f"measuring, {name}", done, 2 * len(prompts))

        return acceptance.measure(engine, prompts, self.settings.max_tokens, self._measuring, report)

    def _report(self, shards: int, found: Mapping[str, Any]) -> dict[str, Any]:
        progress = trained(self.work.path / STATE)
        return {
            "command": "train",
            "version": paceline.__version__,
            "settings": asdict(self.settings),
            "weights": self._weights,
            "texts": shards * capture.SHARD,
            "tokens": self._tokens,
            "drafted_positions": progress.tokens,
            "training_seconds": round(progress.seconds),
            "history": progress.history,
            "acceptance": found,
        }


def _values(found: Tensors, name: str) -> Tensor:
    """A tensor of a drafter's files: in float32, or token ids."""
    ref = found.refs[name]
    if len(ref.shape) == 1:
        return torch.from_numpy(found.vector(name))
    return pack(ref.read(), "f32", ref.dtype if ref.dtype in BLOCKS else "").values


def training_dtype(device: str) -> torch.dtype:
    """bfloat16 where it is fast; else float32."""
    fast = device != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if fast else torch.float32
