"""A pair ready to be measured, on any device: a model that is there, or random weights in an official shape."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from paceline import build
from paceline.backends.base import Backend
from paceline.backends.cpu.backend import CpuBackend
from paceline.backends.cpu.processors import default_threads
from paceline.backends.formats import check_quant
from paceline.bench import machine
from paceline.bench.demand import ATTENTION, Demand, TargetDemand, compared
from paceline.bench.machine import Bandwidth, DotPeaks, ReadBandwidth
from paceline.bench.random_weights import random_weights
from paceline.bench.runs import Bench
from paceline.bench.shapes import official_drafter, official_target, prompt_multiply_accumulates
from paceline.checkpoint.sizes import count_parameters
from paceline.config import TargetConfig
from paceline.errors import SettingsError
from paceline.quant.cache_formats import check_cache_format
from paceline.quant.recipes import DEFAULT, RECIPES

CHUNK = 256  # prompt rows in one pass
OVERLAP = 0.3  # measured in other mixtures: neighbouring tokens of a text share 26 to 42 % of their experts


Machine = tuple[Bandwidth, dict[str, Any], Callable[[], int]]  # its bandwidth, a description, its peak memory


@dataclass(frozen=True)
class Pair:
    """A pair and what reports say of it."""

    bench: Bench
    config: TargetConfig
    about: dict[str, Any]
    peak_memory: Callable[[], int]
    demand: TargetDemand | None  # on the CPU

    @property
    def pass_bytes(self) -> int:
        """Bytes of weights that a pass of one row reads: all but the experts it is not sent to."""
        backend = self.bench.backend
        if isinstance(backend, CpuBackend):
            return backend.pass_bytes
        parameters = count_parameters(self.config)  # all matrices are of one format
        return backend.info.weight_bytes * parameters.active // parameters.effective

    def passes(self, forward_ms: Mapping[int, float]) -> dict[str, dict[str, Any]]:
        """Times of passes beside the machine's limits, by rows: see `demand.compared`."""
        limits = self.bench.bandwidth.median, self.bench.peaks.medians if self.bench.peaks else None
        context = self.bench.context
        return {
            str(rows): compared(
                ms, self.demand.decode(rows, context) if self.demand else Demand(self.pass_bytes), *limits
            )
            for rows, ms in forward_ms.items()
        }

    def prompt(self, repeats: int, length: int) -> dict[str, Any]:
        """Prefill speed."""
        return self.prompt_figures(self.bench.prompt_tokens_per_s(repeats, length), length)

    def prompt_figures(self, speed: float, length: int) -> dict[str, Any]:
        """What a speed of prefill means, in tokens per second."""
        work = prompt_multiply_accumulates(self.config)
        figures: dict[str, Any] = {
            "prompt_tokens": length,
            "prompt_tokens_per_s": speed,
            "prompt_multiply_accumulates_per_s": speed * work,
        }
        if self.demand and self.bench.peaks:
            demand = self.demand.prompt(length, self.bench.chunk)
            limits = self.bench.bandwidth.median, self.bench.peaks.medians
            figures["prompt"] = compared(length / speed * 1e3, demand, *limits)
        return figures

    def report(self, benchmark: str) -> dict[str, Any]:
        return {
            "benchmark": benchmark,
            **self.about,
            "context": self.bench.context,
            "read_bandwidth_gb_s": self.bench.bandwidth.median,
            "dot_peaks": self.bench.peaks.medians if self.bench.peaks else None,
            "weight_bytes": self.bench.backend.info.weight_bytes,
            "pass_bytes": self.pass_bytes,
            "peak_memory_bytes": self.peak_memory(),
        }


