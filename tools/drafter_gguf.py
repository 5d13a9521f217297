"""Writes a drafter's folder as one GGUF file with matrices in Q8_0, which is half as large.

    python -m tools.drafter_gguf FOLDER FILE.gguf [--licence NAME]

In llama.cpp's form (architecture `gemma4-assistant`), except for a head with a part of the vocabulary: its tokens are a
tensor `draft_token_ids`, and the vocabulary's size is a key. Needs llama.cpp's package gguf.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from paceline.checkpoint import Checkpoint, resolve
from paceline.checkpoint.gguf_model import DRAFTERS, GLOBAL, LAYER, NEVER, ROPE_FREQS
from paceline.checkpoint.names import TOKEN_IDS
from paceline.config import DrafterConfig

ARCHITECTURE = DRAFTERS[0]


def write_drafter(folder: Path, out: Path, licence: str = "") -> None:
    """Write it; vectors stay in float32. The licence is named in the file."""
    checkpoint = Checkpoint.open(folder)
    config = checkpoint.drafter_config()
    tensors = resolve(checkpoint, config)
    part = out.with_name(out.name + ".part")
    writer = gguf.GGUFWriter(part, ARCHITECTURE)
    writer.add_name(out.stem)
    if licence:
        writer.add_license(licence)
    add_settings(writer, config, int(checkpoint.config["text_config"]["max_position_embeddings"]))
    writer.add_tensor(ROPE_FREQS, divisors(config))
    for name, ref in tensors.refs.items():
        values = tensors.vector(name)
        if len(ref.shape) == 2:
            writer.add_tensor(gguf_name(name), gguf.quantize(values, Type.Q8_0), raw_dtype=Type.Q8_0)
        else:
            writer.add_tensor(gguf_name(name), values.astype(np.int32 if name in TOKEN_IDS else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(part, out)


def add_settings(writer: gguf.GGUFWriter, config: DrafterConfig, context: int) -> None:
    sliding = next(layer for layer in config.layers if layer.sliding)
    full = next(layer for layer in config.layers if not layer.sliding)
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(len(config.layers))
    writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_uint32(f"{ARCHITECTURE}.embedding_length_out", config.backbone_hidden_size)
    writer.add_feed_forward_length(sliding.intermediate_size)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv([layer.kv_heads for layer in config.layers])
    for layer, add in (
        (full, (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count)),
        (sliding, (writer.add_key_length_swa, writer.add_value_length_swa, writer.add_rope_dimension_count_swa)),
    ):
        for one in add:
            one(layer.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_eps)
    writer.add_sliding_window(config.sliding_window)
    writer.add_sliding_window_pattern([layer.sliding for layer in config.layers])
    writer.add_shared_kv_layers(len(config.layers))
    writer.add_rope_freq_base(config.rope_full.theta)
    writer.add_rope_freq_base_swa(config.rope_sliding.theta)
    if config.centroids:
        writer.add_bool(f"{ARCHITECTURE}.use_ordered_embeddings", True)
        writer.add_uint32(f"{ARCHITECTURE}.n_centroids", config.centroids)
        writer.add_uint32(f"{ARCHITECTURE}.centroid_top_k", config.centroid_top_k)


def divisors(config: DrafterConfig) -> np.ndarray:
    """What frequencies of full-attention layers are divided by [head_dim / 2]."""
    full = next(layer for layer in config.layers if not layer.sliding)
    pairs = np.arange(full.head_dim // 2)
    return np.where(pairs < config.rope_full.rotating_pairs(full.head_dim), 1, NEVER).astype(np.float32)


def gguf_name(name: str) -> str:
    """The first name that reads as a canonical one, which is llama.cpp's."""
    if name.startswith("layers."):
        _, index, part = name.split(".", 2)
        return f"blk.{index}.{next(theirs for theirs, ours in LAYER.items() if ours == part)}"
    return next(theirs for theirs, ours in GLOBAL.items() if ours == name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write a drafter as a GGUF file.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--licence", default="", help="to name in the file")
    given = parser.parse_args()
    write_drafter(given.folder, given.file, given.licence)
