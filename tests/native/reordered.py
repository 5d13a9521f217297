"""Change the order of operations in one kernel after the other, and see that the corpus of bits notices.

    python -m tests.native.reordered [BUILD]

Each change is one that rounds differently and computes the same otherwise. It is compiled for one instruction set in a copy
of the sources and linked with the other objects of BUILD (build/tests by default: the native test programs, which
`tests/backends/cpu/test_native_program.py` builds). Takes half a minute a change, and ends with 1 when one goes unnoticed.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
CORPUS = ROOT / "tests" / "native" / "corpus.txt"
KERNELS = ROOT / "csrc" / "cpu" / "kernels"


@dataclass(frozen=True)
class Change:
    """A kernel, and what is replaced in its source."""

    kernel: str
    file: str
    old: str
    new: str


CHANGES = (
    Change(
        "matmul, scales of integers",
        "operands.hpp",
        "fma(convert<f32x16>(dots), weight_scale * splat(act_scale), sum)",
        "fma(convert<f32x16>(dots) * splat(act_scale), weight_scale, sum)",
    ),
    Change(
        "matmul, minima",
        "panels_narrow.hpp",
        "sums[m] = fma(minimum, scaled_sum<F, Part>(row(m)), sums[m])",
        "sums[m] = sums[m] + minimum * scaled_sum<F, Part>(row(m))",
    ),
    Change(
        "matmul, floats",
        "panels_narrow.hpp",
        "sums[m].even + sums[m].odd",
        "sums[m].even + sums[m].odd * splat(1.0000001f)",
    ),
    Change(
        "matmul, pairs of bfloat16",
        "isa/portable.hpp",
        "acc = fma(bits<f32x16>(w << 16)",
        "acc = fma(bits<f32x16>(w & 0xffff0000u)",
    ),
)


def compile_commands(build: Path, isa: str) -> tuple[list[str], Path]:
    """The command that compiles the kernels of a set, without its output, and the object that it writes."""
    for entry in json.loads((build / "compile_commands.json").read_text()):
        command = shlex.split(entry["command"])
        if f"PACELINE_NAMESPACE={isa}" in entry["command"] and entry["file"].endswith("kernels.cpp"):
            at = command.index("-o")
            return command[:at] + command[at + 2 :], Path(entry["directory"]) / command[at + 1]
    raise SystemExit(f"{build} has no kernels for {isa}")
