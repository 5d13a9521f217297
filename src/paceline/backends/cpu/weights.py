"""The tensors that the native code loads, by name, and how a checkpoint is packed into them.

Names are canonical (`checkpoint.names`), except where the native layout differs from the files:

* `layers.N.experts.gate_proj`, `up_proj` and `down_proj` are lists of matrices, one for each expert;
* `ordered_head.weight` is the embedding of a drafter with centroids, its rows in the order of the centroids' token
  lists, each list padded to whole panels; `ordered_head.tokens` (int32) names each row's token, -1 for padding. Large
  heads that have no centroids in the files get them here (`head_index.py`);
* `draft_token_ids` is int32;
* `embed_tokens.scale` and `embed_tokens_per_layer.scale` [1] are the embeddings' factors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paceline import _cpu
from paceline.backends.cpu.head_index import HeadIndex, build_index, indexed
from paceline.checkpoint import TensorRef, Tensors
from paceline.checkpoint.names import DRAFT_TOKENS, PLE_TABLE, TOKEN_ORDERING, expected_tensors
from paceline.config import DrafterConfig, TargetConfig
from paceline.quant.bf16 import embedding_factor, from_bf16
from paceline.quant.formats import FORMATS, PANEL
from paceline.quant.lattice import SAMPLE, lies_on_q4_0
from paceline.quant.recipes import RECIPES, Stored
from paceline.types import Float32

EMBEDDING = "embed_tokens.weight"
CENTROIDS = "masked_embedding.centroids.weight"
SLICE_BYTES = 4 << 20  # read at a time while packing; malloc keeps what is freed of larger pieces

Tensor = _cpu.Matrix | list[_cpu.Matrix] | _cpu.Table | NDArray[Any]
Job = Callable[[], None]


@dataclass(frozen=True)
class Weights:
    """A model's native tensors by name."""

    quant: str  # the recipe that the matrices' formats come from
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def matrices(self) -> Iterator[tuple[str, _cpu.Matrix]]:
        """All matrices; those of a list are called `name.0`, `name.1`, ..."""
        for name, tensor in self.tensors.items():
            if isinstance(tensor, list):
                yield from ((f"{name}.{i}", matrix) for i, matrix in enumerate(tensor))
            elif isinstance(tensor, _cpu.Matrix):
                yield name, tensor

    @property
    def nbytes(self) -> int:
        """Bytes of all packed matrices."""
        return sum(matrix.nbytes for _, matrix in self.matrices)

    @property
    def bits_per_weight(self) -> float:
        """Of the matrices, scales and padding included."""
        count = sum(rows * columns for rows, columns in (matrix.shape for _, matrix in self.matrices))
        return float(8 * self.nbytes / count)

    def pass_bytes(self, config: TargetConfig) -> int:
        """Bytes of a target's matrices that a pass of one row reads: of experts, those that the row is sent to.

        An embedding is read whole only where it is the head, too.
        """
        total = 0
        for name, tensor in self.tensors.items():
            if isinstance(tensor, list) and config.experts:
                total += sum(matrix.nbytes for matrix in tensor) * config.experts.active // config.experts.count
            elif isinstance(tensor, _cpu.Matrix) and (name != EMBEDDING or config.tied_head):
                total += tensor.nbytes
        return total

    @property
    def is_f32(self) -> bool:
        """Whether all matrices are held in f32."""
        return all(matrix.format == "f32" for _, matrix in self.matrices)


