"""Every kernel, compiled for GPUs that are not here: what the machine code shows of speed and exactness.

The operations are called with the shapes of official models, on tensors without contents; instead of running, each
kernel is compiled.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from paceline.backends.torch import device_sampler  # noqa: E402
from paceline.backends.torch.kernels import attention, head, matmul, rows, sampler  # noqa: E402

AMPERE, HOPPER = 80, 90
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
SHARED = {AMPERE: 163 << 10, HOPPER: 227 << 10}  # bytes a program can have
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


class Compiled:
    """Takes a kernel's place, and compiles it for what it is called with."""

    def __init__(self, kernel: Any, target: int, found: list) -> None:
        self.kernel, self.target, self.found = kernel, target, found

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.compile

    def compile(self, *given: Any, **named: Any) -> None:
        assert "enable_fp_fusion" in named  # else it is Triton's release that decides about bits
        options = {name: named.pop(name) for name in OPTIONS if name in named}
        values = dict(zip(self.kernel.arg_names, given, strict=False)) | named
        types, constants, known = {}, {}, {}
        for number, (name, parameter) in enumerate(zip(self.kernel.arg_names, self.kernel.params, strict=True)):
            value = values[name]
            if isinstance(value, torch.Tensor):
                types[name], known[(number,)] = TYPES[value.dtype], [["tt.divisibility", 16]]
            elif parameter.is_constexpr or value is None or value == 1:
                types[name], constants[name] = "constexpr", value
            else:
                types[name] = "fp32" if isinstance(value, float) else "i32"
                if isinstance(value, int) and value % 16 == 0:
                    known[(number,)] = [["tt.divisibility", 16]]
        source = ASTSource(fn=self.kernel, signature=types, constexprs=constants, attrs=known)
        self.found.append(triton.compile(source, target=GPUTarget("cuda", self.target, 32), options=options))


@pytest.fixture(params=[AMPERE, HOPPER])
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list]:
    """What was compiled; each must fit its device and keep its numbers in registers."""
    found: list = []
    for module in (attention, head, matmul, rows, sampler):
        for name, value in list(vars(module).items()):
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Compiled(value, request.param, found))
    yield found
    assert found
    for kernel in found:
        assert kernel.metadata.shared <= SHARED[request.param]
        assert not re.search(r"\b(ld|st)\.local", kernel.asm["ptx"])


@pytest.mark.parametrize(("outputs", "columns"), [(256, 1536), (5376, 21504), (43008, 5376), (262144, 1536)])
@pytest.mark.parametrize("fmt", ["bf16", "q8_0", "q4_0"])
def test_products_use_one_instruction_and_fetch_ahead(compiled: list, outputs: int, columns: int, fmt: str) -> None:
    blocks = columns // 64
    values = {
        "bf16": empty(outputs, columns),
        "q8_0": empty(blocks, outputs, 64, dtype=torch.int8),
        "q4_0": empty(blocks, outputs, 32, dtype=torch.uint8),
    }[fmt]
    scales = None if fmt == "bf16" else empty(blocks, outputs, 2, dtype=torch.float16)
    matmul.matmul(empty(16, columns), values, scales, fmt)
    matmul.gate_up(empty(16, columns), values, scales, fmt)
    for cap in (0.0, 30.0):
        matmul.scores(empty(16, columns), values, scales, fmt, cap)
    for kernel in compiled:
        ptx = kernel.asm["ptx"]
        # One instruction for all heights: the large ones of some devices sum in another order.
        assert set(re.findall(r"mma\.sync[^ ]*", ptx)) == {"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"}
        assert "wgmma" not in ptx
        assert "cp.async" in ptx
        assert not re.search(r"ld\.global", ptx)  # every load is on its way before it is needed


def test_experts(compiled: list) -> None:
    x, weights, chosen = empty(16, 2816), empty(16, 8, dtype=torch.float32), empty(16, 8, dtype=torch.int32)
    plain = (empty(128 * 1408, 2816), None, "bf16"), (empty(128 * 2816, 704), None, "bf16")
    matmul.experts(x, weights, chosen, *plain[0], *plain[1], 128)
    scales = [empty(n, outputs, 2, dtype=torch.float16) for n, outputs in ((44, 128 * 1408), (11, 128 * 2816))]
    q4 = [empty(*s.shape[:2], 32, dtype=torch.uint8) for s in scales]
    matmul.experts(x, weights, chosen, q4[0], scales[0], "q4_0", q4[1], scales[1], "q4_0", 128)
    assert len(compiled) == 6
    assert sum("mma.sync" in kernel.asm["ptx"] for kernel in compiled) == 4


