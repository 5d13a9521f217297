"""What passes demand, the machine's limits they are compared with, and the simulated choice of experts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from paceline import _cpu
from paceline.backends.cpu.backend import CpuBackend
from paceline.bench.demand import Demand, TargetDemand, compared, experts_read
from paceline.bench.loading import CHUNK
from paceline.bench.machine import DotPeaks
from paceline.bench.random_weights import random_weights
from paceline.bench.runs import Bench
from paceline.bench.shapes import prompt_multiply_accumulates
from paceline.config import Experts
from paceline.errors import BackendError
from paceline.quant.formats import FORMATS
from paceline.types import GREEDY, Draft, Work
from tests.fixtures.native import ISAS, TARGET_CONFIG, shared

EXPERTS = Experts(count=32, active=4, intermediate_size=32)
MOE = replace(TARGET_CONFIG, experts=EXPERTS)


class Memory:
    """A bandwidth that nobody measures."""

    median = 10.0

    def measure(self) -> float:
        return self.median


def backend(config: object = MOE, context: int = 256, max_rows: int = 64) -> CpuBackend:
    target = config, shared(config, "q8")  # type: ignore[arg-type]
    return CpuBackend(target, threads=1, context=context, max_rows=max_rows)  # type: ignore[arg-type]


def rows_by_expert(opened: CpuBackend, config: object = MOE) -> list[list[int]]:
    """Rows that each expert of each layer was multiplied with."""
    matrices = [t for n, t in shared(config, "q8").tensors.items() if "experts.gate" in n]  # type: ignore[arg-type]
    return [[opened.seen(matrix)[0] for matrix in layer] for layer in matrices]  # type: ignore[union-attr]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("fmt", FORMATS)
def test_peaks_count_their_multiply_adds(isa: str, fmt: str) -> None:
    one = _cpu.dot_peak(fmt, 1, isa)
    assert one > 0
    assert one % 16 == 0  # a panel's outputs
    assert _cpu.dot_peak(fmt, 1000, isa, 2) == 2 * 1000 * one


@pytest.mark.parametrize("isa", ISAS)
def test_peaks_are_what_a_processor_can_do(isa: str) -> None:
    peaks = DotPeaks(FORMATS, isa, 1)
    peaks.measure()
    assert peaks.medians.keys() == FORMATS.keys()
    assert 0 < max(peaks.medians.values()) < 1e14  # the compiler has removed no loop


def test_the_larger_demand_binds() -> None:
    reading = compared(2.0, Demand(10_000_000), 10.0, None)
    assert reading["bound"] == "memory"
    assert reading["bandwidth_fraction"] == reading["bound_fraction"] == pytest.approx(0.5)
    assert reading["peak_fraction"] is None
    both = Demand(10_000_000)
    both.products.update({"q4_0": 1_000_000, "f32": 500_000})
    counted = compared(2.0, both, 10.0, {"q4_0": 1e9, "f32": 1e9})
    assert counted["bound"] == "compute"
    assert counted["peak_fraction"] == counted["bound_fraction"] == pytest.approx(0.75)
    assert counted["bound_ms"] == pytest.approx(1.5)
    assert counted["multiply_adds_per_s"] == pytest.approx(1_500_000 / 2e-3)


def test_demands_are_those_of_the_matrices() -> None:
    weights = random_weights(TARGET_CONFIG, "q8")
    demand = TargetDemand(TARGET_CONFIG, weights, kv="bf16")
    one, four = demand.decode(1, 0), demand.decode(4, 0)
    assert one.nbytes == four.nbytes == weights.pass_bytes(TARGET_CONFIG)
    assert 4 * one.multiply_adds == four.multiply_adds
    assert one.multiply_adds == sum(rows * cols for rows, cols in (m.shape for _, m in weights.matrices))
    cache = sum(2 * layer.kv_heads * layer.head_dim * 2 for layer in TARGET_CONFIG.layers)
    assert demand.decode(1, 1).nbytes == one.nbytes + cache  # each layer reads its cache, whosever it is
    longer = demand.decode(3, 1).products["f32"]
    assert longer == 3 * sum(2 * TARGET_CONFIG.heads * layer.head_dim for layer in TARGET_CONFIG.layers)
    prompt = demand.prompt(10, CHUNK)
    assert prompt.products.total() - prompt.products["f32"] == 10 * prompt_multiply_accumulates(TARGET_CONFIG)
    assert prompt.nbytes < one.nbytes
    assert demand.prompt(2 * CHUNK, CHUNK).nbytes == 2 * prompt.nbytes


def test_sliding_layers_see_their_window() -> None:
    demand = TargetDemand(TARGET_CONFIG, shared(TARGET_CONFIG, "q8"), kv="bf16")
    window = TARGET_CONFIG.sliding_window
    more = demand.decode(1, window + 7).nbytes - demand.decode(1, window).nbytes
    full = [layer for layer in TARGET_CONFIG.layers if not layer.sliding]
    assert more == 7 * sum(2 * layer.kv_heads * layer.head_dim * 2 for layer in full)


def test_experts_read_by_overlap() -> None:
    assert experts_read(EXPERTS, 1, 0.5) == pytest.approx(4)
    assert experts_read(EXPERTS, 2, 0.5) == pytest.approx(4 + 4 * 0.5)
    assert experts_read(EXPERTS, 2, 0) == pytest.approx(4 + 4 * (1 - 4 / 32))  # by chance
    assert experts_read(EXPERTS, 2, 0.05) == experts_read(EXPERTS, 2, 0)
    assert experts_read(EXPERTS, 10_000, 0.5) == pytest.approx(32)
    assert experts_read(replace(EXPERTS, active=32), 5, 0.5) == 32


@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.6, 0.9])
def test_neighbours_share_their_experts(overlap: float) -> None:
    counts = []
    for start in range(0, 120, 2):
        opened = backend()
        opened.simulate_routing(overlap)
        slot = opened.open_slot()
        if start:
            opened.fill_random(slot, start)
        opened.observe()
        opened.run([Work(slot, start, [5], GREEDY, Draft((6,), simulated=1))])
        by_layer = rows_by_expert(opened)
        assert all(sum(layer) == 2 * EXPERTS.active for layer in by_layer)
        counts += [sum(rows > 0 for rows in layer) for layer in by_layer]
    assert np.mean(counts) == pytest.approx(experts_read(EXPERTS, 2, overlap), abs=0.3)


def test_simulated_experts_do_not_depend_on_the_batch() -> None:
    opened = backend()
    opened.simulate_routing(0.5)
    assert Bench(opened, 20, 8, Memory()).same_bits()


@pytest.mark.parametrize("overlap", [-0.1, 0.91, float("nan")])
def test_bad_overlaps_are_refused(overlap: float) -> None:
    with pytest.raises(ValueError, match="0 to 90 %"):
        backend().simulate_routing(overlap)


def test_models_without_experts_have_no_routing() -> None:
    with pytest.raises(ValueError, match="no experts"):
        backend(TARGET_CONFIG).simulate_routing(0.3)


def test_random_rows_fill_a_cache() -> None:
    opened = backend(TARGET_CONFIG, context=600)
    slot = opened.open_slot()
    opened.fill_random(slot, 500)
    result = opened.run([Work(slot, 500, [1], GREEDY, logits=True)])[0]
    assert result.logits is not None
    assert np.isfinite(result.logits).all()
    opened.run([Work(slot, 501, [1], GREEDY)])
    with pytest.raises(ValueError, match="filled up to 100 of"):
        opened.fill_random(slot, 100)
    with pytest.raises(ValueError, match="filled up to 1000 of"):
        opened.fill_random(slot, 1000)


def test_a_long_context_is_filled_and_extended() -> None:
    opened = backend(TARGET_CONFIG, context=2100)
    bench = Bench(opened, 40, 64, Memory())
    bench.extend(2000)
    assert opened._decoder.length(bench.slot) == 2000
    assert set(bench.forward_ms(1, (1, 2))) == {1, 2}
    assert opened._decoder.length(bench.slot) == 2000
    assert bench.same_bits()


def test_another_instruction_set_has_the_same_weights() -> None:
    opened = backend(TARGET_CONFIG)
    for isa in ISAS:
        other = opened.with_isa(isa)
        assert other.info.device == isa
        assert other.weights is opened.weights
    with pytest.raises(BackendError, match="no sse9 kernels"):
        opened.with_isa("sse9")
