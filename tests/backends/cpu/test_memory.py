"""Loading never holds a model twice: peak memory is the packed weights, a tenth, and one tensor."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from paceline.checkpoint import target_tensors
from paceline.checkpoint.config_json import target_config

CONFIG = {
    "model_type": "gemma4_text",
    "vocab_size": 16384,
    "vocab_size_per_layer_input": 16384,
    "hidden_size": 1024,
    "hidden_size_per_layer_input": 64,
    "intermediate_size": 2048,
    "num_hidden_layers": 5,
    "layer_types": [*["sliding_attention"] * 4, "full_attention"],
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "global_head_dim": 128,
    "sliding_window": 64,
    "max_position_embeddings": 256,
}

PROGRAM = """
import json, resource, sys
from pathlib import Path
from paceline import _cpu  # what is there before any weight is read
from paceline.backends.cpu.backend import CpuBackend
from paceline.backends.cpu.weights import pack_checkpoint
from paceline.checkpoint import Checkpoint, resolve
from paceline.quant.bf16 import to_bf16

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

checkpoint = Checkpoint.open(Path(sys.argv[1]))
config = checkpoint.target_config()
tensors = resolve(checkpoint, config)
before = peak()
weights = pack_checkpoint(tensors, config, sys.argv[2])
backend = CpuBackend((config, weights), threads=1, context=64, max_rows=16)
print(json.dumps({"taken": peak() - before, "packed": weights.nbytes,
                  "largest": max(ref.bytes for ref in tensors.refs.values())}))
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    generator = np.random.default_rng(0)
    shapes = target_tensors(target_config(CONFIG))
    tensors = {f"model.{name}": generator.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is counted differently elsewhere")
@pytest.mark.parametrize("quant", ["f32", "q8", "q4"])
def test_peak_memory_of_a_load(folder: Path, quant: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), quant], capture_output=True, text=True, check=True
    )
    seen = json.loads(done.stdout)
    assert (folder / "model.safetensors").stat().st_size > 2 * seen["largest"]  # else the bound could not fail
    assert seen["taken"] <= 1.1 * seen["packed"] + seen["largest"]
