"""Writes a text-only Gemma 4 checkpoint as a GGUF file, all matrices in one format: bf16, Q8_0 or Q4_0.

    python gguf_file.py FOLDER OUT.gguf bf16|q8|q4

Runs in the interpreter that has llama.cpp and so imports nothing of paceline: numpy and gguf are enough. The file has
no tokenizer; it serves measurements and comparisons of logits. Metadata follow what llama.cpp's own conversion writes
for this architecture (its conversion/gemma.py).
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

TYPES = {"bf16": Type.BF16, "q8": Type.Q8_0, "q4": Type.Q4_0}
SLICE_WEIGHTS = 1 << 24  # converted at a time


def write_gguf(folder: Path, out: Path, fmt: str) -> None:
    """Convert a checkpoint of one `model.safetensors` in bf16. `out` appears when it is whole."""
    config = json.loads((folder / "config.json").read_text())
    tensors = _map_tensors(folder / "model.safetensors")
    part = out.with_name(out.name + ".part")
    writer = gguf.GGUFWriter(part, "gemma4")
    _add_settings(writer, config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA4, config["num_hidden_layers"])
    plan = []
    for name, values in tensors.items():
        base = names.get_name(name.removesuffix(".weight"))
        if base is None:
            raise SystemExit(f"{folder}: llama.cpp has no name for the tensor {name}")
        plan.append((f"{base}.weight", values, TYPES[fmt] if values.ndim == 2 else Type.F32))
    plan.append(("rope_freqs.weight", _rope_factors(config), Type.F32))
    for name, values, kind in plan:
        size = math.prod(gguf.quant_shape_to_byte_shape(values.shape, kind))
        writer.add_tensor_info(name, values.shape, np.dtype(np.float32), size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    file = writer.fout[0]
    for _, values, kind in plan:
        file.seek(-file.tell() % writer.data_alignment, os.SEEK_CUR)
        _write(file, values, kind)
    file.truncate(file.tell() + -file.tell() % writer.data_alignment)  # the last may be a hole
    writer.close()
    os.replace(part, out)


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


def _write(file: BinaryIO, values: NDArray[Any], kind: Type) -> None:
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


def _add_settings(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    layers, shared = config["num_hidden_layers"], config["num_kv_shared_layers"]
    wide = 2 if config.get("use_double_wide_mlp") else 1
    rope = config["rope_parameters"]
    head, global_head = config["head_dim"], config["global_head_dim"]
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    writer.add_block_count(layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_embedding_length_per_layer_input(config["hidden_size_per_layer_input"])
    writer.add_feed_forward_length(
        [config["intermediate_size"] * (wide if i >= layers - shared else 1) for i in range(layers)]
    )
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(global_head)
    writer.add_value_length(global_head)
    writer.add_key_length_swa(head)
    writer.add_value_length_swa(head)
    writer.add_shared_kv_layers(shared)
    writer.add_sliding_window(config["sliding_window"])
    writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config["layer_types"]])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    writer.add_rope_freq_base(rope["full_attention"]["rope_theta"])
    writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
    writer.add_rope_dimension_count(global_head)
    writer.add_rope_dimension_count_swa(head)


def _rope_factors(config: dict[str, Any]) -> NDArray[np.float32]:
    """Divisors of the full layers' frequencies: proportional RoPE leaves all but the first pairs unrotated."""
    pairs = config["global_head_dim"] // 2
    rotating = int(pairs * config["rope_parameters"]["full_attention"]["partial_rotary_factor"])
    return np.where(np.arange(pairs) < rotating, 1, 1e30).astype(np.float32)


if __name__ == "__main__":
    write_gguf(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
