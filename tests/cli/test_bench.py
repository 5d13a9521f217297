"""`paceline bench`: what it reports, and that simulated acceptance is what was asked for."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from paceline import _cpu
from paceline.bench.kernels import KERNEL_ROWS
from paceline.bench.random_weights import random_weights
from paceline.bench.runs import SimulatedAcceptance
from paceline.bench.shapes import DRAFTERS, TARGETS, official_drafter, official_target, prompt_multiply_accumulates
from paceline.checkpoint.sizes import count_parameters
from paceline.cli.main import run
from paceline.config import check_pair
from paceline.engine.step import step
from paceline.quant.formats import FORMATS
from tests.fixtures.backends import sequence
from tests.fixtures.scripted_backend import ScriptedBackend

COMMON = {"read_bandwidth_gb_s", "weight_bytes", "peak_memory_bytes", "model", "quant", "threads", "isa", "processor"}
DECODE = {
    *COMMON,
    "context",
    "forward_ms",
    "forward_of_one_row",
    "passes",
    "prompt",
    "dot_peaks",
    "bandwidth_fraction",
    "draft_step_ms",
    "draft_tokens",
    "prompt_tokens_per_s",
    "plain_tokens_per_s",
    "mtp_tokens_per_s",
    "speedup",
    "auto_speedup",
    "auto_useless_speedup",
    "simulated_acceptance",
}


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paceline.bench.machine.BUFFER", 1 << 22)


def report(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert run(["bench", *arguments]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1  # tables are on stderr
    return json.loads(out) | {"table": err}


def test_decode_reports_everything(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--quant", "q8", "--context", "40", "--repeats", "1", "--tokens", "8", "--threads", "1")
    found = report(capsys, "decode", "-m", "tiny-python", *options)
    assert found.keys() >= DECODE
    assert list(found["forward_ms"]) == [str(rows) for rows in range(1, 17)]
    assert found["simulated_acceptance"] is None
    assert "SIMULATED acceptance" not in found["table"]
    assert max(map(len, found["table"].splitlines())) <= 80
    for rows, limits in found["passes"].items():
        assert limits["ms"] == found["forward_ms"][rows]
        assert limits["bound_fraction"] == max(limits["bandwidth_fraction"], limits["peak_fraction"])
    work = found["passes"]["1"]["multiply_adds_per_s"] * found["forward_ms"]["1"]
    assert found["passes"]["8"]["multiply_adds_per_s"] * found["forward_ms"]["8"] == pytest.approx(8 * work)


def test_instruction_sets_take_turns(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--quant", "q8", "--context", "40", "--repeats", "1", "--threads", "1", "--isa", "all")
    found = report(capsys, "decode", "-m", "tiny-python", *options)
    assert list(found["isas"]) == _cpu.usable_isas()
    for isa, figures in found["isas"].items():
        assert figures["isa"] == isa
        assert figures.keys() >= {"passes", "prompt", "dot_peaks"}
        assert isa in found["table"]


def test_one_instruction_set_is_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--quant", "q8", "--context", "40", "--repeats", "1", "--tokens", "4", "--threads", "1")
    assert report(capsys, "decode", "-m", "tiny-python", *options, "--isa", "generic")["isa"] == "generic"


def test_contexts_grow(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--quant", "q8", "--repeats", "1", "--threads", "1", "--contexts", "40,1200")
    found = report(capsys, "decode", "-m", "tiny-python", *options)
    assert list(found["contexts"]) == ["40", "1200"]
    short, long = (figures["1"] for figures in found["contexts"].values())
    assert long["multiply_adds_per_s"] * long["ms"] > short["multiply_adds_per_s"] * short["ms"]
    assert "1200" in found["table"]


def test_kernels_are_compared_with_memory(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paceline.bench.kernels.KERNEL_SHAPE", (64, 256))
    found = report(capsys, "kernels", "--repeats", "1", "--threads", "1", "--isa", "all")
    assert list(found["kernels"]) == _cpu.usable_isas()
    assert found.keys() >= {"processor", "threads", "read_bandwidth_gb_s"}
    assert max(map(len, found["table"].splitlines())) <= 80
    for formats in found["kernels"].values():
        assert formats.keys() == FORMATS.keys()
        for fmt, by_rows in formats.items():
            assert list(by_rows) == [str(rows) for rows in KERNEL_ROWS]
            work = {rows: one["multiply_adds_per_s"] * one["ms"] for rows, one in by_rows.items()}
            assert work["8"] == pytest.approx(8 * work["1"])
            assert fmt in found["table"]
    only = report(capsys, "kernels", "--repeats", "1", "--threads", "1", "--formats", "q4_0,q8_0")
    assert list(next(iter(only["kernels"].values()))) == ["q4_0", "q8_0"]


def test_simulated_figures_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--quant", "q8", "--context", "40", "--repeats", "1", "--tokens", "8", "--draft-tokens", "2")
    found = report(capsys, "decode", "-m", "tiny-python", *options, "--acceptance", "0.9,0.4")
    assert found["simulated_acceptance"] == [0.9, 0.4]
    assert "SIMULATED acceptance 0.9, 0.4" in " ".join(found["table"].split())


def test_prompt_reports_work(capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, "prompt", "-m", "tiny-python", "--length", "32", "--repeats", "1")
    assert found.keys() >= COMMON | {"context", "prompt_tokens_per_s", "prompt_multiply_accumulates_per_s"}


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["decode"], "either --model or --shape"),
        (["decode", "-m", "tiny-python", "--shape", "e2b"], "either --model or --shape"),
        (["decode", "--shape", "e2b"], "simulate"),
        (["decode", "--shape", "e3b", "--acceptance", "1,1,1"], "unknown shape 'e3b'"),
        (["decode", "--shape", "e3b"], "unknown shape 'e3b'"),
        (["decode", "--shape", "e2b", "--quant", "q3", "--acceptance", "1,1,1"], "unknown quantisation 'q3'"),
        (["decode", "-m", "tiny-python", "--acceptance", "0.5,0.8,0.1"], "from 1 down to 0"),
        (["decode", "-m", "tiny-python", "--acceptance", "a"], "from 1 down to 0"),
        (["decode", "-m", "tiny-python", "--acceptance", "0.5"], "1 rates for draft length 3"),
        (["decode", "-m", "tiny-python", "--context", "100000"], "positions and the model has 4096"),
        (["decode", "-m", "tiny-python", "--contexts", "512,100000"], "positions and the model has 4096"),
        (["decode", "-m", "tiny-python", "--contexts", "512,64"], "ascending lengths from 16"),
        (["decode", "-m", "tiny-python", "--contexts", "a"], "ascending lengths from 16"),
        (["decode", "-m", "tiny-python", "--isa", "sse9"], "no sse9 kernels"),
        (["decode", "-m", "tiny-python", "--expert-overlap", "0.3"], "mixtures of experts"),
        (["kernels", "--formats", "q4_0,q3"], "unknown in --formats: q3"),
    ],
)
def test_bad_settings_get_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], cause: str) -> None:
    assert run(["bench", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert cause in err
    assert len(err.splitlines()) == 1


PLOT = ["bench", "decode", "-m", "tiny-python", "--context", "40", "--repeats", "1", "--tokens", "4", "--plot"]


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "costs.png"
    assert run([*PLOT, str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    assert run([*PLOT, str(tmp_path / "costs.png")]) == 2
    assert "pip install 'paceline[plot]'" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_simulated_shares_hold() -> None:
    shares = (0.8, 0.65, 0.5)
    backend = ScriptedBackend(context=4096)
    proposer = SimulatedAcceptance(lambda: pytest.fail("no costs"), stops_early=False, shares=shares)
    s = sequence(backend, [1, 2, 3], draft_tokens=3, max_tokens=3000)
    while s.finish is None:
        step(backend, [proposer], [s], 8)
    assert s.statistics.acceptance_by_depth == pytest.approx(shares, abs=0.01)
    assert s.statistics.acceptance_length == pytest.approx(1 + sum(shares), abs=0.02)


@pytest.mark.parametrize(
    ("shape", "billions", "drafter_millions"),
    [("e2b", 5.12, 77.7), ("e4b", 8.0, 78.5), ("12b", 11.96, 422.9), ("26b", 25.8, 419.7), ("31b", 31.3, 469.5)],
)
def test_official_shapes_have_the_official_sizes(shape: str, billions: float, drafter_millions: float) -> None:
    target, drafter = official_target(shape), official_drafter(shape)
    check_pair(target, drafter)
    # The published figures count vision and audio too; text alone is at most a few per cent less.
    assert 0.9 * billions < count_parameters(target).total / 1e9 <= billions * 1.005
    assert count_parameters(drafter).total / 1e6 == pytest.approx(drafter_millions, rel=0.01)
    assert 0 < prompt_multiply_accumulates(target) < count_parameters(target).active
    assert TARGETS.keys() == DRAFTERS.keys()


def test_random_weights_are_the_same_each_time() -> None:
    drafter = official_drafter("e2b")
    one, two = (random_weights(drafter, "q8").tensors["pre_projection.weight"].packed() for _ in range(2))
    assert one.any()
    assert (one == two).all()
