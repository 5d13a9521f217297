"""What a GGUF file says of a Gemma model, in the terms of a model folder: `config.json`, and tensors by canonical name.

Names and keys are those of https://github.com/ggml-org/llama.cpp (`gguf-py/gguf/constants.py`, `conversion/gemma.py`);
drafters have several dialects of them, and Ollama's conversions a few of their own. Sizes come from the file alone.
Values are never changed: norm weights of Gemma 3 are in a GGUF file already the ones to multiply by.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from paceline.checkpoint.gguf import Gguf
from paceline.checkpoint.names import DRAFT_TOKENS
from paceline.checkpoint.tensors import READABLE, TensorRef
from paceline.config import LIMITS
from paceline.errors import CheckpointError

TARGETS = ("gemma4", "gemma3")
DRAFTERS = ("gemma4-assistant", "gemma4_assistant", "gemma4_mtp")  # llama.cpp's, AtomicChat's, ik_llama.cpp's
OTHERS = {
    "clip": "the part of a model that sees and hears (an mmproj); give the model's own file, often beside it",
    "dflash": "a DFlash drafter, not an MTP drafter; give the model's MTP drafter (mtp-... or ...-assistant...)",
    "eagle3": "an EAGLE-3 drafter, not an MTP drafter; give the model's MTP drafter (mtp-... or ...-assistant...)",
}
BACKBONE = ("embedding_length_out", "n_embd_backbone", "backbone_embedding_length", "assistant.backbone_hidden_size")
TOP_K = 32  # of centroids, where a drafter's file does not say
SLIDING_PATTERN = 6  # of Gemma 3, whose files do not say: every sixth layer has full attention
SLIDING_THETA = 1e4
LAYERS_OF_27B = (
    62  # Gemma 3 27B alone scales attention by hidden size / heads; files do not say so, llama.cpp counts too
)
ROTARY_FACTOR = 0.25  # of Gemma 4's full-attention layers, where there is no rope_freqs
NEVER = 1e30  # frequencies divided by this or more stand still

ROPE_FREQS = "rope_freqs.weight"
GLOBAL = {
    "token_embd.weight": "embed_tokens.weight",
    "output.weight": "lm_head.weight",
    "output_norm.weight": "norm.weight",
    "per_layer_token_embd.weight": "embed_tokens_per_layer.weight",
    "per_layer_model_proj.weight": "per_layer_model_projection.weight",
    "per_layer_proj_norm.weight": "per_layer_projection_norm.weight",
    **{
        f"{name}.weight": f"{canonical}.weight"
        for canonical, names in {
            "pre_projection": "nextn.pre_projection mtp.pre_projection mtp_pre_proj assistant.pre_projection",
            "post_projection": "nextn.post_projection mtp.post_projection mtp_post_proj assistant.post_projection",
            "masked_embedding.centroids": "masked_embd_centroids mtp.centroids mtp_centroids",
        }.items()
        for name in names.split()
    },
    "masked_embd_ordering": "masked_embedding.token_ordering",
    "masked_embd_ordering.weight": "masked_embedding.token_ordering",
    "mtp.token_ordering.weight": "masked_embedding.token_ordering",
    "mtp_token_ordering.weight": "masked_embedding.token_ordering",
    DRAFT_TOKENS: DRAFT_TOKENS,  # paceline's own: a head with a part of the vocabulary, whose size is `vocab_size`
}
LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "ffn_norm.weight": "pre_feedforward_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
    "post_ffw_norm.weight": "post_feedforward_layernorm.weight",
    "layer_output_scale.weight": "layer_scalar",
    "inp_gate.weight": "per_layer_input_gate.weight",
    "proj.weight": "per_layer_projection.weight",
    "post_norm.weight": "post_per_layer_input_norm.weight",
    "ffn_gate_inp.weight": "router.proj.weight",
    "ffn_gate_inp.scale": "router.scale",
    "ffn_down_exps.scale": "router.per_expert_scale",
    "ffn_gate_inp.per_expert_scale": "router.per_expert_scale",  # Ollama's
    "ffn_gate_up_exps.weight": "experts.gate_up_proj",
    "ffn_gate_exps.weight": "experts.gate_proj",
    "ffn_up_exps.weight": "experts.up_proj",
    "ffn_down_exps.weight": "experts.down_proj",
    "pre_ffw_norm_2.weight": "pre_feedforward_layernorm_2.weight",
    "post_ffw_norm_1.weight": "post_feedforward_layernorm_1.weight",
    "post_ffw_norm_2.weight": "post_feedforward_layernorm_2.weight",
}
FUSED = "attn_qkv.weight"  # rows of q, then k, then v
BLOCK = re.compile(r"blk\.(0|[1-9]\d{0,3})\.(.+)")
# Towers, which Ollama puts into the same file; under the names that model folders have for them.
TOWERS = {"v.": "vision_tower.", "a.": "audio_tower.", "mm.": "embed_vision.", "model.vision_tower.": "vision_tower."}


def read_model(file: Gguf) -> tuple[dict[str, Any], dict[str, TensorRef]]:
    """What `config.json` would say of the model, token ids apart, and its tensors by canonical name.

    Raises:
        CheckpointError: not a Gemma model or drafter, or a setting or a tensor is missing, unknown or unsupported.
    """
    architecture = file.text("general.architecture")
    if architecture not in TARGETS + DRAFTERS:
        known = (
            f"a model of the architecture {architecture!r}; only Gemma 3, Gemma 4 and their MTP drafters are supported"
        )
        raise CheckpointError(f"{file.path}: is {OTHERS.get(architecture, known)}")
    settings = _Settings(file, architecture)
    text = settings.text()
    # a fork writes drafters as targets of this kind
    if architecture in DRAFTERS or file.metadata.get(f"{architecture}.assistant.type") is not None:
        config = settings.drafter(text)
    else:
        config = {"model_type": f"{architecture}_text", "norms_include_one": True, **text}
    said = [file.metadata.get(f"general.{key}") for key in ("name", "finetune")]
    called = " ".join(text for text in said if isinstance(text, str))
    return config | {"_name_or_path": called}, _tensors(file, text)


class _Settings:
    """Reads the keys of one architecture."""

    def __init__(self, file: Gguf, architecture: str) -> None:
        self._file, self._architecture, self._gemma3 = file, architecture, architecture == "gemma3"
        self._layers = self._count("block_count")

    def text(self) -> dict[str, Any]:
        """The text part of a config, of a target or a drafter."""
        embedding = self._tensor("token_embd.weight")
        full_size = self._integer("attention.key_length")
        size = self._integer("attention.key_length_swa", full_size)
        for suffix, keys in (("", full_size), ("_swa", size)):
            values = self._integer(f"attention.value_length{suffix}", keys)
            rotary = self._integer(f"rope.dimension_count{suffix}", keys)
            if values != keys or rotary != keys:
                raise self._unsupported(f"keys of {keys} and values of {values} with {rotary} of them rotating")
        full = self._full_attention(full_size, size)
        config = {
            "vocab_size": embedding.shape[0],
            "hidden_size": self._integer("embedding_length"),
            "num_hidden_layers": self._layers,
            "layer_types": ["full_attention" if one else "sliding_attention" for one in full],
            "num_attention_heads": self._one("attention.head_count", self._per_layer("attention.head_count")),
            "head_dim": size,
            "global_head_dim": full_size,
            "sliding_window": self._integer("attention.sliding_window"),
            "max_position_embeddings": self._integer("context_length"),
            "rms_norm_eps": self._number("attention.layer_norm_rms_epsilon"),
            "rope_parameters": self._rope(full_size),
            "num_kv_shared_layers": self._integer("attention.shared_kv_layers", 0),
            "hidden_size_per_layer_input": self._integer("embedding_length_per_layer_input", 0),
            "tie_word_embeddings": "output.weight" not in self._file.tensors,
            **self._sizes_by_layer(full),
            **self._experts(),
        }
        if self._gemma3:
            heads = config["num_attention_heads"]
            config["query_pre_attn_scalar"] = (
                config["hidden_size"] / max(1, heads) if self._layers == LAYERS_OF_27B else full_size
            )
        if config["hidden_size_per_layer_input"]:
            config["vocab_size_per_layer_input"] = self._tensor("per_layer_token_embd.weight").shape[0]
        if (cap := self._key("final_logit_softcapping")) in self._file.metadata:
            config["final_logit_softcapping"] = self._file.number(cap)
        return config

    def drafter(self, text: Mapping[str, Any]) -> dict[str, Any]:
        """The config of a drafter, whose head shows in its tensors: many files have settings of one that they lack."""
        names = {GLOBAL.get(name): ref for name, ref in self._file.tensors.items()}
        centroids = names.get("masked_embedding.centroids.weight")
        ordered = centroids is not None and "masked_embedding.token_ordering" in names
        config: dict[str, Any] = {
            "model_type": "gemma4_assistant",
            "backbone_hidden_size": self._backbone(names.get("pre_projection.weight")),
            "use_ordered_embeddings": ordered,
            "text_config": dict(text),
        }
        if DRAFT_TOKENS in names:
            config["draft_vocab_size"] = text["vocab_size"]
            config["text_config"] = {**text, "vocab_size": self._integer("vocab_size")}
        if ordered and centroids is not None:
            config |= {
                "num_centroids": centroids.rows,
                "centroid_intermediate_top_k": self._integer("centroid_top_k", TOP_K),
            }
        return config

    def _backbone(self, projection: TensorRef | None) -> int:
        """The hidden size of a drafter's target."""
        for key in BACKBONE:
            if self._key(key) in self._file.metadata:
                return self._integer(key)
        if projection is None or len(projection.shape) != 2:
            raise self._missing(self._key(BACKBONE[0]))
        return projection.shape[1] // 2  # it takes an embedding and a hidden state of the target

    def _full_attention(self, full_size: int, size: int) -> list[bool]:
        """Whether each layer has full attention."""
        key = self._key("attention.sliding_window_pattern")
        if isinstance(self._file.metadata.get(key), np.ndarray):
            sliding = self._file.array(key, "b", self._layers)
            assert sliding is not None
            return [not one for one in sliding.tolist()]
        if self._gemma3:
            every = self._count("attention.sliding_window_pattern", SLIDING_PATTERN)
            return [(index + 1) % every == 0 for index in range(self._layers)]
        if full_size == size:
            raise self._file.wrong(key, "a list") if key in self._file.metadata else self._missing(key)
        return [self._tensor(f"blk.{i}.attn_q_norm.weight").shape == (full_size,) for i in range(self._layers)]

    def _sizes_by_layer(self, full: list[bool]) -> dict[str, Any]:
        """Widths of the MLP and numbers of K/V heads; layers that differ have an entry of their own."""
        widths, heads = self._per_layer("feed_forward_length"), self._per_layer("attention.head_count_kv")
        sliding = [count for count, one in zip(heads, full, strict=True) if not one]
        common = self._one("attention.head_count_kv of sliding layers", sliding or heads)
        layers: dict[str, dict[str, int]] = {}
        for index, one in enumerate(full):
            own = {}
            if widths[index] != widths[0]:
                own["intermediate_size"] = widths[index]
            if one and heads[index] != common:
                own["num_key_value_heads"] = heads[index]
            if own:
                layers[str(index)] = own
        config: dict[str, Any] = {"intermediate_size": widths[0], "num_key_value_heads": common}
        if layers:
            config["per_layer_config"] = layers
        shared = self._integer("attention.shared_kv_layers", 0)
        own_full = [index for index, one in enumerate(full) if one and index < self._layers - shared]
        config["attention_k_eq_v"] = bool(own_full) and not any(
            f"blk.{index}.{name}" in self._file.tensors for index in own_full for name in ("attn_v.weight", FUSED)
        )
        return config

    def _experts(self) -> dict[str, Any]:
        count = self._integer("expert_count", 0)
        if not count:
            return {}
        return {
            "enable_moe_block": True,
            "num_experts": count,
            "top_k_experts": self._integer("expert_used_count"),
            "moe_intermediate_size": self._integer("expert_feed_forward_length"),
        }

    def _rope(self, full_size: int) -> dict[str, Any]:
        scaling = self._file.text(self._key("rope.scaling.type"), "none")
        factor = self._number("rope.scaling.factor", 1.0)
        full: dict[str, Any] = {"rope_type": "default", "rope_theta": self._number("rope.freq_base")}
        if scaling == "linear" and self._gemma3:
            full |= {"rope_type": "linear", "factor": factor}
        elif scaling not in ("none", "linear") or (scaling == "linear" and factor != 1.0):
            raise self._unsupported(f"rope.scaling.type {scaling!r} with a factor of {factor:g}")
        elif not self._gemma3:
            full |= {"rope_type": "proportional", "partial_rotary_factor": self._rotary_factor(full_size)}
        sliding = {"rope_type": "default", "rope_theta": self._number("rope.freq_base_swa", SLIDING_THETA)}
        return {"full_attention": full, "sliding_attention": sliding}

    def _rotary_factor(self, full_size: int) -> float:
        """The share of frequencies that turn in full-attention layers; the file holds what each is divided by."""
        ref = self._file.tensors.get(ROPE_FREQS)
        if ref is None:
            return ROTARY_FACTOR
        if ref.shape != (full_size // 2,) or ref.dtype != "F32":
            raise self._unsupported(f"a tensor {ROPE_FREQS} {list(ref.shape)} in {ref.dtype}")
        divisors = ref.read()
        turning = int((divisors == 1.0).sum())
        if not turning or not (divisors[:turning] == 1.0).all() or not (divisors[turning:] >= NEVER).all():
            raise self._unsupported(f"values in {ROPE_FREQS} that do not only switch frequencies on and off")
        return turning / len(divisors)

    def _per_layer(self, key: str) -> list[int]:
        """A setting that is one number, or one for each layer."""
        name = self._key(key)
        if isinstance(self._file.metadata.get(name), np.ndarray):
            values = self._file.array(name, "iu", self._layers)
            assert values is not None
            return [int(value) for value in values]
        return [self._integer(key)] * self._layers

    def _one(self, what: str, values: list[int]) -> int:
        if len(set(values)) > 1:
            raise self._unsupported(f"{what} that differs between layers")
        return values[0]

    def _key(self, key: str) -> str:
        return f"{self._architecture}.{key}"

    def _count(self, key: str, default: int | None = None) -> int:
        """A number of layers."""
        value, (least, most) = self._integer(key, default), LIMITS["num_hidden_layers"]
        if not least <= value <= most:
            raise self._file.wrong(self._key(key), f"between {least:g} and {most:g}")
        return value

    def _integer(self, key: str, default: int | None = None) -> int:
        return self._file.integer(self._key(key), default)

    def _number(self, key: str, default: float | None = None) -> float:
        return self._file.number(self._key(key), default)

    def _tensor(self, name: str) -> TensorRef:
        ref = self._file.tensors.get(name)
        if ref is None or not ref.shape:
            raise self._missing(f"the tensor {name}")
        return ref

    def _missing(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._file.path}: {what} is missing; take another file of this model")

    def _unsupported(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self._file.path}: has {what}, which is not supported; take another file of this model"
        )


