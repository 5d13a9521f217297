"""Reads the headers of safetensors files.

The format is 8 bytes of little-endian header length, a JSON header, then the tensors' bytes side by side
(https://huggingface.co/docs/safetensors, "Format"). The safetensors package checks files, but does not read them: its
NumPy side cannot give bf16, nor the file offsets needed to map a table or to pack a large matrix a slice at a time.
"""

from __future__ import annotations

import json
from pathlib import Path

import safetensors

from paceline.checkpoint.tensors import TensorRef
from paceline.errors import CheckpointError, translated
from paceline.files import MAX_JSON_BYTES


def read_header(path: Path) -> dict[str, TensorRef]:
    """List a file's tensors in the order of the file. The safetensors library checks that they cover the whole file.

    Raises:
        CheckpointError: no such file, not safetensors, truncated, or tensors that overlap or leave gaps.
    """
    try:
        with path.open("rb") as file:
            prefix = file.read(8)
            if prefix.startswith(b"version "):
                raise CheckpointError(
                    f"{path}: is a Git LFS pointer, not the weights; run `git lfs pull` in its folder"
                )
            length = int.from_bytes(prefix, "little")
            with translated(CheckpointError, f"{path}: is damaged or truncated ({{reason}}); download it again"):
                if length > MAX_JSON_BYTES:
                    raise ValueError(f"a header of {length} bytes")
                with safetensors.safe_open(path, "np"):
                    entries = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); download it") from error
    entries.pop("__metadata__", None)
    refs = []
    for name, entry in entries.items():
        begin, end = entry["data_offsets"]
        refs.append(TensorRef(name, entry["dtype"], tuple(entry["shape"]), path, 8 + length + begin, end - begin))
    return {ref.name: ref for ref in sorted(refs, key=lambda ref: ref.offset)}
