"""Reads `config.json`, of a target or a drafter, into settings.

Gemma 4's has two spellings: `global_head_dim` and `num_global_key_value_heads` in the official files,
`per_layer_config` in files written by transformers. Gemma 3's settings are respelled as Gemma 4's. What is not
supported is refused, and so is a value of another type.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paceline.config import LIMITS, DrafterConfig, Experts, Layer, Rope, TargetConfig, check_limit
from paceline.errors import CheckpointError

GEMMA3_TYPES = ("gemma3", "gemma3_text")
TARGET_TYPES = ("gemma4", "gemma4_unified", "gemma4_text", "gemma4_unified_text", *GEMMA3_TYPES)
TARGETS_BY_WIDTH = {1536: "E2B", 2560: "E4B", 2816: "26B-A4B", 3840: "12B", 5376: "31B"}  # whose drafters see it
DRAFTER_TYPES = ("gemma4_assistant", "gemma4_unified_assistant")

# What a Gemma 3 config.json leaves out (the official ones of 4B and more leave out most of it): the defaults of
# transformers' Gemma3TextConfig.
GEMMA3_DEFAULTS: dict[str, object] = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "sliding_window": 4096,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 131072,
    "query_pre_attn_scalar": 256,
    "final_logit_softcapping": None,
    "layer_types": None,
    "per_layer_config": None,
    "eos_token_id": 1,
    "bos_token_id": 2,
}


def target_config(config: Mapping[str, Any]) -> TargetConfig:
    """Resolve a target's `config.json`.

    Raises:
        CheckpointError: not a Gemma 3 or Gemma 4 target, or a value is missing, out of range or unsupported.
    """
    kind = config.get("model_type")
    if kind in DRAFTER_TYPES:
        width = config.get("backbone_hidden_size")
        of = f" of Gemma 4 {TARGETS_BY_WIDTH[width]}" if type(width) is int and width in TARGETS_BY_WIDTH else ""
        raise CheckpointError(f"model_type is {kind}: this is a drafter{of}; pass it as --drafter, not as the model")
    if kind not in TARGET_TYPES:
        raise CheckpointError(f"model_type is {kind!r}, not a Gemma 3 or Gemma 4 model ({', '.join(TARGET_TYPES)})")
    text = _text_part(config)
    tied_head = _flag(text if "tie_word_embeddings" in text else config, "tie_word_embeddings", default=True)
    gemma3 = kind in GEMMA3_TYPES
    text = _gemma3_text(text) if gemma3 else text
    return TargetConfig(
        **_common(text, _target_layers(text), gemma3=gemma3),
        model_type=str(kind),
        softcap=_number(text, "final_logit_softcapping", None),
        max_positions=_int(text, "max_position_embeddings", 131072),
        # gemma4_unified has no such fields: its text config never carries per-layer embeddings
        ple_size=_int(text, "hidden_size_per_layer_input", 0),
        ple_vocab_size=_int(text, "vocab_size_per_layer_input", 0),
        experts=_experts(text),
        stop_ids=token_ids(config.get("eos_token_id", text.get("eos_token_id", 1)), "eos_token_id"),
        bos_id=_optional_id(text.get("bos_token_id", 2), "bos_token_id"),
        tied_head=tied_head,
        # no field of Hugging Face's: what converts other files to this one says it, where their norms are whole
        norms_include_one=not gemma3 or _flag(config, "norms_include_one"),
    )


def drafter_config(config: Mapping[str, Any]) -> DrafterConfig:
    """Resolve a drafter's `config.json`.

    Raises:
        CheckpointError: not a Gemma 4 drafter, or a value is missing, out of range or unsupported.
    """
    kind = config.get("model_type")
    if kind not in DRAFTER_TYPES:
        raise CheckpointError(f"model_type is {kind!r}, not a Gemma 4 drafter ({', '.join(DRAFTER_TYPES)})")
    text = _text_part(config)
    if not _flag(text, "tie_word_embeddings", default=True):
        raise CheckpointError("tie_word_embeddings = False is not supported in a drafter (only True)")
    dims = _Dims(text)
    layers = [
        dims.layer(index, full=full, kv_source=-1, has_v_proj=False) for index, full in enumerate(_full_attention(text))
    ]
    ordered, common = _flag(config, "use_ordered_embeddings"), _common(text, layers)
    return DrafterConfig(
        **common,
        model_type=str(kind),
        backbone_hidden_size=_int(config, "backbone_hidden_size"),
        draft_vocab_size=_int(config, "draft_vocab_size", common["vocab_size"]),
        centroids=_int(config, "num_centroids") if ordered else 0,
        centroid_top_k=_int(config, "centroid_intermediate_top_k", 32) if ordered else 0,
    )


def token_ids(value: object, key: str) -> tuple[int, ...]:
    """The token ids of a setting that holds none, one or a list of them.

    Raises:
        CheckpointError: it holds something else.
    """
    values = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    if not all(type(item) is int for item in values):
        raise CheckpointError(f"{key} is {value!r}; it must be a token id or a list of them")
    return tuple(values)


def _text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    text = config.get("text_config", config)
    if not isinstance(text, Mapping):
        raise CheckpointError("text_config is not an object")
    supported: dict[str, tuple[object, ...]] = {
        "hidden_activation": ("gelu_pytorch_tanh",),
        "attention_bias": (False,),
        "use_bidirectional_attention": (None, False, "vision"),  # "vision" concerns image tokens only
        "attn_logit_softcapping": (None,),
    }
    for key, values in supported.items():
        if key in text and text[key] not in values:
            raise CheckpointError(f"{key} = {text[key]!r} is not supported (only {values[0]!r})")
    return text


def _int(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if value is None:
        raise CheckpointError(f"{key} is missing")
    if type(value) is not int:
        raise CheckpointError(f"{key} is {value!r}; it must be a whole number")
    check_limit(key, value)
    return value


def _number(config: Mapping[str, Any], key: str, default: float | None) -> Any:
    """A float; None only if that is the default."""
    value = config.get(key)
    if value is None:
        return default
    if type(value) not in (int, float):
        raise CheckpointError(f"{key} is {value!r}; it must be a number")
    check_limit(key, value)
    return float(value)


def _flag(config: Mapping[str, Any], key: str, *, default: bool = False) -> bool:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"{key} is {value!r}; it must be true or false")
    return default if value is None else value


def _optional_id(value: object, key: str) -> int | None:
    if value is not None and type(value) is not int:
        raise CheckpointError(f"{key} is {value!r}; it must be a token id")
    return value


def _experts(text: Mapping[str, Any]) -> Experts | None:
    if not _flag(text, "enable_moe_block"):
        return None
    return Experts(_int(text, "num_experts"), _int(text, "top_k_experts"), _int(text, "moe_intermediate_size"))


def _gemma3_text(text: Mapping[str, Any]) -> dict[str, Any]:
    """Gemma 3's settings in the spelling of Gemma 4: one head size, a pattern of layers, RoPE by kind of layer."""
    given = {key: text.get(key) for key in GEMMA3_DEFAULTS}
    ours = {key: default if given[key] is None else given[key] for key, default in GEMMA3_DEFAULTS.items()}
    if not ours["layer_types"]:
        count, pattern = _int(ours, "num_hidden_layers"), _int(text, "sliding_window_pattern", 6)
        kinds = ["sliding_attention"] * (pattern - 1) + ["full_attention"]
        ours["layer_types"] = [kinds[index % pattern] for index in range(count)]
    given_ropes, scaling = (text.get(key) or {} for key in ("rope_parameters", "rope_scaling"))
    if not isinstance(given_ropes, Mapping) or not isinstance(scaling, Mapping):
        raise CheckpointError("rope_parameters and rope_scaling must be objects")
    ropes = {}
    for kind, key, theta in (
        ("full_attention", "rope_theta", 1e6),
        ("sliding_attention", "rope_local_base_freq", 1e4),
    ):
        rope = given_ropes.get(kind) or {}
        if not isinstance(rope, Mapping):
            raise CheckpointError(f"rope_parameters of {kind} is {rope!r}, not an object")
        theta = theta if text.get(key) is None else text[key]
        ropes[kind] = {"rope_theta": theta} | dict(scaling if kind == "full_attention" else {}) | dict(rope)
    return ours | {"global_head_dim": ours["head_dim"], "rope_parameters": ropes}


