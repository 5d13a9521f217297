"""Small whole model folders, which the mutators change. No PyTorch, so that sanitizers can run them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType as Type
from tokenizers import Tokenizer

from paceline.backends.cpu.convert import convert
from tests.fixtures import checkpoints, text_samples
from tests.fixtures.gguf_files import write_gguf

TEMPLATE = """\
{{- bos_token -}}
{%- if tools -%}{{- '<|turn>system\\n' + (tools | tojson) + '<turn|>\\n' -}}{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] not in ('system', 'user', 'assistant', 'tool') -%}
{{- raise_exception('unknown role ' + message['role']) -}}
{%- endif -%}
{{- '<|turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' -}}
{{- message['content'] | trim -}}{{- '<turn|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|turn>model\\n' -}}{%- endif -%}
"""
MOE: dict[str, Any] = {
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 32,
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "use_double_wide_mlp": False,
}
ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
}
TYPES = (Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1)  # of the GGUF files
GENERATION = {"eos_token_id": [1, 5], "do_sample": True, "temperature": 1.0, "top_k": 64, "top_p": 0.95}


def make(root: Path) -> None:
    """Write the pairs `edge` (per-layer embeddings, shared K/V), `moe`, `sharded`, and `edge` converted: `q8`,
    `q4`, and as GGUF files: `gguf`, `parts`."""
    for name, shards in (("edge", 1), ("moe", 1), ("sharded", 3)):
        target, drafter = checkpoints.TARGET, checkpoints.DRAFTER
        if name == "moe":
            target = checkpoints.changed(target, **MOE)
            drafter = {**drafter, "use_ordered_embeddings": False}
        target, drafter = (checkpoints.changed(one, rope_parameters=ROPE) for one in (target, drafter))
        folder = checkpoints.write(root / name, target, checkpoints.target_weights(target), shards)
        checkpoints.write(root / f"{name}-assistant", drafter, checkpoints.drafter_weights(drafter))
        tokenizer = text_samples.byte_level() if name == "moe" else text_samples.gemma_like()
        (folder / "tokenizer.json").write_text(tokenizer.to_str())
        (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<bos>", "eos_token": "<eos>"}))
        (folder / "generation_config.json").write_text(json.dumps(GENERATION))
        (folder / "chat_template.jinja").write_text(TEMPLATE)
        if name == "edge":
            _write_gguf(root, target, drafter, tokenizer)
    for quant in ("q8", "q4"):
        convert(root / "edge", root / "edge-assistant", root / quant, quant, 1)


def _write_gguf(root: Path, target: dict[str, Any], drafter: dict[str, Any], tokenizer: Tokenizer) -> None:
    """The pair as GGUF files: `gguf`, and `parts`, whose target is in several."""
    weights, draft_weights = checkpoints.target_weights(target), checkpoints.drafter_weights(drafter)
    for name, shard_tensors in (("gguf", 0), ("parts", 40)):
        for suffix in ("", "-assistant"):
            (root / f"{name}{suffix}").mkdir()
        write_gguf(
            root / name / "model.gguf",
            target,
            weights,
            tokenizer=tokenizer,
            change=lambda writer: writer.add_chat_template(TEMPLATE),
            type_of=lambda tensor: TYPES[sum(map(ord, tensor)) % len(TYPES)],
            shard_tensors=shard_tensors,
        )
        write_gguf(root / f"{name}-assistant" / "mtp.gguf", drafter, draft_weights, dialect="gemma4-assistant")


def copy(root: Path, name: str, to: Path) -> Path:
    """A copy of a pair; returns its target's folder."""
    for suffix in ("", "-assistant"):
        if (root / f"{name}{suffix}").is_dir():
            shutil.copytree(root / f"{name}{suffix}", to / f"model{suffix}")
    return to / "model"
