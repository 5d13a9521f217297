"""A pair ready to be measured, on any device: a model that is there, or random weights in an official shape."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from paceline import build
from paceline.backends.base import Backend
from paceline.backends.cpu.backend import CpuBackend
from paceline.backends.cpu.processors import default_threads
from paceline.backends.formats import check_quant
from paceline.bench import machine
from paceline.bench.machine import Bandwidth, ReadBandwidth
from paceline.bench.random_weights import random_weights
from paceline.bench.runs import Bench
from paceline.bench.shapes import official_drafter, official_target, prompt_multiply_accumulates
from paceline.checkpoint.sizes import count_parameters
from paceline.config import TargetConfig
from paceline.errors import SettingsError
from paceline.quant.recipes import DEFAULT, RECIPES

CHUNK = 256  # prompt rows in one pass


@dataclass(frozen=True)
class Pair:
    """A pair and what reports say of it."""

    bench: Bench
    config: TargetConfig
    about: dict[str, Any]
    peak_memory: Callable[[], int]

    @property
    def pass_bytes(self) -> int:
        """Bytes of weights that a pass of one row reads: all but the experts it is not sent to."""
        backend = self.bench.backend
        if isinstance(backend, CpuBackend):
            return backend.pass_bytes
        parameters = count_parameters(self.config)  # all matrices are of one format
        return backend.info.weight_bytes * parameters.active // parameters.effective

    def prompt(self, repeats: int, length: int) -> dict[str, Any]:
        """Prefill speed."""
        speed = self.bench.prompt_tokens_per_s(repeats, length)
        work = prompt_multiply_accumulates(self.config)
        return {
            "prompt_tokens": length,
            "prompt_tokens_per_s": speed,
            "prompt_multiply_accumulates_per_s": speed * work,
        }

    def report(self, benchmark: str) -> dict[str, Any]:
        return {
            "benchmark": benchmark,
            **self.about,
            "context": self.bench.context,
            "read_bandwidth_gb_s": self.bench.bandwidth.median,
            "weight_bytes": self.bench.backend.info.weight_bytes,
            "pass_bytes": self.pass_bytes,
            "peak_memory_bytes": self.peak_memory(),
        }


def open_pair(
    model: str | None, shape: str | None, quant: str, threads: int | None, device: str, context: int, room: int
) -> Pair:
    """Load a model, or make a shape's weights.

    Args:
        model: a model's name, or None.
        shape: a key of `shapes.TARGETS`, if there is no model.
        quant: recipe, or auto: what a start of the model takes, and of a shape the default.
        threads: of the processor.
        device: see `build.load`.
        context: rows in the cache before each measurement.
        room: positions that measurements need.

    Raises:
        SettingsError: an unknown format, or too much room for the model.
    """
    check_quant(quant)
    if shape is not None:
        quant = DEFAULT if quant == "auto" else quant
        config = official_target(shape)
        backend = _random_pair(shape, quant, threads, device, room)
    else:
        assert model is not None
        engine = build.load(
            model, device=device, quant=quant, threads=threads, context=room, prompt_chunk=CHUNK, draft_tokens=0
        )
        config, backend = engine.target_config, engine.backend
    info = backend.info
    if room > info.context:
        raise SettingsError(f"this takes {room} positions and the model has {info.context}; measure fewer")
    bandwidth, about, peak = machine_of(backend)
    about = {"model": model or shape, "random_weights": model is None, "quant": info.quant, **about}
    return Pair(Bench(backend, context, CHUNK, bandwidth), config, about, peak)


def _random_pair(shape: str, quant: str, threads: int | None, device: str, room: int) -> Backend:
    target, drafter = official_target(shape), official_drafter(shape)
    if device != "cpu":
        name = device.removeprefix("torch:")
        made: Backend = build.torch_backends(device).random_backend(
            target, drafter, device=name, quant=quant, context=room, max_rows=CHUNK
        )
        return made
    return CpuBackend(
        (target, random_weights(target, quant)),
        (drafter, random_weights(drafter, RECIPES[quant].drafter)),
        threads=threads or default_threads(),
        context=room,
        max_rows=CHUNK,
        isa=os.environ.get("PACELINE_ISA", ""),
    )


def machine_of(backend: Backend) -> tuple[Bandwidth, dict[str, Any], Callable[[], int]]:
    """The machine's bandwidth, a description, and its peak memory."""
    if isinstance(backend, CpuBackend):
        about = {"threads": backend.threads, "isa": backend.info.device, "processor": machine.processor()}
        return ReadBandwidth(backend.threads), about, machine.peak_memory
    from paceline.backends.torch import measure

    device = backend.device  # type: ignore[attr-defined]  # a TorchBackend
    about = {"threads": backend.threads, "device": measure.device_name(device), "software": measure.software()}
    return measure.CopyBandwidth(device), about, lambda: measure.peak_memory(device) or machine.peak_memory()
