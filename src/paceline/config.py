"""Model settings: Gemma 4 targets and their MTP drafters, resolved layer by layer.

Reads a checkpoint's `config.json` in either of its spellings (`global_head_dim` and `num_global_key_value_heads` in the
official files, `per_layer_config` in files written by transformers) and rejects unsupported values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from paceline.errors import CheckpointError, PairError

TARGET_TYPES = ("gemma4", "gemma4_unified", "gemma4_text", "gemma4_unified_text")
DRAFTER_TYPES = ("gemma4_assistant", "gemma4_unified_assistant")


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding of one layer type.

    The first `rotary_factor` of the head's frequency pairs rotate, spaced over the whole head ("proportional"); the
    others stay. A factor of 1 is ordinary RoPE.
    """

    theta: float
    rotary_factor: float = 1.0

    def rotating_pairs(self, head_dim: int) -> int:
        return int(self.rotary_factor * head_dim // 2)


@dataclass(frozen=True)
class Experts:
    """A mixture-of-experts block beside the dense MLP."""

    count: int
    active: int  # experts per token
    intermediate_size: int


@dataclass(frozen=True)
class Layer:
    """One decoder layer. `kv_source` is the layer whose keys and values it attends to: itself if it has its own."""

    sliding: bool
    head_dim: int
    kv_heads: int
    intermediate_size: int
    kv_source: int
    has_v_proj: bool  # False: values are the k_proj output (attention_k_eq_v), or the layer has no K/V of its own


@dataclass(frozen=True)
class Stack:
    """The fields that targets and drafters have in common."""

    vocab_size: int
    hidden_size: int
    heads: int
    layers: tuple[Layer, ...]
    sliding_window: int
    rms_eps: float
    rope_sliding: Rope
    rope_full: Rope

    def rope(self, layer: Layer) -> Rope:
        return self.rope_sliding if layer.sliding else self.rope_full

    def last_layer(self, *, sliding: bool) -> int | None:
        """Index of the last layer of that type with its own K/V, which shared layers and drafters attend to."""
        own = [i for i, layer in enumerate(self.layers) if layer.sliding == sliding and layer.kv_source == i]
        return own[-1] if own else None


@dataclass(frozen=True)
class TargetConfig(Stack):
    """The text part of a Gemma 4 model."""

    model_type: str
    softcap: float | None  # final logits: cap * tanh(x / cap)
    max_positions: int
    ple_size: int  # width of the per-layer embeddings, 0 for none
    ple_vocab_size: int
    experts: Experts | None
    stop_ids: tuple[int, ...]
    bos_id: int | None

    @property
    def first_shared_layer(self) -> int:
        """The first layer without its own K/V; the number of layers if there is none."""
        return next((i for i, layer in enumerate(self.layers) if layer.kv_source != i), len(self.layers))


@dataclass(frozen=True)
class DrafterConfig(Stack):
    """A `gemma4_assistant`: a few layers of queries over the target's cache. Its layers' `kv_source` is -1."""

    model_type: str
    backbone_hidden_size: int
    centroids: int  # 0: dense head
    centroid_top_k: int


def target_config(config: Mapping[str, Any]) -> TargetConfig:
    """Resolve a target's `config.json`.

    Raises:
        CheckpointError: not a Gemma 4 target, or a value is missing or unsupported.
    """
    kind = config.get("model_type")
    if kind in DRAFTER_TYPES:
        raise CheckpointError(f"model_type is {kind}: this is a drafter; pass it as --drafter, not as the model")
    if kind not in TARGET_TYPES:
        raise CheckpointError(f"model_type is {kind!r}, not a Gemma 4 model ({', '.join(TARGET_TYPES)})")
    text = _text_part(config)
    _reject_unsupported(text)
    count = _int(text, "num_hidden_layers")
    first_shared = count - _int(text, "num_kv_shared_layers", 0, least=0)
    if first_shared < 0:
        raise CheckpointError(f"config: num_kv_shared_layers is {count - first_shared} of {count} layers")
    types = _layer_types(text, count)
    layers = []
    for index, kind_of_layer in enumerate(types):
        shared = index >= first_shared > 0
        source = index
        if shared:
            earlier = [i for i in range(first_shared) if types[i] == kind_of_layer]
            if not earlier:
                raise CheckpointError(f"config: layer {index} shares {kind_of_layer} K/V, but no earlier layer has any")
            source = earlier[-1]
        wide = 2 if shared and text.get("use_double_wide_mlp", False) else 1
        full = kind_of_layer == "full_attention"
        layers.append(
            Layer(
                sliding=not full,
                head_dim=_head_dim(text, index, full),
                kv_heads=_kv_heads(text, index, full),
                intermediate_size=wide * _int(text, "intermediate_size"),
                kv_source=source,
                has_v_proj=not shared and not (full and text.get("attention_k_eq_v", False)),
            )
        )
    # gemma4_unified has no such fields: its text config never carries per-layer embeddings
    ple_size = _int(text, "hidden_size_per_layer_input", 0, least=0)
    ple_vocab = _int(text, "vocab_size_per_layer_input", 0, least=0)
    if ple_size and ple_vocab < _int(text, "vocab_size"):
        raise CheckpointError(f"config: vocab_size_per_layer_input is {ple_vocab}, less than vocab_size")
    return TargetConfig(
        **_common(text, layers),
        model_type=str(kind),
        softcap=None
        if text.get("final_logit_softcapping") is None
        else _positive(text, "final_logit_softcapping", 30.0),
        max_positions=_int(text, "max_position_embeddings", 131072, least=2),
        ple_size=ple_size,
        ple_vocab_size=ple_vocab,
        experts=_experts(text),
        stop_ids=token_ids(config.get("eos_token_id", text.get("eos_token_id", 1)), "eos_token_id"),
        bos_id=text.get("bos_token_id", 2),
    )


def drafter_config(config: Mapping[str, Any]) -> DrafterConfig:
    """Resolve a drafter's `config.json`.

    Raises:
        CheckpointError: not a Gemma 4 drafter, or a value is missing or unsupported.
    """
    kind = config.get("model_type")
    if kind not in DRAFTER_TYPES:
        raise CheckpointError(f"model_type is {kind!r}, not a Gemma 4 drafter ({', '.join(DRAFTER_TYPES)})")
    text = _text_part(config)
    _reject_unsupported(text)
    layers = [
        Layer(
            sliding=layer_type == "sliding_attention",
            head_dim=_head_dim(text, index, layer_type == "full_attention"),
            kv_heads=_kv_heads(text, index, layer_type == "full_attention"),
            intermediate_size=_int(text, "intermediate_size"),
            kv_source=-1,
            has_v_proj=False,
        )
        for index, layer_type in enumerate(_layer_types(text, _int(text, "num_hidden_layers")))
    ]
    ordered = config.get("use_ordered_embeddings", False)
    centroids = _int(config, "num_centroids") if ordered else 0
    top_k = config.get("centroid_intermediate_top_k", 32) if ordered else 0
    vocab = _int(text, "vocab_size")
    if ordered and (vocab % centroids or not 0 < top_k <= centroids):
        raise CheckpointError(f"config: {centroids} centroids (top {top_k}) do not divide a vocabulary of {vocab}")
    return DrafterConfig(
        **_common(text, layers),
        model_type=str(kind),
        backbone_hidden_size=_int(config, "backbone_hidden_size"),
        centroids=centroids,
        centroid_top_k=top_k,
    )


def check_pair(target: TargetConfig, drafter: DrafterConfig) -> None:
    """Raise `PairError` with the two numbers that disagree if the drafter cannot read this target's cache."""

    def check_equal(what: str, ours: object, theirs: object) -> None:
        if ours != theirs:
            raise PairError(
                f"the drafter does not fit the target: {what} is {theirs} in the drafter and {ours} in the target; "
                "use the target's own drafter, or --drafter none"
            )

    check_equal("the target's hidden size (backbone_hidden_size)", target.hidden_size, drafter.backbone_hidden_size)
    check_equal("vocab_size", target.vocab_size, drafter.vocab_size)
    check_equal("sliding_window", target.sliding_window, drafter.sliding_window)
    for layer in drafter.layers:
        source = target.last_layer(sliding=layer.sliding)
        kind = "sliding" if layer.sliding else "full"
        if source is None:
            raise PairError(f"the drafter has {kind}-attention layers and the target has none; use --drafter none")
        check_equal(f"head_dim of {kind} layers", target.layers[source].head_dim, layer.head_dim)
        check_equal(f"number of K/V heads of {kind} layers", target.layers[source].kv_heads, layer.kv_heads)
        check_equal(f"rope of {kind} layers", target.rope(target.layers[source]), drafter.rope(layer))


def _text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    text = config.get("text_config", config)
    if not isinstance(text, Mapping):
        raise CheckpointError("config: text_config is not an object")
    return text


def _int(config: Mapping[str, Any], key: str, default: int | None = None, least: int = 1) -> int:
    value = config.get(key)
    value = default if value is None else value
    if value is None:
        raise CheckpointError(f"config: {key} is missing")
    if type(value) is not int or value < least:
        raise CheckpointError(f"config: {key} is {value!r}; it must be a whole number from {least}")
    return value


def _positive(config: Mapping[str, Any], key: str, default: float) -> float:
    value = config.get(key)
    value = default if value is None else value
    if type(value) not in (int, float) or not 0 < value < float("inf"):
        raise CheckpointError(f"config: {key} is {value!r}; it must be a number above 0")
    return float(value)


def _experts(text: Mapping[str, Any]) -> Experts | None:
    if not text.get("enable_moe_block", False):
        return None
    experts = Experts(_int(text, "num_experts"), _int(text, "top_k_experts"), _int(text, "moe_intermediate_size"))
    if experts.active > experts.count:
        raise CheckpointError(f"config: top_k_experts is {experts.active} of {experts.count} experts")
    return experts


def _reject_unsupported(text: Mapping[str, Any]) -> None:
    supported: dict[str, tuple[object, ...]] = {
        "hidden_activation": ("gelu_pytorch_tanh",),
        "attention_bias": (False,),
        "tie_word_embeddings": (True,),
        "use_bidirectional_attention": (None, "vision"),  # "vision" concerns image tokens only
    }
    for key, values in supported.items():
        if key in text and text[key] not in values:
            raise CheckpointError(f"config: {key} = {text[key]!r} is not supported (only {values[0]!r})")


def _common(text: Mapping[str, Any], layers: list[Layer]) -> dict[str, Any]:
    heads = _int(text, "num_attention_heads")
    for index, layer in enumerate(layers):
        if layer.kv_heads <= 0 or heads % layer.kv_heads or layer.head_dim % 2:
            raise CheckpointError(
                f"config: layer {index} has {heads} heads over {layer.kv_heads} K/V heads of {layer.head_dim}"
            )
    return {
        "vocab_size": _int(text, "vocab_size"),
        "hidden_size": _int(text, "hidden_size"),
        "heads": heads,
        "layers": tuple(layers),
        "sliding_window": _int(text, "sliding_window"),
        "rms_eps": _positive(text, "rms_norm_eps", 1e-6),
        "rope_sliding": _rope(text, "sliding_attention"),
        "rope_full": _rope(text, "full_attention"),
    }


def _layer_types(text: Mapping[str, Any], count: int) -> list[str]:
    types = text.get("layer_types") or [
        "full_attention" if (i + 1) % 6 == 0 or i == count - 1 else "sliding_attention" for i in range(count)
    ]
    if len(types) != count or not set(types) <= {"sliding_attention", "full_attention"}:
        raise CheckpointError(
            f"config: layer_types names {len(types)} layers of kinds {sorted(set(types))}, not {count}"
        )
    return list(types)


def _override(text: Mapping[str, Any], index: int) -> Mapping[str, Any]:
    # transformers pads the keys of deeper models with zeros: "04"
    overrides = {int(key): value for key, value in (text.get("per_layer_config") or {}).items()}
    override = overrides.get(index, {})
    return override if isinstance(override, Mapping) else {}


def _head_dim(text: Mapping[str, Any], index: int, full: bool) -> int:
    dim = _int(text, "head_dim")
    if full:
        # a file with per_layer_config says everything there; one with neither spelling means the official 512
        default = 512 if text.get("per_layer_config") is None else dim
        dim = _override(text, index).get("head_dim") or text.get("global_head_dim") or default
    return int(dim)


def _kv_heads(text: Mapping[str, Any], index: int, full: bool) -> int:
    heads = _int(text, "num_key_value_heads")
    if full:
        shared = text.get("num_global_key_value_heads") if text.get("attention_k_eq_v", False) else None
        heads = _override(text, index).get("num_key_value_heads") or shared or heads
    return int(heads)


def _rope(text: Mapping[str, Any], layer_type: str) -> Rope:
    default = {"sliding_attention": Rope(1e4), "full_attention": Rope(1e6, 0.25)}[layer_type]
    given = (text.get("rope_parameters") or {}).get(layer_type)
    if given is None:
        return default
    kind = given.get("rope_type", "default")
    if kind not in ("default", "proportional") or given.get("factor", 1.0) != 1.0:
        raise CheckpointError(f"config: rope of {layer_type} is {dict(given)}; only default and proportional are known")
    factor = given.get("partial_rotary_factor", 1.0) if kind == "proportional" else 1.0
    return Rope(float(given.get("rope_theta", default.theta)), float(factor))


def token_ids(value: object, key: str) -> tuple[int, ...]:
    """The token ids of a setting that holds none, one or a list of them.

    Raises:
        CheckpointError: it holds something else.
    """
    values = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    if not all(type(item) is int for item in values):
        raise CheckpointError(f"{key} is {value!r}; it must be a token id or a list of them")
    return tuple(values)
