"""Writes a GGUF's values as a folder of float32 safetensors, to quantise them anew or to give them to another program.

    python -m tools.dequantise MODEL FOLDER

Tensors have their canonical names (`paceline.checkpoint.names`); `config.json` and the tokenizer are written as
`paceline convert` does.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from paceline import _cpu
from paceline.backends.cpu.convert import write_texts
from paceline.checkpoint import Checkpoint, Tensors, locate, resolve


def values_of(tensors: Tensors, name: str) -> NDArray[np.float32]:
    """A tensor in float32."""
    ref = tensors[name]
    if not ref.block_type:
        return tensors.vector(name).reshape(ref.shape)
    rows = ref.read()
    values = _cpu.dequantise(rows.reshape(-1, rows.shape[-1]), ref.block_type, ref.shape[-1])
    return np.asarray(values).reshape(ref.shape)


def dequantise(file: Path, folder: Path) -> None:
    checkpoint = Checkpoint.open(file)
    config = checkpoint.target_config()
    tensors = resolve(checkpoint, config)
    folder.mkdir(parents=True)
    write_texts(checkpoint, config, folder)
    save_file({name: values_of(tensors, name) for name in tensors.refs}, folder / "model.safetensors")


if __name__ == "__main__":
    dequantise(locate(sys.argv[1]), Path(sys.argv[2]))