def _common(text: Mapping[str, Any], layers: list[Layer], *, gemma3: bool = False) -> dict[str, Any]:
    return {
        "vocab_size": _int(text, "vocab_size"),
        "hidden_size": _int(text, "hidden_size"),
        "heads": _int(text, "num_attention_heads"),
        "layers": tuple(layers),
        "sliding_window": _int(text, "sliding_window"),
        "rms_eps": _number(text, "rms_norm_eps", 1e-6),
        "rope_sliding": _rope(text, "sliding_attention", Rope(1e4)),
        "rope_full": _rope(text, "full_attention", Rope(1e6, 0.25)),
        "query_pre_attn_scalar": _number(text, "query_pre_attn_scalar", 256.0) if gemma3 else 1.0,
        "value_norm": not gemma3,
        "layer_scalar": not gemma3,
    }


def _full_attention(text: Mapping[str, Any]) -> list[bool]:
    """Whether each layer has full attention; the others have a sliding window."""
    count = _int(text, "num_hidden_layers")
    types = text.get("layer_types")
    if not types:
        return [(i + 1) % 6 == 0 or i == count - 1 for i in range(count)]
    if not isinstance(types, list) or len(types) != count:
        raise CheckpointError(f"layer_types is {types!r}; it must name the kinds of {count} layers")
    odd = next((kind for kind in types if kind not in ("sliding_attention", "full_attention")), None)
    if odd is not None:
        raise CheckpointError(f"layer_types names {odd!r}; only sliding_attention and full_attention are known")
    return [kind == "full_attention" for kind in types]


