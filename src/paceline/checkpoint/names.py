"""Names and shapes of all tensors, and the check of a checkpoint against them.

Canonical names are those of the official files without their prefix: `layers.3.self_attn.q_proj.weight`. Shapes are
[out, in], as in the files.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from paceline.checkpoint.tensors import BLOCKS, FLOATING, INTEGER, TensorRef
from paceline.config import DrafterConfig, Stack, TargetConfig
from paceline.errors import CheckpointError
from paceline.quant.bf16 import from_bf16

if TYPE_CHECKING:
    from paceline.checkpoint.checkpoint import Checkpoint

Shapes = dict[str, tuple[int, ...]]

# What wraps a text model leaves its name before those of the tensors: classes of transformers, PEFT, torch.compile.
PREFIX = re.compile(r"(?:(?:model|language_model|base_model|_orig_mod)\.)+")
EMBEDDING = "embed_tokens.weight"
HEAD = "lm_head.weight"
PLE_TABLE = "embed_tokens_per_layer.weight"
TOKEN_ORDERING = "masked_embedding.token_ordering"
DRAFT_TOKENS = "draft_token_ids"  # of a head with a part of the vocabulary
TOKEN_IDS = (TOKEN_ORDERING, DRAFT_TOKENS)

# Parts of official files that the text model does not need, by prefix of the canonical name.
SKIPPED_PARTS = {
    "vision_tower.": "vision",
    "embed_vision.": "vision",
    "multi_modal_projector.": "vision",
    "vision_embedder.": "vision",
    "audio_tower.": "audio",
    "embed_audio.": "audio",
}
COMPARED_BYTES = 32 << 20  # read at a time to compare two tensors
COMPARED_ROWS = 64  # first, one by one: tensors that differ do so in some of them
SHARED_KV = re.compile(r"layers\.(\d{1,4})\.self_attn\.(?:[kv]_proj|[kv]_norm)\.weight")
ROTARY_BUFFER = re.compile(r"(?:layers\.\d+\.self_attn\.)?rotary_emb\.\w*inv_freq")


@dataclass(frozen=True)
class Tensors:
    """A checkpoint's tensors by canonical name, complete and of the right shape."""

    refs: Mapping[str, TensorRef]
    skipped: Mapping[str, str]  # name in the file -> why it is not needed
    norm_offset: float = 0.0  # what the files' norm weights lack
    vocab_size: int = 0  # bounds token ids

    def __getitem__(self, name: str) -> TensorRef:
        return self.refs[name]

    @property
    def elements(self) -> dict[str, str]:
        """Types of elements by canonical name; experts' gate and up projections are one tensor, as in the settings."""
        return {name.replace("experts.gate_proj", "experts.gate_up_proj"): ref.dtype for name, ref in self.refs.items()}

    def vector(self, name: str) -> NDArray[Any]:
        """A tensor of one dimension: float32, of norms the values to multiply by; token ids int32 or int64.

        Raises:
            CheckpointError: the file has shrunk since its header was read, or ids occur twice or do not exist.
        """
        ref = self.refs[name]
        values = ref.read()
        if name in TOKEN_IDS:
            if len(np.unique(values)) < len(values) or not 0 <= values.min() <= values.max() < self.vocab_size:
                what = "names a token twice, or one that does not exist"
                raise CheckpointError(f"{ref.path}: {ref.name} {what}; download it again")
            return values
        values = from_bf16(values) if values.dtype == np.uint16 else values.astype(np.float32)
        return values + np.float32(self.norm_offset) if self.norm_offset and "norm" in name else values


def expected_tensors(config: TargetConfig | DrafterConfig) -> Shapes:
    """Names and shapes of every tensor of a target or drafter."""
    return target_tensors(config) if isinstance(config, TargetConfig) else drafter_tensors(config)


def target_tensors(config: TargetConfig) -> Shapes:
    """Names and shapes of every tensor of a target's text model."""
    hidden, ple, layers = config.hidden_size, config.ple_size, len(config.layers)
    shapes: Shapes = {EMBEDDING: (config.vocab_size, hidden), "norm.weight": (hidden,)}
    if not config.tied_head:
        shapes[HEAD] = (config.vocab_size, hidden)
    if ple:
        shapes |= {
            "embed_tokens_per_layer.weight": (config.ple_vocab_size, layers * ple),
            "per_layer_model_projection.weight": (layers * ple, hidden),
            "per_layer_projection_norm.weight": (ple,),
        }
    for index in range(layers):
        shapes |= _layer(config, index)
        if ple:
            shapes |= _per_layer_embedding(index, hidden, ple)
        if config.experts:
            shapes |= _experts(index, hidden, config.experts.count, config.experts.intermediate_size)
    return shapes


