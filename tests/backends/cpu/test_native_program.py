"""The native test programs, which `.ci/arm` and `.ci/emulated` run in emulation, run on this processor too."""

import fcntl
import shutil
import subprocess
from pathlib import Path

import pytest

from paceline import _cpu

ROOT = Path(__file__).parents[3]
BUILD = ROOT / "build" / "tests"  # kept, so that only the first run takes its half minute

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def programs() -> Path:
    if not shutil.which("cmake"):
        pytest.skip("cmake is not installed")
    options = ["-DPACELINE_MODULE=OFF", "-DPACELINE_TESTS=ON"]
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:  # of workers that run tests side by side one builds
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (["cmake", "-S", ROOT, "-B", BUILD, *options], ["cmake", "--build", BUILD, "--parallel", "2"]):
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return BUILD


def test_kernels_agree_with_plain_loops(programs: Path) -> None:
    done = subprocess.run([programs / "kernels_test"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == [*_cpu.usable_isas(), "elementary functions", "thread pool"]
    assert all(line.endswith("checks passed") for line in lines)


def test_every_instruction_set_gives_the_bits_of_the_corpus(programs: Path) -> None:
    corpus = ROOT / "tests" / "native" / "corpus.txt"
    done = subprocess.run([programs / "corpus", corpus], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = corpus.read_text().splitlines()
    without_bf16 = [line for line in lines if " bf16 " not in line]  # which AVX512-BF16 rounds otherwise
    assert 0 < len(without_bf16) < len(lines)
    counts = {isa: len(without_bf16 if isa == "avx512bf16" else lines) for isa in _cpu.usable_isas()}
    assert done.stdout.splitlines() == [f"{isa}: {count} hashes equal" for isa, count in counts.items()]


def test_a_hash_that_differs_is_an_error(programs: Path, tmp_path: Path) -> None:
    lines = (ROOT / "tests" / "native" / "corpus.txt").read_text().splitlines()
    (tmp_path / "corpus.txt").write_text("\n".join([lines[0][:-1] + ("1" if lines[0][-1] == "0" else "0"), *lines[1:]]))
    done = subprocess.run([programs / "corpus", tmp_path / "corpus.txt"], capture_output=True, text=True)
    assert done.returncode == 1
    assert lines[0].rpartition(" ")[0] in done.stderr
