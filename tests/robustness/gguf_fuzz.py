"""`python -m tests.robustness.gguf_fuzz --cases 100000`: mutated GGUF files, opened one after the other in one process.

Each must be opened (settings, tensors, tokenizer) or refused with one line that names the file, in a moment and without
memory beyond its size. `python -m tests.robustness --kind gguf` runs whole models of such files, each in a process of
its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np

from paceline.checkpoint import Checkpoint, drafter_tensors, resolve, target_tensors
from paceline.checkpoint.config_json import DRAFTER_TYPES, drafter_config, target_config
from paceline.errors import CheckpointError
from paceline.text import Tokenizer
from tests.fixtures import checkpoints, text_samples
from tests.fixtures.gguf_files import write_gguf
from tests.robustness import bases
from tests.robustness.gguf_mutators import Raw, mutated

SECONDS = 2.0  # for one file
MEMORY = 1 << 29  # beyond what the process takes when it starts


def good_files(folder: Path) -> list[Raw]:
    """A target with merges, one of a byte-level vocabulary, one with experts, and a drafter; weights are zeros."""
    shapes = {
        "edge": (checkpoints.TARGET, "gemma4", text_samples.gemma_like()),
        "bytes": (checkpoints.TARGET, "gemma4", text_samples.byte_level()),
        "moe": (checkpoints.changed(checkpoints.TARGET, **bases.MOE), "gemma4", text_samples.gemma_like()),
        "drafter": (checkpoints.DRAFTER, "gemma4-assistant", None),
    }
    found = []
    for name, (config, dialect, tokenizer) in shapes.items():
        drafter = "backbone_hidden_size" in config
        tensors = drafter_tensors(drafter_config(config)) if drafter else target_tensors(target_config(config))
        weights = {
            tensor: np.arange(shape[0], dtype=np.int64) if "ordering" in tensor else np.zeros(shape, np.float32)
            for tensor, shape in tensors.items()
        }
        path = write_gguf(folder / f"{name}.gguf", config, weights, dialect=dialect, tokenizer=tokenizer)
        found.append(Raw.of(path.read_bytes()))
        assert found[-1].join() == path.read_bytes()
        assert check(path) == "opened"
    return found


def check(path: Path) -> str:
    """What becomes of a file: "opened", "refused" with one line, or what is wrong."""
    try:
        checkpoint = Checkpoint.open(path)
        drafter = checkpoint.config["model_type"] in DRAFTER_TYPES
        config = checkpoint.drafter_config() if drafter else checkpoint.target_config()
        resolve(checkpoint, config)
        checkpoint.sampling()
        if not drafter and checkpoint.has_tokenizer:
            Tokenizer.open(checkpoint.tokenizer, checkpoint.tokenizer_config, config.bos_id, config.vocab_size)
        return "opened"
    except CheckpointError as error:
        line = str(error)
        known = path.name in line or line.startswith("bos_token_id")
        return "refused" if known and len(line) <= 500 and "\n" not in line else f"message: {line}"
    except BaseException:
        return traceback.format_exc()[-1500:]


def run(cases: int, first: int) -> int:
    counts: Counter[str] = Counter()
    bad = 0
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        goods = good_files(Path(folder))
        path = Path(folder) / "case.gguf"
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
        for seed in range(first, first + cases):
            dice = Random(f"gguf {seed}")
            kind, data = mutated(dice, goods[seed % len(goods)])
            path.write_bytes(data)
            started = time.monotonic()
            result = check(path)
            seconds = time.monotonic() - started
            if seconds > SECONDS:
                result = f"{result} in {seconds:.1f} seconds"
            if result not in ("opened", "refused"):
                bad += 1
                print(f"{kind} {seed}: {result}", flush=True)
                result = "bad"
            counts[f"{kind}: {result}"] += 1
    for what in sorted(counts):
        print(f"{what:24}{counts[what]:>8}")
    print(json.dumps({"cases": cases, "bad": bad}))
    return 1 if bad else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first case")
    options = parser.parse_args()
    sys.exit(run(options.cases, options.first))