def drafter_tensors(config: DrafterConfig) -> Shapes:
    """Names and shapes of every tensor of a drafter."""
    hidden, backbone = config.hidden_size, config.backbone_hidden_size
    shapes: Shapes = {
        EMBEDDING: (config.draft_vocab_size, hidden),
        "norm.weight": (hidden,),
        "pre_projection.weight": (hidden, 2 * backbone),
        "post_projection.weight": (backbone, hidden),
    }
    if config.centroids:
        shapes["masked_embedding.centroids.weight"] = (config.centroids, hidden)
        shapes[TOKEN_ORDERING] = (config.vocab_size,)
    if config.restricted:
        shapes[DRAFT_TOKENS] = (config.draft_vocab_size,)
    for index in range(len(config.layers)):
        shapes |= _layer(config, index)
    return shapes


def _layer(config: Stack, index: int) -> Shapes:
    layer, hidden = config.layers[index], config.hidden_size
    queries, keys = config.heads * layer.head_dim, layer.kv_heads * layer.head_dim
    shapes: Shapes = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "pre_feedforward_layernorm.weight": (hidden,),
        "post_feedforward_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.q_norm.weight": (layer.head_dim,),
        "self_attn.o_proj.weight": (hidden, queries),
        "mlp.gate_proj.weight": (layer.intermediate_size, hidden),
        "mlp.up_proj.weight": (layer.intermediate_size, hidden),
        "mlp.down_proj.weight": (hidden, layer.intermediate_size),
    }
    if config.layer_scalar:
        shapes["layer_scalar"] = (1,)
    if layer.kv_source == index:
        shapes["self_attn.k_proj.weight"] = (keys, hidden)
        shapes["self_attn.k_norm.weight"] = (layer.head_dim,)
        if layer.has_v_proj:
            shapes["self_attn.v_proj.weight"] = (keys, hidden)
    return _under_layer(index, shapes)


def _per_layer_embedding(index: int, hidden: int, ple: int) -> Shapes:
    shapes: Shapes = {
        "per_layer_input_gate.weight": (ple, hidden),
        "per_layer_projection.weight": (hidden, ple),
        "post_per_layer_input_norm.weight": (hidden,),
    }
    return _under_layer(index, shapes)


def _experts(index: int, hidden: int, count: int, width: int) -> Shapes:
    shapes: Shapes = {
        "experts.gate_up_proj": (count, 2 * width, hidden),  # gate rows first
        "experts.down_proj": (count, hidden, width),
        "router.proj.weight": (count, hidden),
        "router.scale": (hidden,),
        "router.per_expert_scale": (count,),
        "post_feedforward_layernorm_1.weight": (hidden,),
        "pre_feedforward_layernorm_2.weight": (hidden,),
        "post_feedforward_layernorm_2.weight": (hidden,),
    }
    return _under_layer(index, shapes)


def _under_layer(index: int, shapes: Shapes) -> Shapes:
    return {f"layers.{index}.{name}": shape for name, shape in shapes.items()}


def resolve(checkpoint: Checkpoint, config: TargetConfig | DrafterConfig) -> Tensors:
    """Match a checkpoint's tensors with the expected ones: none missing or unknown, all of the right shape and type.

    Where files hold `experts.gate_proj` and `experts.up_proj` apart, they take the place of `experts.gate_up_proj`.

    Raises:
        CheckpointError: names the tensor that is missing, duplicate, unknown, or of the wrong shape or type.
    """
    expected = _experts_apart(expected_tensors(config), {canonical_name(name) for name in checkpoint.tensors})
    refs: dict[str, TensorRef] = {}
    skipped: dict[str, str] = {}
    leftover: list[TensorRef] = []
    for name, ref in checkpoint.tensors.items():
        canonical = canonical_name(name)
        if canonical in refs:
            raise CheckpointError(f"{ref.path}: the tensors {name} and {refs[canonical].name} are the same one")
        if canonical in expected:
            refs[canonical] = ref
        elif reason := _why_skipped(canonical, ref, config):
            skipped[name] = reason
        else:
            leftover.append(ref)
    missing = [name for name in expected if name not in refs]
    if missing:
        raise CheckpointError(
            f"{checkpoint.path}: the tensor {missing[0]} is missing{_more(missing)}; {checkpoint.cure}"
        )
    for name, ref in refs.items():
        _check(name, ref, expected[name], checkpoint.cure)
    if leftover:
        raise CheckpointError(
            f"{leftover[0].path}: the tensor {leftover[0].name} {list(leftover[0].shape)} is unknown{_more(leftover)}, "
            f"so this is not the model that its settings describe; {checkpoint.cure}"
        )
    whole = isinstance(config, DrafterConfig) or config.norms_include_one
    return Tensors(refs, skipped, norm_offset=0.0 if whole else 1.0, vocab_size=config.vocab_size)