def native_shapes(config: TargetConfig | DrafterConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the native tensors but for the scales: [n], [rows, columns], or [experts, rows, columns]."""
    shapes: dict[str, tuple[int, ...]] = {}
    if isinstance(config, DrafterConfig):
        config = indexed(config)
    ordered = isinstance(config, DrafterConfig) and config.centroids
    for name, shape in expected_tensors(config).items():
        prefix, _, last = name.rpartition(".")
        if last == "gate_up_proj":  # gate rows first
            shapes |= dict.fromkeys((f"{prefix}.gate_proj", f"{prefix}.up_proj"), (shape[0], shape[1] // 2, shape[2]))
        elif name == EMBEDDING and ordered:
            listed = config.vocab_size // ordered
            shapes["ordered_head.weight"] = (ordered * (listed + -listed % PANEL), shape[1])
        elif name == TOKEN_ORDERING:
            shapes["ordered_head.tokens"] = shapes["ordered_head.weight"][:1]
        else:
            shapes[name] = shape
    return shapes


def check_weights(weights: Weights, config: TargetConfig | DrafterConfig) -> None:
    """Compare native tensors with what a model's settings call for: names, shapes and types.

    Raises:
        ValueError: names the tensor that is missing, unknown, or another than it must be.
    """
    expected = native_shapes(config) | dict.fromkeys(embedding_scales(config, lambda _: False), (1,))
    if weights.quant not in RECIPES:
        raise ValueError(f"{weights.quant!r} is no weight format")
    odd = sorted(expected.keys() ^ weights.tensors.keys())
    if odd:
        raise ValueError(f"{odd[0]} is {'missing' if odd[0] in expected else 'not part of the model'}")
    for name, tensor in weights.tensors.items():
        shape: tuple[int, ...]
        if isinstance(tensor, np.ndarray):
            integers = name in ("ordered_head.tokens", DRAFT_TOKENS)
            right = tensor.dtype.str == ("<i4" if integers else "<f4") and tensor.ndim == 1
            shape = tensor.shape
        elif isinstance(tensor, list):
            right = len({matrix.shape for matrix in tensor}) == 1
            shape = (len(tensor), *tensor[0].shape)
        else:
            right, shape = isinstance(tensor, _cpu.Table) == (name == PLE_TABLE), tensor.shape
        if not right or shape != expected[name]:
            raise ValueError(f"{name} is {list(shape)} where config.json calls for {list(expected[name])}")


def embedding_scales(config: TargetConfig | DrafterConfig, in_bf16: Callable[[str], bool]) -> dict[str, Tensor]:
    """The factors of the embeddings.

    Args:
        config: a target's; drafters share its embedding.
        in_bf16: whether the checkpoint holds a tensor in bf16.
    """
    if isinstance(config, DrafterConfig):
        return {}
    scales: dict[str, Tensor] = {}
    for name, width in ((EMBEDDING, config.hidden_size), (PLE_TABLE, config.ple_size)):
        if width:
            scales[name.replace(".weight", ".scale")] = np.array([embedding_factor(width, in_bf16(name))], np.float32)
    return scales


def pack_checkpoint(
    tensors: Tensors,
    config: TargetConfig | DrafterConfig,
    quant: str,
    progress: Callable[[int], None] = lambda _: None,
    formats: Mapping[str, str] | None = None,
    importance: Mapping[str, Float32] | None = None,
    threads: int = 1,
) -> Weights:
    """Pack a checkpoint's tensors, each read a slice of rows at a time, so that memory never holds one twice.

    Args:
        tensors: checked tensors.
        config: the model's.
        quant: recipe.
        progress: called with the file bytes of each tensor packed.
        formats: other formats of single matrices, by native name.
        importance: how much an error in each column [columns] of a matrix matters, by native name, with `.0`, `.1`, ...
            for the matrices of a list; all alike in those that it does not name.
        threads: that pack at once.

    Raises:
        CheckpointError: a file ended early, or a drafter's token ids are damaged.
    """
    weights = Weights(quant, embedding_scales(config, lambda name: tensors[name].dtype == "BF16"))
    chosen = choose_formats(config, quant, lambda name: _element(_source(tensors, name), quant)) | dict(formats or {})
    shapes = native_shapes(config)
    index = _head_index(tensors) if "ordered_head.tokens" in shapes else None
    with _Pool(threads) as pool:
        jobs: dict[str, list[Future[None]]] = {}
        for name, shape in shapes.items():
            if name == PLE_TABLE:
                weights.tensors[name] = map_table(tensors[name])
            elif index and name == "ordered_head.tokens":
                weights.tensors[name] = index.tokens.ravel()
            elif index and name == CENTROIDS and index.centroids is not None:
                weights.tensors[name] = _centroids(index.centroids, chosen[name])
            elif name == DRAFT_TOKENS:
                weights.tensors[name] = tensors.vector(name).astype(np.int32)
            elif len(shape) == 1:
                weights.tensors[name] = tensors.vector(name)
            else:
                if index and name == "ordered_head.weight":
                    made = _ordered_head(tensors[EMBEDDING], index.tokens, chosen[name], (importance or {}).get(name))
                else:
                    made = _start(tensors, name, chosen[name], importance or {})
                weights.tensors[name], parts = made
                jobs[name] = [pool.submit(part) for part in parts]
        for name, running in jobs.items():
            for job in running:
                job.result()
            ref = _source(tensors, name)
            progress(min(ref.bytes, ref.bytes * math.prod(shapes[name]) // math.prod(ref.shape)))
    return weights


class _Pool(ThreadPoolExecutor):
    """Threads that begin nothing more once the block has raised."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.shutdown(wait=True, cancel_futures=error is not None)


def choose_formats(
    config: TargetConfig | DrafterConfig, quant: str, element: Callable[[str], str] = lambda _: "BF16"
) -> dict[str, str]:
    """The format of each native matrix by a recipe; `element` gives the type of its elements in the files."""
    shapes = {name: s for name, s in native_shapes(config).items() if len(s) > 1 and name != PLE_TABLE}
    return RECIPES[quant].formats({name: Stored(shape, element(name)) for name, shape in shapes.items()})


def _element(ref: TensorRef, quant: str) -> str:
    """The type of a tensor's elements; Q4_0 of plain ones that lie on its grid (of models trained for it)."""
    if not RECIPES[quant].quantises or ref.block_type:
        return ref.dtype
    below = _one_below_the_other(ref)
    rows = np.array(below.map()[:: max(1, below.rows // SAMPLE)])
    on_grid = lies_on_q4_0(from_bf16(rows) if rows.dtype == np.uint16 else rows.astype(np.float32))
    return "Q4_0" if on_grid else ref.dtype


def _one_below_the_other(ref: TensorRef) -> TensorRef:
    """A matrix, or the matrices of a list as one."""
    return replace(ref, shape=(math.prod(ref.shape[:-1]), ref.shape[-1]))


def map_table(ref: TensorRef) -> _cpu.Table:
    """A table of per-layer embeddings, left in its file."""
    return _cpu.Table(ref.map(), ref.block_type)


def _source(tensors: Tensors, name: str) -> TensorRef:
    """The tensor in the files that a native matrix, or list of them, is made of."""
    if name == "ordered_head.weight" or (name == CENTROIDS and name not in tensors.refs):
        return tensors[EMBEDDING]
    if name not in tensors.refs:  # gate and up projections of experts in one
        return tensors[f"{name.rpartition('.')[0]}.gate_up_proj"]
    return tensors[name]


def _start(tensors: Tensors, name: str, fmt: str, importance: Mapping[str, Float32]) -> tuple[Tensor, list[Job]]:
    """An empty matrix, or list of them, and what packs its parts."""
    if len(_source(tensors, name).shape) == 3:
        return _experts(tensors, name, fmt, importance)
    return _matrix(tensors[name], fmt, importance.get(name))


def _matrix(ref: TensorRef, fmt: str, importance: Float32 | None) -> tuple[Tensor, list[Job]]:
    rows, columns = ref.shape
    matrix = _cpu.Matrix(fmt, rows, columns)
    step = max(PANEL, SLICE_BYTES * rows // max(1, ref.bytes) // PANEL * PANEL)

    def pack(start: int) -> None:
        matrix.pack(ref.read(start, min(start + step, rows)), start, ref.block_type, importance)

    return matrix, [partial(pack, start) for start in range(0, rows, step)]


def _experts(tensors: Tensors, name: str, fmt: str, importance: Mapping[str, Float32]) -> tuple[Tensor, list[Job]]:
    ref = _source(tensors, name)
    experts, rows, columns = ref.shape
    first, count = 0, rows
    if name not in tensors.refs:  # the lower or upper half of each
        count = rows // 2
        first = 0 if name.endswith("gate_proj") else count
    below = _one_below_the_other(ref)
    matrices = [_cpu.Matrix(fmt, count, columns) for _ in range(experts)]

    def pack(expert: int) -> None:
        start = first + expert * rows
        matrices[expert].pack(below.read(start, start + count), 0, ref.block_type, importance.get(f"{name}.{expert}"))

    return matrices, [partial(pack, expert) for expert in range(experts)]


def _head_index(tensors: Tensors) -> HeadIndex:
    """The token lists of a drafter's ordered head: the files' own, or found in a dense one."""
    if TOKEN_ORDERING not in tensors.refs:
        return build_index(tensors[EMBEDDING])
    ordering = tensors.vector(TOKEN_ORDERING).reshape(tensors[CENTROIDS].rows, -1)
    padding = (0, 0), (0, -ordering.shape[1] % PANEL)
    return HeadIndex(np.pad(ordering.astype(np.int32), padding, constant_values=-1))


def _centroids(rows: Float32, fmt: str) -> _cpu.Matrix:
    """Centroids that were found here, in a head of a format."""
    matrix = _cpu.Matrix("q8_0" if FORMATS[fmt].quantised else fmt, *rows.shape)
    matrix.pack(rows)
    return matrix


def _ordered_head(
    ref: TensorRef, tokens: NDArray[np.int32], fmt: str, importance: Float32 | None
) -> tuple[Tensor, list[Job]]:
    rows = ref.map()  # in no order: read whole, it would be there twice
    matrix = _cpu.Matrix(fmt, tokens.size, ref.shape[1])

    def pack(number: int) -> None:
        members = tokens[number]
        listed = np.where(members[:, None] >= 0, rows[members], np.zeros((), rows.dtype))  # zero bytes are zeros
        matrix.pack(listed, number * len(members), ref.block_type, importance)

    return matrix, [partial(pack, number) for number in range(len(tokens))]
