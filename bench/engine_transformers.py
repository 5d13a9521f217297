"""transformers as an engine to compare: PyTorch on the CPU, bf16, its default attention and dynamic cache."""

from __future__ import annotations

import copy

import numpy as np
import torch
import transformers
from numpy.typing import NDArray


class Transformers:
    """See `worker.Engine`."""

    def __init__(self, folder: str, threads: int) -> None:
        torch.set_num_threads(threads)
        transformers.logging.disable_progress_bar()
        self._model = transformers.Gemma4ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        self.version = f"transformers {transformers.__version__}, torch {torch.__version__}"

    def read(self, tokens: list[int]) -> None:
        self._cache = transformers.DynamicCache(config=self._model.config)
        self._run(tokens, wanted=1)
        self._kept = _fork(self._cache)

    def extend(self, tokens: list[int]) -> None:
        self._run(tokens, wanted=len(tokens))

    def rewind(self) -> None:
        self._cache = _fork(self._kept)

    def best(self) -> int:
        return int(self._logits[-1].argmax())

    def logits(self) -> NDArray[np.float32]:
        return self._logits.float().numpy()

    @torch.inference_mode()
    def _run(self, tokens: list[int], wanted: int) -> None:
        ids = torch.tensor([tokens])
        self._logits = self._model(input_ids=ids, past_key_values=self._cache, logits_to_keep=wanted).logits[0]


def _fork(cache: transformers.DynamicCache) -> transformers.DynamicCache:
    """A cache that can go its own way. Updates make new tensors, so sharing the present ones is safe; sliding layers
    refuse `crop` once their window has moved."""
    fork = copy.copy(cache)
    fork.layers = [copy.copy(layer) for layer in cache.layers]
    return fork


def open_engine(path: str, fmt: str, threads: int, room: int) -> Transformers:
    if fmt != "bf16":
        raise SystemExit(f"transformers is compared in bf16 only, not in {fmt}")
    return Transformers(path, threads)
