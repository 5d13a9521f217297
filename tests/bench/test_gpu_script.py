"""`bench/gpu.sh` measures GPUs; here its parts work on the processor."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu", BENCH / "gpu.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu"] = module  # for its dataclasses
    spec.loader.exec_module(module)
    return module


def shortened(command: list[str]) -> list[str]:
    """The same measurement over less."""
    for option, value in (("--tokens", "8"), ("--repeats", "1"), ("--max-tokens", "4")):
        if option in command:
            command = [*command[: command.index(option)], option, value, *command[command.index(option) + 2 :]]
    return command


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("tiny-python bf16", ["--context", "16", "--repeats", "1"]),
        ("transformers tiny-python", ["--tokens", "8", "--repeats", "1"]),
        ("verify tiny-python", []),
    ],
)
def test_measurements(
    gpu: ModuleType, name: str, more: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (job,) = [job for job in gpu.jobs("torch:cpu", [], []) if job.name == name]
    found = gpu.run(replace(job, command=[*shortened(job.command), *more]), 300, "torch:cpu")
    assert "failed" not in found, found
    (line,) = gpu.summary({name: found})
    assert line.startswith(f"{name}: ")
    if "forward_ms" in found:
        assert found["same_bits"]
        assert found["device"] == "cpu"
        gpu.plot({name: found}, tmp_path / "gpu.png")
        assert (tmp_path / "gpu.png").read_bytes().startswith(b"\x89PNG")


def test_order_of_jobs(gpu: ModuleType) -> None:
    names = [job.name for job in gpu.jobs("cuda", ["e2b", "31b", "26b"], ["bf16", "q8", "q4"])]
    assert names[:2] == ["31b bf16", "31b q4"]
    assert len(names) == len(set(names)) == 9 + 3 + 2 + 1
    assert names.index("transformers 31b") < names.index("e2b bf16")


def test_a_device_that_is_none_is_said_in_a_line() -> None:
    command = ["bash", str(BENCH / "gpu.sh"), "--device", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHON": sys.executable})
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("gpu.py: PyTorch cannot use the device 'nowhere'")
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHON": "no-python"})
    assert done.returncode == 2
    assert "cannot import paceline" in done.stderr


def test_what_fails_is_said(gpu: ModuleType) -> None:
    job = gpu.Job(
        "no", [sys.executable, "-m", "paceline", "bench", "decode", "--shape", "31c", "--acceptance", "0,0,0"], 10
    )
    assert "unknown shape" in gpu.run(job, 60, "torch:cpu")["failed"]
    assert "not done within" in gpu.run(replace(job, command=["sleep", "9"]), 0.1, "torch:cpu")["failed"]
    test = replace(job, command=[sys.executable, "-m", "pytest", "-q", "nowhere"], tests=True)
    assert not gpu.run(test, 60, "torch:cpu")["passed"]