def open_pairs(
    model: str | None,
    shape: str | None,
    quant: str,
    threads: int | None,
    device: str,
    context: int,
    room: int,
    overlap: float | None = None,
    kv: str = "auto",
    isas: Sequence[str] = ("",),
    slots: int = 1,
) -> list[Pair]:
    """Load a model, or make a shape's weights: a pair for each instruction set, all over the same packed weights.

    Args:
        model: a model's name, or None.
        shape: a key of `shapes.TARGETS`, if there is no model.
        quant: recipe, or auto: what a start of the model takes, and of a shape the default.
        threads: of the processor.
        device: see `build.load`.
        context: rows in the cache before each measurement.
        room: positions that measurements need.
        overlap: share of their experts that neighbouring rows have in common; None: as a model's router has it, and
            for a shape `OVERLAP`.
        kv: format of the KV cache.
        isas: instruction sets; an empty name is the one in use.
        slots: texts that a shape's backend on the CPU holds at once.

    Raises:
        SettingsError: an unknown format, or too much room for the model.
    """
    check_quant(quant)
    check_cache_format(kv)
    if shape is not None:
        quant = DEFAULT if quant == "auto" else quant
        config = official_target(shape)
        backend = _random_pair(shape, quant, threads, device, room, kv, slots)
    else:
        assert model is not None
        engine = build.load(
            model, device=device, quant=quant, kv=kv, threads=threads, context=room, prompt_chunk=CHUNK, draft_tokens=0
        )
        config, backend = engine.target_config, engine.backend
    info = backend.info
    if room > info.context:
        raise SettingsError(f"this takes {room} positions and the model has {info.context}; measure fewer")
    simulated = config.experts is not None and isinstance(backend, CpuBackend)
    if overlap is None and shape is not None and simulated:
        overlap = OVERLAP
    if overlap is not None and not simulated:
        raise SettingsError("--expert-overlap is for mixtures of experts on the CPU; leave it out")
    about: dict[str, Any] = {"model": model or shape, "random_weights": model is None}
    about |= {"quant": info.quant, "kv": info.kv, "expert_overlap": overlap}
    machine = machine_of(backend)
    return [_pair(one, config, machine, about, context) for one in _with_isas(backend, isas)]


def _with_isas(backend: Backend, isas: Sequence[str]) -> list[Backend]:
    if not isinstance(backend, CpuBackend):
        if any(isas):
            raise SettingsError("--isa is for the CPU; leave it out")
        return [backend]
    return [backend if isa in ("", backend.info.device) else backend.with_isa(isa) for isa in isas]


def _pair(backend: Backend, config: TargetConfig, machine: Machine, about: Mapping[str, Any], context: int) -> Pair:
    bandwidth, described, peak_memory = machine
    about = {**about, **described}
    peaks = demand = None
    if isinstance(backend, CpuBackend):
        about["isa"] = backend.info.device
        overlap = about["expert_overlap"]
        if overlap is not None:
            backend.simulate_routing(overlap)
        demand = TargetDemand(config, backend.weights, backend.info.kv, overlap or 0)
        formats = {matrix.format for _, matrix in backend.weights.matrices} | {ATTENTION}
        peaks = DotPeaks(sorted(formats), backend.info.device, backend.threads)
    bench = Bench(backend, context, CHUNK, bandwidth, peaks)
    return Pair(bench, config, about, peak_memory, demand)


def _random_pair(shape: str, quant: str, threads: int | None, device: str, room: int, kv: str, slots: int) -> Backend:
    target, drafter = official_target(shape), official_drafter(shape)
    if device != "cpu":
        if kv != "auto":
            raise SettingsError(f"--kv {kv} is for --device cpu; leave it out")
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
        slots=slots,
        max_rows=CHUNK,
        isa=os.environ.get("PACELINE_ISA", ""),
        kv=kv,
    )


def machine_of(backend: Backend) -> Machine:
    """The machine's bandwidth, a description, and its peak memory."""
    if isinstance(backend, CpuBackend):
        about = {"threads": backend.threads, "isa": backend.info.device, "processor": machine.processor()}
        return ReadBandwidth(backend.threads), about, machine.peak_memory
    from paceline.backends.torch import measure

    device = backend.device  # type: ignore[attr-defined]  # a TorchBackend
    about = {"threads": backend.threads, "device": measure.device_name(device), "software": measure.software()}
    return measure.CopyBandwidth(device), about, lambda: measure.peak_memory(device) or machine.peak_memory()
