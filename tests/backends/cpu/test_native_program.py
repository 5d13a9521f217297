"""The native test program, which `.ci/arm` runs on an emulated Arm, run on this processor too."""

import shutil
import subprocess
from pathlib import Path

import pytest

from paceline import _cpu

ROOT = Path(__file__).parents[3]
BUILD = ROOT / "build" / "tests"  # kept, so that only the first run takes its half minute

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def program() -> Path:
    if not shutil.which("cmake"):
        pytest.skip("cmake is not installed")
    options = ["-DPACELINE_MODULE=OFF", "-DPACELINE_TESTS=ON"]
    for command in (["cmake", "-S", ROOT, "-B", BUILD, *options], ["cmake", "--build", BUILD, "--parallel", "2"]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return BUILD / "kernels_test"


def test_kernels_agree_with_plain_loops(program: Path) -> None:
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == [*_cpu.usable_isas(), "thread pool"]
    assert all(line.endswith("checks passed") for line in lines)
