"""Model settings: Gemma 3 and Gemma 4 targets, and MTP drafters, resolved layer by layer.

Whatever kind of file settings come from, they are checked here, when the object is made: every number against the least
and the most that it may be, and what must agree. So no other module meets a size that wraps or an index out of range.
"""

from __future__ import annotations

from dataclasses import dataclass

from paceline.errors import CheckpointError, PairError

# By the names of config.json. The most is far above every official model, and low enough that nothing computed from
# settings takes long or overflows before the tensors are compared with them.
LIMITS: dict[str, tuple[float, float]] = {
    "num_hidden_layers": (1, 1024),
    "num_kv_shared_layers": (0, 1023),
    "vocab_size": (1, 1 << 22),
    "hidden_size": (1, 1 << 16),
    "intermediate_size": (1, 1 << 20),
    "num_attention_heads": (1, 1024),
    "num_key_value_heads": (1, 1024),
    "num_global_key_value_heads": (1, 1024),
    "head_dim": (2, 4096),
    "global_head_dim": (2, 4096),
    "sliding_window": (1, 1 << 24),
    "sliding_window_pattern": (1, 1024),
    "max_position_embeddings": (2, 1 << 24),
    "rms_norm_eps": (1e-30, 1.0),
    "final_logit_softcapping": (1e-3, 1e6),
    "rope_theta": (1.0, 1e15),
    "partial_rotary_factor": (1e-6, 1.0),
    "factor": (1.0, 1e6),
    "query_pre_attn_scalar": (1.0, 1e6),
    "hidden_size_per_layer_input": (0, 1 << 14),
    "vocab_size_per_layer_input": (0, 1 << 22),
    "num_experts": (1, 4096),
    "top_k_experts": (1, 4096),
    "moe_intermediate_size": (1, 1 << 20),
    "backbone_hidden_size": (1, 1 << 16),
    "draft_vocab_size": (1, 1 << 22),
    "num_centroids": (1, 1 << 22),
    "centroid_intermediate_top_k": (1, 1 << 22),
}


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding of one layer type.

    The first `rotary_factor` of the head's frequency pairs rotate, spaced over the whole head ("proportional"); the
    others stay. A rotary factor of 1 is ordinary RoPE. Positions are divided by `scaling` ("linear").
    """

    theta: float
    rotary_factor: float = 1.0
    scaling: float = 1.0

    def __post_init__(self) -> None:
        check_limit("rope_theta", self.theta)
        check_limit("partial_rotary_factor", self.rotary_factor)
        check_limit("factor", self.scaling)

    def rotating_pairs(self, head_dim: int) -> int:
        return int(self.rotary_factor * head_dim // 2)


@dataclass(frozen=True)
class Experts:
    """A mixture-of-experts block beside the dense MLP."""

    count: int
    active: int  # experts per token
    intermediate_size: int

    def __post_init__(self) -> None:
        check_limit("num_experts", self.count)
        check_limit("top_k_experts", self.active)
        check_limit("moe_intermediate_size", self.intermediate_size)
        if self.active > self.count:
            raise CheckpointError(f"top_k_experts is {self.active} of {self.count} experts")


@dataclass(frozen=True)
class Layer:
    """One decoder layer. `kv_source` is the layer whose keys and values it attends to: itself if it has its own."""

    sliding: bool
    head_dim: int
    kv_heads: int
    intermediate_size: int
    kv_source: int
    has_v_proj: bool  # False: values are the k_proj output (attention_k_eq_v), or the layer has no K/V of its own

    def __post_init__(self) -> None:
        check_limit("head_dim", self.head_dim)
        check_limit("num_key_value_heads", self.kv_heads)
        check_limit("intermediate_size", self.intermediate_size)
        if self.head_dim % 2:
            raise CheckpointError(f"head_dim is {self.head_dim}; it must be even")


@dataclass(frozen=True)
class Stack:
    """The fields that targets and drafters have in common.

    `query_pre_attn_scalar`, `value_norm` and `layer_scalar` tell the layers of Gemma 3 (256 or so, False, False) from
    those of Gemma 4 (1, True, True).
    """

    vocab_size: int
    hidden_size: int
    heads: int
    layers: tuple[Layer, ...]
    sliding_window: int
    rms_eps: float
    rope_sliding: Rope
    rope_full: Rope
    query_pre_attn_scalar: float  # attention scores are divided by its root
    value_norm: bool  # values are normed, without a weight
    layer_scalar: bool  # a layer's output is multiplied by a weight [1]

    def __post_init__(self) -> None:
        check_limit("num_hidden_layers", len(self.layers))
        check_limit("vocab_size", self.vocab_size)
        check_limit("hidden_size", self.hidden_size)
        check_limit("num_attention_heads", self.heads)
        check_limit("sliding_window", self.sliding_window)
        check_limit("rms_norm_eps", self.rms_eps)
        check_limit("query_pre_attn_scalar", self.query_pre_attn_scalar)
        for index, layer in enumerate(self.layers):
            if self.heads % layer.kv_heads:
                raise CheckpointError(f"layer {index} has {self.heads} heads over {layer.kv_heads} K/V heads")

    @property
    def attention_scale(self) -> float:
        """The factor of attention scores."""
        return float(self.query_pre_attn_scalar**-0.5)

    def rope(self, layer: Layer) -> Rope:
        return self.rope_sliding if layer.sliding else self.rope_full

    def last_layer(self, *, sliding: bool) -> int | None:
        """Index of the last layer of that type with its own K/V, which shared layers and drafters attend to."""
        own = [i for i, layer in enumerate(self.layers) if layer.sliding == sliding and layer.kv_source == i]
        return own[-1] if own else None


@dataclass(frozen=True)
class TargetConfig(Stack):
    """The text part of a Gemma 3 or Gemma 4 model."""

    model_type: str
    softcap: float | None  # final logits: cap * tanh(x / cap)
    max_positions: int
    ple_size: int  # width of the per-layer embeddings, 0 for none
    ple_vocab_size: int
    experts: Experts | None
    stop_ids: tuple[int, ...]
    bos_id: int | None
    tied_head: bool  # the LM head is the embedding; False: it is a matrix of its own, lm_head.weight
    norms_include_one: bool  # False: the files hold norm weights less 1, as safetensors files of Gemma 3 do

    def __post_init__(self) -> None:
        super().__post_init__()
        check_limit("max_position_embeddings", self.max_positions)
        check_limit("hidden_size_per_layer_input", self.ple_size)
        check_limit("vocab_size_per_layer_input", self.ple_vocab_size)
        if self.softcap is not None:
            check_limit("final_logit_softcapping", self.softcap)
        if self.ple_size and self.ple_vocab_size < self.vocab_size:
            raise CheckpointError(
                f"vocab_size_per_layer_input is {self.ple_vocab_size}, less than the vocabulary of {self.vocab_size}"
            )
        check_token_ids("eos_token_id", self.stop_ids, self.vocab_size)
        check_token_ids("bos_token_id", () if self.bos_id is None else (self.bos_id,), self.vocab_size)
        for index, layer in enumerate(self.layers):
            source = self.layers[layer.kv_source] if 0 <= layer.kv_source <= index else None
            if (
                not source
                or self.layers[source.kv_source] is not source
                or (
                    (source.sliding, source.head_dim, source.kv_heads)
                    != (layer.sliding, layer.head_dim, layer.kv_heads)
                )
            ):
                raise CheckpointError(f"layer {index} cannot use the K/V of layer {layer.kv_source}")

    @property
    def first_shared_layer(self) -> int:
        """The first layer without its own K/V; the number of layers if there is none."""
        return next((i for i, layer in enumerate(self.layers) if layer.kv_source != i), len(self.layers))


@dataclass(frozen=True)
class DrafterConfig(Stack):
    """A `gemma4_assistant`: a few layers of queries over the target's cache. Its layers' `kv_source` is -1."""

    model_type: str
    backbone_hidden_size: int
    draft_vocab_size: int  # tokens of the head; fewer than the vocabulary's are named by the tensor `draft_token_ids`
    centroids: int  # 0: dense head
    centroid_top_k: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_limit("backbone_hidden_size", self.backbone_hidden_size)
        tokens, count, top_k = self.draft_vocab_size, self.centroids, self.centroid_top_k
        if not 0 < tokens <= self.vocab_size or (count and self.restricted):
            whole = f"all {self.vocab_size} tokens" if count else f"1 to {self.vocab_size} tokens"
            raise CheckpointError(f"draft_vocab_size is {tokens}; this head has {whole}")
        if count and (self.vocab_size % count or not 0 < top_k <= count):
            raise CheckpointError(f"{count} centroids (top {top_k}) do not divide a vocabulary of {self.vocab_size}")

    @property
    def restricted(self) -> bool:
        """Whether the head has a part of the vocabulary."""
        return self.draft_vocab_size < self.vocab_size


def check_limit(name: str, value: float) -> None:
    """Raise `CheckpointError` unless a number lies within its limits; NaN does not."""
    least, most = LIMITS[name]
    if not least <= value <= most:
        raise CheckpointError(f"{name} is {value!r}; it must be between {least:g} and {most:.10g}")


def check_token_ids(name: str, ids: tuple[int, ...], vocab_size: int) -> None:
    """Raise `CheckpointError` if an id is outside the vocabulary."""
    outside = next((i for i in ids if not 0 <= i < vocab_size), None)
    if outside is not None:
        raise CheckpointError(f"{name} is {outside}, which is outside the vocabulary of {vocab_size}")


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