def with_head(config: TargetConfig, tensors: Mapping[str, TensorRef]) -> TargetConfig:
    """Settings with the LM head that a checkpoint's tensors hold, whatever they say themselves.

    Fine-tunes have heads of their own with settings that call them tied, and copies of the embedding with settings that
    do not. Reads both tensors whole only where they seem to be the same.

    Raises:
        CheckpointError: the head is not tied, and missing.
    """
    heads = [ref for name, ref in tensors.items() if canonical_name(name) == HEAD]
    embedding = next((ref for name, ref in tensors.items() if canonical_name(name) == EMBEDDING), None)
    if not heads:
        if config.tied_head or embedding is None:
            return config  # `resolve` misses an embedding
        raise CheckpointError(
            f"{embedding.path.parent}: there is no {HEAD}, and config.json says that tie_word_embeddings is false; "
            "add the file that holds it, or set tie_word_embeddings to true if the model was trained so"
        )
    if heads[0].shape != (config.vocab_size, config.hidden_size):
        return config  # `resolve` says what is wrong with it
    tied = len(heads) == 1 and embedding is not None and _same_bytes(heads[0], embedding)
    return replace(config, tied_head=tied)


def canonical_name(name: str) -> str:
    """A tensor's name in the files without the prefixes that wrappers of the text model give it."""
    prefix = PREFIX.match(name)
    return name[prefix.end() :] if prefix else name


def _same_bytes(one: TensorRef, other: TensorRef) -> bool:
    if (one.dtype, one.shape, one.bytes) != (other.dtype, other.shape, other.bytes):
        return False
    some = max(1, one.rows // COMPARED_ROWS)
    slices = [(row, row + 1) for row in range(0, one.rows, some)]
    step = max(1, COMPARED_BYTES * one.rows // max(1, one.bytes))
    slices += [(row, min(row + step, one.rows)) for row in range(0, one.rows, step)]
    return all(one.read(*part).tobytes() == other.read(*part).tobytes() for part in slices)


def _experts_apart(expected: Shapes, present: Collection[str]) -> Shapes:
    """The expected tensors, with gate and up projections of experts apart where the files have them so."""
    for fused in [name for name in expected if name.endswith(".experts.gate_up_proj") and name not in present]:
        apart = [fused.replace("gate_up_proj", part) for part in ("gate_proj", "up_proj")]
        if any(name in present for name in apart):
            count, rows, columns = expected.pop(fused)
            expected |= dict.fromkeys(apart, (count, rows // 2, columns))
    return expected


def _why_skipped(canonical: str, ref: TensorRef, config: TargetConfig | DrafterConfig) -> str | None:
    for part, reason in SKIPPED_PARTS.items():
        if canonical.startswith(part):
            return reason
    if canonical == HEAD and ref.shape == (config.vocab_size, config.hidden_size):
        return "head tied to the embedding"
    if match := SHARED_KV.fullmatch(canonical):
        index = int(match[1])
        if index < len(config.layers) and config.layers[index].kv_source != index:
            return "K/V of a layer that shares another layer's"
    if ROTARY_BUFFER.fullmatch(canonical):
        return "rotary table, computed from the settings"
    return None


def _check(name: str, ref: TensorRef, shape: tuple[int, ...], cure: str) -> None:
    if ref.shape != shape:
        raise CheckpointError(
            f"{ref.path}: the tensor {ref.name} has shape {list(ref.shape)}, but its settings call for {list(shape)}; "
            f"{cure}"
        )
    kinds = INTEGER if name in TOKEN_IDS else FLOATING if len(shape) == 1 else (*FLOATING, *BLOCKS)
    if ref.dtype not in kinds:
        raise CheckpointError(
            f"{ref.path}: the tensor {ref.name} has type {ref.dtype}, not {' or '.join(kinds)}; "
            "take the checkpoint in bf16"
        )


def _more(items: list[str] | list[TensorRef]) -> str:
    return f" (and {len(items) - 1} more)" if len(items) > 1 else ""
