"""Random tiny checkpoints of every Gemma 4 shape, written by transformers' own classes and `save_pretrained`.

Scaled down so that a pair takes a fraction of a second, with every mechanism left in: the window is 8 rows, so short
prompts already exceed it. Weights are drawn so that no part is negligible and logits are spread.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn

from paceline.train.tokenizer import BOS, SPECIAL, write_tokenizer

SHAPES = ("e2b", "e4b", "12b", "26b", "31b", "text")
VOCABULARY = 512
WINDOW = 8
Head = Literal["centroid", "dense"]


def write_pair(
    folder: Path,
    shape: str,
    seed: int = 0,
    head: Head = "centroid",
    dtype: torch.dtype = torch.float32,
    text: bool = False,
) -> tuple[Path, Path]:
    """Write `folder/SHAPE` and `folder/SHAPE-assistant` and return both paths.

    `shape` is one of `SHAPES`: five are multimodal checkpoints with tensors to be skipped, "text" is a
    `Gemma4ForCausalLM`. `text=True` adds tokenizer, chat template and generation defaults to the target.
    """
    torch.manual_seed(seed)
    target, drafter = _target(shape), _drafter(shape, head)
    folders = (Path(folder) / shape, Path(folder) / f"{shape}-assistant")
    for model, path in zip((target, drafter), folders, strict=True):
        _randomise(model)
        model.to(dtype).save_pretrained(path)
        (path / "generation_config.json").unlink(missing_ok=True)
    if text:
        write_tokenizer(tiny_tokenizer(), folders[0])
    return folders


def tiny_tokenizer() -> Tokenizer:
    """Gemma's special tokens, all bytes, and pairs of letters up to `VOCABULARY`."""
    names = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    letters = "etaoinshrdlucmfw"
    merges = [(a, b) for a in letters for b in letters][: VOCABULARY - len(names)]
    names += [a + b for a, b in merges]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=merges))
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return tokenizer


def read_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def _common() -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "global_head_dim": 64,
        "sliding_window": WINDOW,
        "max_position_embeddings": 256,
        "final_logit_softcapping": 30.0,
    }


def _pattern(sliding: int, times: int) -> dict[str, Any]:
    types = (["sliding_attention"] * sliding + ["full_attention"]) * times
    return {"layer_types": types, "num_hidden_layers": len(types)}


def _text_settings(shape: str) -> dict[str, Any]:
    """What tells the shapes apart; head counts that the drafter must repeat are in `_heads`."""
    ple = {"hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": VOCABULARY}
    no_ple = {"hidden_size_per_layer_input": 0}
    experts = {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 32}
    return {
        "e2b": {**_pattern(4, 2), **ple, "num_kv_shared_layers": 5, "use_double_wide_mlp": True},
        "e4b": {**_pattern(5, 2), **ple, "num_kv_shared_layers": 6},
        "12b": _pattern(5, 1),
        "26b": {**_pattern(5, 1), **no_ple, **experts},
        "31b": {**_pattern(5, 1), **no_ple},
        "text": {**_pattern(4, 2), **ple, "num_kv_shared_layers": 5, "use_double_wide_mlp": True},
    }[shape]


def _heads(shape: str) -> dict[str, Any]:
    return {
        "e2b": {"num_key_value_heads": 1},
        "e4b": {"num_key_value_heads": 2},
        "12b": {"attention_k_eq_v": True, "num_global_key_value_heads": 1},
        "26b": {"attention_k_eq_v": True, "num_key_value_heads": 4, "num_global_key_value_heads": 2},
        "31b": {"attention_k_eq_v": True, "num_attention_heads": 8, "num_key_value_heads": 4}
        | {"num_global_key_value_heads": 2},
        "text": {"num_key_value_heads": 1},
    }[shape]


def _target(shape: str) -> hf.PreTrainedModel:
    settings = {**_common(), **_text_settings(shape), **_heads(shape)}
    if shape == "text":
        return hf.Gemma4ForCausalLM(hf.Gemma4TextConfig(**settings))
    if shape == "12b":
        vision = hf.Gemma4UnifiedVisionConfig(
            patch_size=2, pooling_kernel_size=1, mm_embed_dim=16, mm_posemb_size=4, output_proj_dims=16
        )
        unified = hf.Gemma4UnifiedConfig(
            text_config=hf.Gemma4UnifiedTextConfig(**settings), vision_config=vision, audio_config=None
        )
        return hf.Gemma4UnifiedForConditionalGeneration(unified)
    tower = hf.Gemma4VisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
        patch_size=2,
        position_embedding_size=4,
    )
    config = hf.Gemma4Config(text_config=hf.Gemma4TextConfig(**settings), vision_config=tower, audio_config=None)
    return hf.Gemma4ForConditionalGeneration(config)


def _drafter(shape: str, head: Head) -> hf.PreTrainedModel:
    unified = shape == "12b"
    settings = {**_common(), **_heads(shape), **_pattern(3, 1), "hidden_size": 32, "num_kv_shared_layers": 4}
    settings["final_logit_softcapping"] = None
    if not unified:
        settings |= {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    text = (hf.Gemma4UnifiedTextConfig if unified else hf.Gemma4TextConfig)(**settings)
    config = (hf.Gemma4UnifiedAssistantConfig if unified else hf.Gemma4AssistantConfig)(
        text_config=text,
        backbone_hidden_size=_common()["hidden_size"],
        use_ordered_embeddings=head == "centroid",
        num_centroids=32,
        centroid_intermediate_top_k=8,
    )
    return (hf.Gemma4UnifiedAssistantForCausalLM if unified else hf.Gemma4AssistantForCausalLM)(config)


@torch.no_grad()
def _randomise(model: nn.Module) -> None:
    """Draw every tensor anew; matrices keep the variance of what passes through them."""
    for name, tensor in model.state_dict().items():
        if name.endswith("token_ordering"):
            tensor.copy_(torch.randperm(len(tensor)))
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            tensor.uniform_(0.3, 0.7)
        elif name.endswith("router.proj.weight"):
            tensor.normal_(std=2.0)
        elif tensor.dim() >= 2 and tensor.is_floating_point():
            tensor.normal_(std=tensor.shape[-1] ** -0.5)
        elif name.endswith("model.norm.weight"):
            tensor.uniform_(2.0, 4.0)  # spreads the logits
        elif name.endswith("layers.0.layer_scalar"):
            tensor.uniform_(-1.2, -0.8)  # a turned sign keeps tokens from predicting themselves for ever
        elif tensor.is_floating_point():
            tensor.uniform_(0.6, 1.3)
