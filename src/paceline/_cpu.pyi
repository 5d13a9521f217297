"""Types of the native module; `csrc/cpu/bind.cpp` is the other half."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = Sequence[float] | NDArray[np.float32]
Rows = NDArray[Any]  # float32, float16, or uint16 with the bits of bfloat16

def usable_isas() -> list[str]: ...
def matmul(
    matrix: Matrix, x: NDArray[np.float32], out: NDArray[np.float32], isa: str = "", threads: int = 1
) -> None: ...
def checksum(data: NDArray[np.uint8], threads: int) -> int: ...

class Matrix:
    def __init__(self, format: str, rows: int, cols: int) -> None: ...
    def pack(self, source: Rows, first: int = 0) -> None: ...
    def row(self, index: int) -> NDArray[np.float32]: ...
    def packed(self) -> NDArray[np.uint8]: ...
    def fill_random(self, seed: int) -> None: ...
    @staticmethod
    def mapped(format: str, rows: int, cols: int, packed: NDArray[np.uint8]) -> Matrix: ...
    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def format(self) -> str: ...
    @property
    def nbytes(self) -> int: ...

def sample(logits: NDArray[np.float32], params: object, position: int, isa: str = "") -> int: ...

class Experts:
    active: int
    router: Matrix
    router_norm: Floats
    per_expert_scale: Floats
    post_norm_dense: Floats
    pre_norm: Floats
    post_norm: Floats
    gate: Sequence[Matrix]
    up: Sequence[Matrix]
    down: Sequence[Matrix]

class Layer:
    sliding: bool
    head_dim: int
    kv_heads: int
    kv_source: int
    scalar: float
    input_norm: Floats
    post_attention_norm: Floats
    pre_feedforward_norm: Floats
    post_feedforward_norm: Floats
    q_norm: Floats
    k_norm: Floats
    q: Matrix
    k: Matrix
    v: Matrix
    o: Matrix
    gate: Matrix
    up: Matrix
    down: Matrix
    ple_gate: Matrix
    ple_projection: Matrix
    ple_norm: Floats
    experts: Experts

class TargetWeights:
    vocab: int
    window: int
    hidden: int
    heads: int
    eps: float
    embed_scale: float
    softcap: float
    rope_sliding: Floats
    rope_full: Floats
    embedding: Matrix
    final_norm: Floats
    layers: Sequence[Layer]
    ple_size: int
    ple_scale: float
    ple_projection: Matrix
    ple_norm: Floats
    def set_ple_table(self, table: Rows) -> None: ...

class Snapshot:
    @property
    def nbytes(self) -> int: ...
    @property
    def length(self) -> int: ...
    @property
    def shortest(self) -> int: ...

class DrafterWeights:
    vocab: int
    backbone: int
    hidden: int
    heads: int
    eps: float
    pre_projection: Matrix
    post_projection: Matrix
    final_norm: Floats
    layers: Sequence[Layer]
    head: Matrix
    centroids: Matrix
    centroid_top_k: int
    tokens: Sequence[int]

class Decoder:
    threads: int
    def __init__(
        self,
        weights: TargetWeights,
        drafter: DrafterWeights | None,
        *,
        isa: str,
        threads: int,
        slots: int,
        context: int,
        max_rows: int,
        bf16_cache: bool,
    ) -> None: ...
    def run(self, works: Sequence[object]) -> list[tuple[Any, ...]]: ...
    def length(self, slot: int) -> int: ...
    def truncate(self, slot: int, length: int) -> None: ...
    def clear(self, slot: int) -> None: ...
    def save(self, slot: int) -> Snapshot: ...
    def restore(self, slot: int, snapshot: Snapshot) -> None: ...
    @property
    def isa(self) -> str: ...
    @property
    def cache_bytes(self) -> int: ...
    def hidden(self, slot: int) -> NDArray[np.float32]: ...
    def last_draft_step(self, row: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]: ...