def _target_layers(text: Mapping[str, Any]) -> list[Layer]:
    full = _full_attention(text)
    first_shared = len(full) - _int(text, "num_kv_shared_layers", 0)
    if first_shared < 0:
        raise CheckpointError(f"num_kv_shared_layers is {len(full) - first_shared} of {len(full)} layers")
    dims = _Dims(text)
    wide, same_kv = _flag(text, "use_double_wide_mlp"), _flag(text, "attention_k_eq_v")
    layers: list[Layer] = []
    last: dict[bool, int] = {}  # layer with K/V of its own, by kind
    for index, is_full in enumerate(full):
        shared = index >= first_shared > 0
        if shared and is_full not in last:
            raise CheckpointError(f"layer {index} shares the K/V of a kind of layer that comes only later")
        if not shared:
            last[is_full] = index
        layers.append(
            dims.layer(
                index,
                full=is_full,
                kv_source=last[is_full],
                has_v_proj=not shared and not (is_full and same_kv),
                wide=2 if shared and wide else 1,
            )
        )
    return layers


class _Dims:
    """Sizes of layers, which full-attention layers may have of their own."""

    def __init__(self, text: Mapping[str, Any]) -> None:
        self._head_dim, self._kv_heads = _int(text, "head_dim"), _int(text, "num_key_value_heads")
        self._intermediate = _int(text, "intermediate_size")
        overrides = text.get("per_layer_config")
        # a file with per_layer_config says everything there; one with neither spelling means the official 512
        self._full_head_dim = _int(text, "global_head_dim", 512 if overrides is None else self._head_dim)
        self._full_kv_heads = self._kv_heads
        if _flag(text, "attention_k_eq_v"):
            self._full_kv_heads = _int(text, "num_global_key_value_heads", self._kv_heads)
        if not isinstance(overrides, Mapping | None) or len(overrides or ()) > LIMITS["num_hidden_layers"][1]:
            raise CheckpointError("per_layer_config is not an object by layer")
        self._overrides = {str(key).lstrip("0") or "0": value for key, value in (overrides or {}).items()}

    def layer(self, index: int, *, full: bool, kv_source: int, has_v_proj: bool, wide: int = 1) -> Layer:
        override = self._overrides.get(str(index)) or {}  # transformers pads the keys of deeper models: "04"
        if not isinstance(override, Mapping):
            raise CheckpointError(f"per_layer_config of layer {index} is {override!r}, not an object")
        head_dim, kv_heads = self._head_dim, self._kv_heads
        if full:
            head_dim = _int(override, "head_dim", self._full_head_dim)
            kv_heads = _int(override, "num_key_value_heads", self._full_kv_heads)
        intermediate = _int(override, "intermediate_size", wide * self._intermediate)
        return Layer(not full, head_dim, kv_heads, intermediate, kv_source, has_v_proj)


def _rope(text: Mapping[str, Any], layer_type: str, default: Rope) -> Rope:
    parameters = text.get("rope_parameters")
    if parameters is None:
        return default
    given = parameters.get(layer_type) if isinstance(parameters, Mapping) else parameters
    if given is None:
        return default
    if not isinstance(given, Mapping):
        raise CheckpointError(f"rope_parameters of {layer_type} is {given!r}, not an object")
    kind = given.get("rope_type", given.get("type", "default"))
    unused = {"default": "factor", "proportional": "factor", "linear": "partial_rotary_factor"}
    if not isinstance(kind, str) or kind not in unused or given.get(unused[kind]) not in (None, 1.0):
        raise CheckpointError(f"rope of {layer_type} is {dict(given)}; only default, proportional and linear are known")
    rotary = _number(given, "partial_rotary_factor", 1.0) if kind == "proportional" else 1.0
    scaling = _number(given, "factor", 1.0) if kind == "linear" else 1.0
    return Rope(_number(given, "rope_theta", default.theta), rotary, scaling)