@pytest.mark.parametrize(("count", "kv_heads", "size", "window"), [(8, 1, 256, 512), (32, 4, 512, 1 << 30)])
def test_attention(compiled: list, count: int, kv_heads: int, size: int, window: int) -> None:
    keys, at = empty(2, kv_heads, 4096, size), [empty(16, dtype=torch.int64)] * 2
    norm, angles = empty(size), empty(16, size // 2)
    x = empty(16, (count + 2 * kv_heads) * size)
    queries = attention.heads(x, norm, norm, angles, angles, keys, keys, *at, count, 1e-6, True)
    attention.heads(x[:, : count * size], norm, None, angles, angles, keys, keys, *at, count, 1e-6, True)
    attention.attend(queries, keys, keys, *at, window, 4096)
    assert len(compiled) == 4
    assert "wgmma" not in "".join(kernel.asm["ptx"] for kernel in compiled)


def test_rows(compiled: list) -> None:
    x, weight = empty(16, 5376), empty(5376)
    rows.norm(x, weight, 1e-6)
    rows.join(x, x, weight, weight, empty(1), 1e-6)
    rows.join(x, x, weight, None, None, 1e-6)
    rows.gated(*empty(16, 43008).chunk(2, dim=-1))
    rows.choose(empty(16, 128, dtype=torch.float32), empty(128), 8)
    head.centroid_scores(
        empty(16, 256), empty(16, 32, dtype=torch.int64), empty(262144, 256), empty(2048, 128, dtype=torch.int64),
        empty(16, dtype=torch.int64),
    )  # fmt: skip
    assert len(compiled) == 6


@pytest.mark.parametrize("ranked", [False, True])
def test_sampling_rounds_every_number(compiled: list, ranked: bool) -> None:
    """No multiplication is fused with an addition, and no division or exponential is approximate."""
    settings = empty(16, device_sampler.COLUMNS, dtype=torch.int32)
    sampler.sample(empty(16, 262144, dtype=torch.float32), settings, empty(16, dtype=torch.int64), ranked)
    assert len(compiled) == 3
    for kernel in compiled[1:]:
        ptx = kernel.asm["ptx"]
        assert not re.findall(r"fma\.[a-z.]*f32|\w+\.approx|ftz", re.sub(r"div\.full\.f32 .*", "", ptx))
        assert "div.rn.f32" in ptx


def test_the_halves_of_bytes_become_numbers() -> None:
    """The assembly that unpacks four-bit weights, run by hand for every byte."""
    for byte in range(256):
        word = byte | (byte ^ 0x5A) << 8 | (255 - byte) << 16 | byte << 24
        found = emulated(matmul.HALVES, word)
        low, high = ([bits >> shift & 0xFFFF for bits in found[i : i + 2] for shift in (0, 16)] for i in (0, 2))
        values = torch.tensor([*low, *high], dtype=torch.int32).to(torch.int16).view(torch.bfloat16).tolist()
        parts = list(word.to_bytes(4, "little"))
        assert values == [(part & 15) - 8 for part in parts] + [(part >> 4) - 8 for part in parts]


def emulated(assembly: str, word: int) -> list[int]:
    """Registers $0 to $3 after the instructions of PTX that are used here; $4 is `word`."""
    registers = {"$4": word}

    def value(name: str) -> int:
        return registers[name] if name in registers else int(name, 0)

    for line in assembly.strip("{}\n ").split(";"):
        operation, _, rest = line.strip().partition(" ")
        if not operation or operation == ".reg":
            continue
        target, *sources = [part.strip() for part in rest.split(",")]
        a, *others = [value(name) for name in sources]
        if operation == "mov.b32":
            result = a
        elif operation == "shr.b32":
            result = a >> others[0]
        elif operation == "prmt.b32":
            both = (a | others[0] << 32).to_bytes(8, "little")
            result = sum(both[others[1] >> 4 * i & 7] << 8 * i for i in range(4))
        elif operation == "lop3.b32":
            b, c, table = others
            result = sum((table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)) & 1) << i for i in range(32))
        else:
            assert operation == "fma.rn.bf16x2"
            x, y, z = (torch.tensor([v & 0xFFFF, v >> 16]).to(torch.int16).view(torch.bfloat16) for v in (a, *others))
            low, high = (x.double() * y.double() + z.double()).bfloat16().view(torch.int16).tolist()
            result = low & 0xFFFF | (high & 0xFFFF) << 16
        registers[target] = result
    return [registers[f"${number}"] for number in range(4)]