def _tensors(file: Gguf, text: Mapping[str, Any]) -> dict[str, TensorRef]:
    """A file's tensors by canonical name; those of towers keep names by which they are known as such."""
    tensors: dict[str, TensorRef] = {}
    for name, ref in file.tensors.items():
        if name == ROPE_FREQS:
            continue
        for canonical, part in _named(name, ref, text):
            if canonical in tensors:
                raise CheckpointError(f"{ref.path}: the tensors {name} and {tensors[canonical].name} are the same one")
            tensors[canonical] = part
    return tensors


def _named(name: str, ref: TensorRef, text: Mapping[str, Any]) -> list[tuple[str, TensorRef]]:
    tower = next((start for start in TOWERS if name.startswith(start)), None)
    if tower is not None:
        return [(TOWERS[tower] + name.removeprefix(tower), ref)]
    if ref.dtype not in READABLE:
        raise CheckpointError(
            f"{ref.path}: the tensor {name} has type {ref.dtype}, which is not supported; take another file of this "
            f"model, such as Q4_K_M (supported: {', '.join(READABLE)})"
        )
    if name in GLOBAL:
        return [(GLOBAL[name], ref)]
    block = BLOCK.fullmatch(name)
    if block and block[2] in LAYER:
        return [(f"layers.{block[1]}.{LAYER[block[2]]}", ref)]
    if block and block[2] == FUSED:
        return _split(int(block[1]), ref, text)
    raise CheckpointError(
        f"{ref.path}: the tensor {name} {list(ref.shape)} is not known: this is no Gemma model of a kind that is "
        "supported; take another file of this model"
    )


def _split(index: int, ref: TensorRef, text: Mapping[str, Any]) -> list[tuple[str, TensorRef]]:
    """Queries, keys and values of a layer whose file has them as one matrix."""
    full = text["layer_types"][index : index + 1] == ["full_attention"]
    size = text["global_head_dim"] if full else text["head_dim"]
    own = text.get("per_layer_config", {}).get(str(index), {})
    queries = text["num_attention_heads"] * size
    keys = own.get("num_key_value_heads", text["num_key_value_heads"]) * size
    if len(ref.shape) != 2 or ref.rows != queries + 2 * keys:
        raise CheckpointError(
            f"{ref.path}: the tensor {ref.name} has shape {list(ref.shape)} where {queries} + 2 x {keys} rows are "
            "called for; take another file of this model"
        )
    starts = {"q": (0, queries), "k": (queries, queries + keys), "v": (queries + keys, ref.rows)}
    return [(f"layers.{index}.self_attn.{part}_proj.weight", ref.slice(*rows)) for part, rows in starts.items()]
