"""Change the order of operations in one kernel after the other, and see that the corpus of bits notices.

    python -m tests.native.reordered

Each change computes the same and rounds otherwise. It is made in a copy of the sources, compiled for this processor's
best instruction set with narrow registers, and linked with the other objects of build/tests. Takes half a minute a
change; ends with 1 when one goes unnoticed.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from paceline import _cpu

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "tests"
CORPUS = ROOT / "tests" / "native" / "corpus.txt"
KERNELS = "csrc/cpu/kernels"


@dataclass(frozen=True)
class Change:
    """What is replaced in a kernel's source: (old, new), each old once in the file."""

    kernel: str
    file: str
    replacements: tuple[tuple[str, str], ...]


def change(kernel: str, file: str, *replacements: str) -> Change:
    return Change(kernel, file, tuple(zip(replacements[::2], replacements[1::2], strict=True)))


CHANGES = (
    change(
        "matmul: scales of integers",
        "operands.hpp",
        "fma(convert<f32x16>(dots), weight_scale * splat(act_scale), sum)",
        "fma(convert<f32x16>(dots) * splat(act_scale), weight_scale, sum)",
    ),
    change(
        "matmul: minima",
        "panels_narrow.hpp",
        "sums[m] = fma(minimum, scaled_sum<F, Part>(row(m)), sums[m])",
        "sums[m] = sums[m] + minimum * scaled_sum<F, Part>(row(m))",
    ),
    change(
        "matmul: one chain of floats for two",
        "panels_narrow.hpp",
        "odd[m] = dot_lane(odd[m], w1,",
        "even[m] = dot_lane(even[m], w1,",
    ),
    change(
        "matmul: pairs of bfloat16 the other way round",
        "isa/portable.hpp",
        "acc = fma(bits<f32x16>(w << 16), bits<f32x16>(pair << 16), acc);",
        "acc = fma(bits<f32x16>(w & 0xffff0000u), bits<f32x16>(pair & 0xffff0000u), acc);",
        "return fma(bits<f32x16>(w & 0xffff0000u), bits<f32x16>(pair & 0xffff0000u), acc);",
        "return fma(bits<f32x16>(w << 16), bits<f32x16>(pair << 16), acc);",
    ),
    change(
        "pack_activations: divided by the scale",
        "matmul.hpp",
        "to_int8(x0 * splat(inverse))",
        "to_int8(x0 / splat(scale))",
    ),
    change("gated: gelu", "vec.hpp", "splat(0.044715f) * x * x", "x * x * splat(0.044715f)"),
    change("rms_norm: squares", "elementwise.hpp", "squares = fma(v, v, squares)", "squares = squares + v * v"),
    change(
        "rms_norm, softmax: sum of sixteen lanes",
        "vec.hpp",
        "return fold(v, [](auto a, auto b) { return a + b; });",
        "Scalar<V> lanes[16], total = 0; store(lanes, v); for (auto lane : lanes) total += lane; return total;",
    ),
    change(
        "add_scaled",
        "elementwise.hpp",
        "(load<f32x16>(x + i) + load<f32x16>(y + i)) * splat(scale)",
        "fma(load<f32x16>(x + i), splat(scale), load<f32x16>(y + i) * splat(scale))",
    ),
    change(
        "axpy",
        "elementwise.hpp",
        "fma(load<f32x16>(x + i), splat(a), load<f32x16>(y + i))",
        "load<f32x16>(y + i) + load<f32x16>(x + i) * splat(a)",
    ),
    change(
        "rope", "elementwise.hpp", "x[i] = a * cos[i] - b * sin[i];", "x[i] = __builtin_fmaf(a, cos[i], -(b * sin[i]));"
    ),
    change(
        "score: halves of the columns for even and odd ones",
        "attention.hpp",
        "at[J] = queries[J] + low + parity;",
        "at[J] = queries[J] + low + parity * (high - low) / 2;",
        "rows[p] = keys[p] + parity * 16;",
        "rows[p] = keys[p] + parity * (high - low) / 2 * 16;",
        "accumulate<2>(sum, at, rows, high - low, ahead);",
        "accumulate<1>(sum, at, rows, (high - low) / 2, ahead);",
    ),
    change(
        "softmax: divided by the sum",
        "attention.hpp",
        "const f32x16 inverse = splat(1.0f / sum(total));",
        "const f32x16 all = splat(sum(total));",
        "load<f32x16>(scores + i) * inverse",
        "load<f32x16>(scores + i) / all",
    ),
    change(
        "mix: values summed by block first",
        "attention.hpp",
        "sums[p][J] = load<f32x16>(out[J] + (panel + p) * 16);",
        "sums[p][J] = splat(0.0f);",
        "store(out[J] + (panel + p) * 16, sums[p][J]);",
        "store(out[J] + (panel + p) * 16, load<f32x16>(out[J] + (panel + p) * 16) + sums[p][J]);",
    ),
    change(
        "softcap",
        "elementwise.hpp",
        "tanh(load<f32x16>(x + i) / splat(cap))",
        "tanh(load<f32x16>(x + i) * splat(1 / cap))",
    ),
    change(
        "arg_max: the sum of its probability from the end",
        "elementwise.hpp",
        "for (int64_t i = 0; i < n; i += 16) total = total + exp(",
        "for (int64_t i = (n - 1) / 16 * 16; i >= 0; i -= 16) total = total + exp(",
    ),
)


