"""Which pack file belongs to a checkpoint: a folder of packed weights, kept between starts.

One file for each source folder and format; it carries a fingerprint of the source, so a changed checkpoint is noticed
and its file replaced.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from paceline.backends.cpu.packfile import VERSION
from paceline.checkpoint import Checkpoint
from paceline.files import cache_folder

LEAST_BYTES = 64 << 20  # smaller models are packed in no time


def pack_path(checkpoint: Checkpoint, quant: str) -> Path:
    """Where the packed weights of a checkpoint are kept."""
    source = hashlib.sha256(str(checkpoint.path.resolve()).encode()).hexdigest()[:12]
    return cache_folder() / f"{checkpoint.path.name}-{quant}-{source}.pack"


def fingerprint(checkpoint: Checkpoint, quant: str) -> str:
    """A hash of everything packed weights depend on: file sizes and times, tensor places, settings, layout version."""
    files = {str(path): path.stat() for path in sorted({ref.path for ref in checkpoint.tensors.values()})}
    about = {
        "version": VERSION,
        "quant": quant,
        "config": dict(checkpoint.config),
        "files": {name: [status.st_size, status.st_mtime_ns] for name, status in files.items()},
        "tensors": {name: [ref.dtype, ref.shape, ref.offset] for name, ref in checkpoint.tensors.items()},
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
