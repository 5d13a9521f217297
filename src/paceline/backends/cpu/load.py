"""From checkpoint tensors to packed native weights.

Matrices are read and packed a slice of rows at a time, so that memory never holds a tensor twice. Per-layer-embedding
tables are not loaded: they are mapped and read by row. Knows tensor names and native structures, no arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paceline import _cpu
from paceline.checkpoint import Tensors
from paceline.checkpoint.names import TOKEN_ORDERING
from paceline.config import DrafterConfig, Layer, Rope, Stack, TargetConfig
from paceline.errors import BackendError
from paceline.quant.blocks import from_bf16, to_bf16

SLICE_BYTES = 32 << 20  # read at a time while packing
LANES = 16  # vectors are whole native registers


@dataclass
class Loader:
    """Packs tensors into one weight format; reports each tensor and counts the bytes that a decoding pass reads."""

    tensors: Tensors
    quant: str
    progress: Callable[[int], None]  # called with the file bytes of each tensor packed
    weight_bytes: int = field(default=0, init=False)

    def matrix(self, name: str, quant: str | None = None) -> _cpu.Matrix:
        ref = self.tensors[name]
        rows, columns = ref.shape
        matrix = _cpu.Matrix(quant or self.quant, rows, columns)
        step = max(LANES, SLICE_BYTES * rows // max(1, ref.bytes) // LANES * LANES)
        for start in range(0, rows, step):
            matrix.pack(ref.read(start, min(start + step, rows)), start)
        return self._count(matrix, ref.bytes)

    def experts(self, name: str, first: int, last: int | None) -> list[_cpu.Matrix]:
        """Rows first..last of every expert of a [experts, rows, columns] tensor, a matrix each."""
        ref = self.tensors[name]
        matrices = []
        for expert in range(ref.shape[0]):
            rows = ref.read(expert, expert + 1)[0, first:last]
            matrix = _cpu.Matrix(self.quant, *rows.shape)
            matrix.pack(np.ascontiguousarray(rows))
            matrices.append(self._count(matrix, rows.nbytes))
        return matrices

    def vector(self, name: str) -> NDArray[np.float32]:
        return as_float32(self.tensors[name].read())

    def scalar(self, name: str) -> float:
        return float(self.vector(name)[0])

    def scale(self, name: str, value: float) -> float:
        """An embedding's factor, rounded as the reference rounds it: to the table's own type."""
        exact = np.array([value], np.float32)
        return float((from_bf16(to_bf16(exact)) if self.tensors[name].dtype == "BF16" else exact)[0])

    def _count(self, matrix: _cpu.Matrix, file_bytes: int) -> _cpu.Matrix:
        self.weight_bytes += matrix.nbytes
        self.progress(file_bytes)
        return matrix


def as_float32(values: NDArray[Any]) -> NDArray[np.float32]:
    """Checkpoint values (bf16 as its bits) in float32."""
    return from_bf16(values) if values.dtype == np.uint16 else np.asarray(values, np.float32)


def load_target(config: TargetConfig, loader: Loader) -> _cpu.TargetWeights:
    """Pack a whole target.

    Raises:
        BackendError: a width that the native kernels do not take.
    """
    _check_widths(config, config.ple_size)
    w = _cpu.TargetWeights()
    w.vocab, w.hidden, w.heads, w.eps = config.vocab_size, config.hidden_size, config.heads, config.rms_eps
    w.window, w.softcap = config.sliding_window, config.softcap or 0.0
    w.rope_sliding, w.rope_full = (_frequencies(config, sliding) for sliding in (True, False))
    w.embedding = loader.matrix("embed_tokens.weight")
    w.embed_scale = loader.scale("embed_tokens.weight", config.hidden_size**0.5)
    w.final_norm = loader.vector("norm.weight")
    if config.ple_size:
        w.ple_size = config.ple_size
        w.ple_scale = loader.scale("embed_tokens_per_layer.weight", config.ple_size**0.5)
        w.set_ple_table(loader.tensors["embed_tokens_per_layer.weight"].map())
        w.ple_projection = loader.matrix("per_layer_model_projection.weight")
        w.ple_norm = loader.vector("per_layer_projection_norm.weight")
    w.layers = [_target_layer(config, index, loader) for index in range(len(config.layers))]
    return w


def load_drafter(config: DrafterConfig, loader: Loader) -> _cpu.DrafterWeights:
    """Pack a whole drafter. Its head is put in the order of the centroids' token lists.

    Raises:
        BackendError: a width that the native kernels do not take.
    """
    _check_widths(config, config.backbone_hidden_size)
    w = _cpu.DrafterWeights()
    w.vocab, w.hidden, w.heads, w.eps = config.vocab_size, config.hidden_size, config.heads, config.rms_eps
    w.backbone = config.backbone_hidden_size
    w.pre_projection = loader.matrix("pre_projection.weight")
    w.post_projection = loader.matrix("post_projection.weight")
    w.final_norm = loader.vector("norm.weight")
    w.layers = [_layer(layer, f"layers.{index}.", loader) for index, layer in enumerate(config.layers)]
    if config.centroids:
        w.centroids = loader.matrix("masked_embedding.centroids.weight")
        w.centroid_top_k = config.centroid_top_k
        w.head, w.tokens = _ordered_head(config, loader)
    else:
        w.head = loader.matrix("embed_tokens.weight")
    return w


def _ordered_head(config: DrafterConfig, loader: Loader) -> tuple[_cpu.Matrix, list[int]]:
    ordering = loader.tensors[TOKEN_ORDERING].read().reshape(config.centroids, -1)
    if not np.array_equal(np.sort(ordering, axis=None), np.arange(config.vocab_size)):
        path = loader.tensors[TOKEN_ORDERING].path
        raise BackendError(f"{path}: {TOKEN_ORDERING} does not name every token once; download it again")
    ref = loader.tensors["embed_tokens.weight"]
    rows = ref.read()
    listed = ordering.shape[1]
    width = listed + -listed % LANES  # each centroid's list fills whole panels
    tokens = np.full((config.centroids, width), -1, np.int32)
    tokens[:, :listed] = ordering
    matrix = _cpu.Matrix(loader.quant, tokens.size, config.hidden_size)
    padded = np.zeros((width, config.hidden_size), rows.dtype)
    for index, members in enumerate(ordering):
        padded[:listed] = rows[members]
        matrix.pack(padded, index * width)
    return loader._count(matrix, ref.bytes), tokens.ravel().tolist()


def _target_layer(config: TargetConfig, index: int, loader: Loader) -> _cpu.Layer:
    layer, prefix = config.layers[index], f"layers.{index}."
    native = _layer(layer, prefix, loader)
    if layer.kv_source == index:
        native.k = loader.matrix(prefix + "self_attn.k_proj.weight")
        native.k_norm = loader.vector(prefix + "self_attn.k_norm.weight")
        if layer.has_v_proj:
            native.v = loader.matrix(prefix + "self_attn.v_proj.weight")
    if config.ple_size:
        native.ple_gate = loader.matrix(prefix + "per_layer_input_gate.weight")
        native.ple_projection = loader.matrix(prefix + "per_layer_projection.weight")
        native.ple_norm = loader.vector(prefix + "post_per_layer_input_norm.weight")
    if config.experts:
        native.experts = _experts(config, prefix, loader)
    return native


def _layer(layer: Layer, prefix: str, loader: Loader) -> _cpu.Layer:
    """What layers of targets and drafters have in common."""
    native = _cpu.Layer()
    native.sliding, native.head_dim, native.kv_heads = layer.sliding, layer.head_dim, layer.kv_heads
    native.kv_source = layer.kv_source
    native.scalar = loader.scalar(prefix + "layer_scalar")
    native.input_norm = loader.vector(prefix + "input_layernorm.weight")
    native.post_attention_norm = loader.vector(prefix + "post_attention_layernorm.weight")
    native.pre_feedforward_norm = loader.vector(prefix + "pre_feedforward_layernorm.weight")
    native.post_feedforward_norm = loader.vector(prefix + "post_feedforward_layernorm.weight")
    native.q_norm = loader.vector(prefix + "self_attn.q_norm.weight")
    native.q = loader.matrix(prefix + "self_attn.q_proj.weight")
    native.o = loader.matrix(prefix + "self_attn.o_proj.weight")
    native.gate = loader.matrix(prefix + "mlp.gate_proj.weight")
    native.up = loader.matrix(prefix + "mlp.up_proj.weight")
    native.down = loader.matrix(prefix + "mlp.down_proj.weight")
    return native


def _experts(config: TargetConfig, prefix: str, loader: Loader) -> _cpu.Experts:
    assert config.experts is not None
    width = config.experts.intermediate_size
    native = _cpu.Experts()
    native.active = config.experts.active
    # The router decides which weights run: it keeps its precision.
    native.router = loader.matrix(prefix + "router.proj.weight", "f32" if loader.quant == "f32" else "bf16")
    native.router_norm = loader.vector(prefix + "router.scale") * np.float32(config.hidden_size**-0.5)
    native.per_expert_scale = loader.vector(prefix + "router.per_expert_scale")
    native.post_norm_dense = loader.vector(prefix + "post_feedforward_layernorm_1.weight")
    native.pre_norm = loader.vector(prefix + "pre_feedforward_layernorm_2.weight")
    native.post_norm = loader.vector(prefix + "post_feedforward_layernorm_2.weight")
    native.gate = loader.experts(prefix + "experts.gate_up_proj", 0, width)
    native.up = loader.experts(prefix + "experts.gate_up_proj", width, None)
    native.down = loader.experts(prefix + "experts.down_proj", 0, None)
    return native


def _frequencies(config: Stack, sliding: bool) -> NDArray[np.float32]:
    """Inverse frequencies of the rotating pairs, theta^(-2 i / head_dim), in float32 as the reference computes them."""
    layer = next((layer for layer in config.layers if layer.sliding == sliding), None)
    if layer is None:
        return np.zeros(0, np.float32)
    rope: Rope = config.rope(layer)
    exponents = np.arange(0, 2 * rope.rotating_pairs(layer.head_dim), 2, dtype=np.float32) / np.float32(layer.head_dim)
    return np.asarray(1.0 / np.power(np.float32(rope.theta), exponents), np.float32)


def _check_widths(config: Stack, other: int) -> None:
    widths = [config.hidden_size, other, *(layer.head_dim for layer in config.layers)]
    odd = next((width for width in widths if width % LANES), None)
    if odd is not None:
        raise BackendError(f"the CPU backend takes widths that are multiples of {LANES}, and this model has {odd}")