def built(isa: str) -> tuple[list[str], Path]:
    """Build the corpus program; how its kernels of that set are compiled, but for the output, and to which object."""
    options = ["-DPACELINE_MODULE=OFF", "-DPACELINE_TESTS=ON", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"]
    subprocess.run(["cmake", "-S", ROOT, "-B", BUILD, *options], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", BUILD, "--target", "corpus"], check=True, stdout=subprocess.DEVNULL)
    for entry in json.loads((BUILD / "compile_commands.json").read_text()):
        command = shlex.split(entry["command"])
        if f"-DPACELINE_NAMESPACE={isa}" in command and entry["file"].endswith("kernels.cpp"):
            at = command.index("-o")
            return command[:at] + command[at + 2 :], (Path(entry["directory"]) / command[at + 1]).resolve()
    raise SystemExit(f"{BUILD} has no kernels of {isa}")


def apply(what: Change, sources: Path) -> None:
    path = sources / KERNELS / what.file
    text = path.read_text()
    for old, _ in what.replacements:
        if text.count(old) != 1:
            raise SystemExit(f"{what.kernel}: `{old}` is {text.count(old)} times in {what.file}; mend the change")
    for i, (old, _) in enumerate(what.replacements):  # in two steps: a new text may hold another's old one
        text = text.replace(old, f"@{i}@")
    for i, (_, new) in enumerate(what.replacements):
        text = text.replace(f"@{i}@", new)
    path.write_text(text)


def noticed(what: Change, isa: str, command: list[str], replaced: Path) -> bool:
    """Whether the corpus differs with that change."""
    with tempfile.TemporaryDirectory() as folder:
        sources, changed = Path(folder, "sources"), Path(folder, "kernels.o")
        shutil.copytree(ROOT / "csrc", sources / "csrc")
        apply(what, sources)
        moved = [part.replace(str(ROOT / "csrc"), str(sources / "csrc")) for part in command]
        subprocess.run([*moved, "-o", changed], check=True)
        objects = [
            path for path in BUILD.rglob("*.o") if "kernels_test" not in str(path) and path.resolve() != replaced
        ]
        subprocess.run([command[0], "-pthread", *objects, changed, "-o", Path(folder, "corpus")], check=True)
        environment = os.environ | {"PACELINE_ISA": isa}
        done = subprocess.run([Path(folder, "corpus"), CORPUS], env=environment, capture_output=True, text=True)
        print(f"{what.kernel}: {done.stdout.strip()}", flush=True)
        return done.returncode != 0


def main() -> None:
    isa = next(isa for isa in _cpu.usable_isas() if not isa.startswith("avx512"))
    command, replaced = built(isa)
    missed = [what.kernel for what in CHANGES if not noticed(what, isa, command, replaced)]
    if missed:
        sys.exit(f"unnoticed: {'; '.join(missed)}")


if __name__ == "__main__":
    main()
