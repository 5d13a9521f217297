"""A random bf16 checkpoint in an official shape, streamed to disk: the same weights for every engine compared.

It is a text-only `Gemma4ForCausalLM` in the official files' format. Vectors and matrices are drawn so that no part is
negligible and logits are spread, which makes comparing logits between engines worth something. A large table of
per-layer embeddings is a hole in the file: it reads as zeros and takes no disk.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paceline.bench.shapes import TARGETS
from paceline.checkpoint.config_json import target_config
from paceline.checkpoint.names import PLE_TABLE, expected_tensors
from paceline.quant.bf16 import to_bf16

SLICE_WEIGHTS = 1 << 24  # drawn at a time
LARGEST_DRAWN_TABLE = 1 << 26  # weights; beyond it a table of per-layer embeddings is a hole

# Everything that E2B has, in a size for tests: shared K/V, wide MLPs, per-layer embeddings, two head sizes.
TINY = TARGETS["e2b"] | {
    "vocab_size": 1024,
    "vocab_size_per_layer_input": 1024,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 10,
    "layer_types": TARGETS["e2b"]["layer_types"][:10],
    "num_kv_shared_layers": 5,
    "num_attention_heads": 4,
    "head_dim": 32,
    "global_head_dim": 64,
    "hidden_size_per_layer_input": 32,
    "sliding_window": 32,
    "max_position_embeddings": 4096,
}
SHAPES = {"tiny": TINY, "e2b": TARGETS["e2b"], "e4b": TARGETS["e4b"]}

ALWAYS = {
    "architectures": ["Gemma4ForCausalLM"],
    "dtype": "bfloat16",
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
    },
}


def write_checkpoint(folder: Path, shape: str) -> None:
    """Write `folder/config.json` and `folder/model.safetensors`, unless they are there already.

    Args:
        folder: made if it is missing.
        shape: one of `SHAPES`.
    """
    config = ALWAYS | SHAPES[shape]
    settings = folder / "config.json"
    if settings.exists() and json.loads(settings.read_text()) == config:
        return
    folder.mkdir(parents=True, exist_ok=True)
    settings.unlink(missing_ok=True)
    part = folder / "model.safetensors.part"
    _write_tensors(part, expected_tensors(target_config(config)))
    os.replace(part, folder / "model.safetensors")
    settings.write_text(json.dumps(config, indent=2))  # last: its presence says that the weights are whole


def _write_tensors(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        entries[f"model.{name}"] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name, shape in shapes.items():
            if name == PLE_TABLE and math.prod(shape) > LARGEST_DRAWN_TABLE:
                file.seek(2 * math.prod(shape), os.SEEK_CUR)
                continue
            for values in _draw(name, shape):
                to_bf16(values).tofile(file)
        file.truncate(8 + len(header) + end)


def _draw(name: str, shape: tuple[int, ...]) -> Iterator[NDArray[np.float32]]:
    """A tensor's values, some rows at a time; they depend on its name alone."""
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    if len(shape) == 1:
        low, high = _range(name)
        yield generator.uniform(low, high, shape).astype(np.float32)
        return
    rows, columns = shape
    step = max(1, SLICE_WEIGHTS // columns)
    scale = np.float32(columns**-0.5)  # keeps the variance of what passes through
    for start in range(0, rows, step):
        yield generator.standard_normal((min(step, rows - start), columns), np.float32) * scale


def _range(name: str) -> tuple[float, float]:
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        return 0.3, 0.7
    if name == "norm.weight":
        return 2.0, 4.0  # spreads the logits
    if name == "layers.0.layer_scalar":
        return -1.2, -0.8  # a turned sign keeps tokens from predicting themselves
    return 0.6, 1.3
