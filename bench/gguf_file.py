"""Writes a text-only Gemma 4 checkpoint as a GGUF file, all matrices in one format: bf16, Q8_0 or Q4_0.

    python gguf_file.py FOLDER OUT.gguf bf16|q8|q4

Runs in the interpreter that has llama.cpp and so imports nothing of paceline: numpy and gguf are enough. The file has
no tokenizer; it serves measurements and comparisons of logits. Metadata follow what llama.cpp's own conversion writes
for this architecture (its conversion/gemma.py). `random_gguf.py` writes its files with the same functions.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

TYPES = {"bf16": Type.BF16, "q8": Type.Q8_0, "q4": Type.Q4_0}
SLICE_WEIGHTS = 1 << 24  # converted at a time


class Part(NamedTuple):
    """A tensor to be written."""

    name: str  # in the file
    shape: tuple[int, ...]  # rows first
    kind: Type
    write: Callable[[BinaryIO], None]  # all its bytes; it may seek over zeros


def write_gguf(folder: Path, out: Path, fmt: str) -> None:
    """Convert a checkpoint of one `model.safetensors` in bf16. `out` appears when it is whole."""
    config = json.loads((folder / "config.json").read_text())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA4, config["num_hidden_layers"])
    parts = [rope_part(config)]
    for name, values in _map_tensors(folder / "model.safetensors").items():
        base = names.get_name(name.removesuffix(".weight"))
        if base is None:
            raise SystemExit(f"{folder}: llama.cpp has no name for the tensor {name}")
        kind = TYPES[fmt] if values.ndim == 2 else Type.F32
        parts.append(Part(f"{base}.weight", values.shape, kind, partial(_write, values=values, kind=kind)))

    def add_settings(writer: gguf.GGUFWriter) -> None:
        writer.add_vocab_size(config["vocab_size"])
        writer.add_tokenizer_model("none")
        add_text_settings(writer, config)

    write_parts(out, "gemma4", add_settings, parts)


def write_parts(
    out: Path, architecture: str, add_settings: Callable[[gguf.GGUFWriter], None], parts: Sequence[Part]
) -> None:
    """Write a file of such tensors one after the other. `out` appears when it is whole."""
    unfinished = out.with_name(out.name + ".part")
    writer = gguf.GGUFWriter(unfinished, architecture)
    add_settings(writer)
    for name, shape, kind, _ in parts:
        size = math.prod(gguf.quant_shape_to_byte_shape(shape, kind))
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    file = writer.fout[0]
    for part in parts:
        file.seek(-file.tell() % writer.data_alignment, os.SEEK_CUR)
        part.write(file)
    file.truncate(file.tell() + -file.tell() % writer.data_alignment)  # the last may be a hole
    writer.close()
    os.replace(unfinished, out)


def _map_tensors(path: Path) -> dict[str, NDArray[Any]]:
    """Tensors by name as bf16 bits (uint16), mapped."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    tensors: dict[str, NDArray[Any]] = {}
    for name, entry in header.items():
        if entry["dtype"] != "BF16":
            raise SystemExit(f"{path}: the tensor {name} is {entry['dtype']}; only BF16 can be converted")
        start = 8 + length + entry["data_offsets"][0]
        tensors[name] = np.memmap(path, np.uint16, "r", start, tuple(entry["shape"]))
    return tensors


def _write(file: BinaryIO, *, values: NDArray[Any], kind: Type) -> None:
    if values.ndim == 1:
        (values if values.dtype == np.float32 else _floats(values)).tofile(file)
        return
    rows, columns = values.shape
    step = max(1, SLICE_WEIGHTS // columns)
    for start in range(0, rows, step):
        bits = np.ascontiguousarray(values[start : start + step])
        if not bits.any():  # zero bytes are zeros in every format: leave a hole
            file.seek(math.prod(gguf.quant_shape_to_byte_shape(bits.shape, kind)), os.SEEK_CUR)
        elif kind == Type.BF16:
            bits.tofile(file)
        else:
            gguf.quantize(_floats(bits), kind).tofile(file)


def _floats(bits: NDArray[Any]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def add_text_settings(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    """Add the settings of a target, or of the text part of a drafter.

    Args:
        writer: of a file of its architecture.
        config: as in `config.json`, `rope_parameters` included.
    """
    layers, shared = config["num_hidden_layers"], config.get("num_kv_shared_layers", 0)
    sliding = [kind == "sliding_attention" for kind in config["layer_types"]]
    wide = 2 if config.get("use_double_wide_mlp") else 1
    rope = config["rope_parameters"]
    head, global_head = config["head_dim"], config["global_head_dim"]
    key_heads = config["num_key_value_heads"]
    global_key_heads = config.get("num_global_key_value_heads") or key_heads
    writer.add_block_count(layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_embedding_length_per_layer_input(config.get("hidden_size_per_layer_input", 0))
    writer.add_feed_forward_length(
        [config["intermediate_size"] * (wide if i >= layers - shared else 1) for i in range(layers)]
    )
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(
        [key_heads if one else global_key_heads for one in sliding] if global_key_heads != key_heads else key_heads
    )
    writer.add_key_length(global_head)
    writer.add_value_length(global_head)
    writer.add_key_length_swa(head)
    writer.add_value_length_swa(head)
    writer.add_shared_kv_layers(shared)
    writer.add_sliding_window(config["sliding_window"])
    writer.add_sliding_window_pattern(sliding)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if "final_logit_softcapping" in config:
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    writer.add_rope_freq_base(rope["full_attention"]["rope_theta"])
    writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
    writer.add_rope_dimension_count(global_head)
    writer.add_rope_dimension_count_swa(head)
    if config.get("enable_moe_block"):
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["top_k_experts"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])


def rope_part(config: Mapping[str, Any]) -> Part:
    """Divisors of the full layers' frequencies: proportional RoPE leaves all but the first pairs unrotated."""
    pairs = config["global_head_dim"] // 2
    rotating = int(pairs * config["rope_parameters"]["full_attention"]["partial_rotary_factor"])
    divisors = np.where(np.arange(pairs) < rotating, 1, 1e30).astype(np.float32)
    return Part("rope_freqs.weight", divisors.shape, Type.F32, divisors.tofile)


if __name__ == "__main__":
    write_gguf(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
