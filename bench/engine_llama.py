"""llama.cpp as an engine to compare, through the C interface that llama-cpp-python exposes; default settings."""

from __future__ import annotations

import ctypes

import llama_cpp
import numpy as np
from numpy.typing import NDArray

BATCH = 512  # rows in one pass: llama.cpp's own default


@llama_cpp.llama_log_callback
def _silent(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    """Loading reports every tensor otherwise."""


class Llama:
    """See `worker.Engine`."""

    def __init__(self, path: str, threads: int, room: int) -> None:
        llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        settings = llama_cpp.llama_model_default_params()
        settings.n_gpu_layers = 0
        model = llama_cpp.llama_model_load_from_file(path.encode(), settings)
        if not model:
            raise SystemExit(f"{path}: llama.cpp cannot load this file")
        context = llama_cpp.llama_context_default_params()
        context.n_ctx, context.n_batch, context.n_ubatch = room, BATCH, BATCH
        context.n_threads = context.n_threads_batch = threads
        context.swa_full = True  # sliding layers keep what a rewind needs
        self._context = llama_cpp.llama_init_from_model(model, context)
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self._batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        self._cached = self._kept = 0
        self.version = f"llama.cpp of llama-cpp-python {llama_cpp.__version__}"

    def read(self, tokens: list[int]) -> None:
        llama_cpp.llama_memory_clear(self._memory, True)
        self._cached = 0
        for start in range(0, len(tokens), BATCH):
            chunk = tokens[start : start + BATCH]
            self._run(chunk, wanted=int(start + len(chunk) == len(tokens)))
        self._kept = self._cached

    def extend(self, tokens: list[int]) -> None:
        self._run(tokens, wanted=len(tokens))

    def rewind(self) -> None:
        if not llama_cpp.llama_memory_seq_rm(self._memory, 0, self._kept, -1):
            raise SystemExit("llama.cpp refused to roll back")
        self._cached = self._kept

    def best(self) -> int:
        return int(self._logits[-1].argmax())

    def logits(self) -> NDArray[np.float32]:
        return self._logits

    def _run(self, tokens: list[int], wanted: int) -> None:
        batch, rows = self._batch, len(tokens)
        batch.n_tokens = rows
        for row, token in enumerate(tokens):
            batch.token[row] = token
            batch.pos[row] = self._cached + row
            batch.n_seq_id[row] = 1
            batch.seq_id[row][0] = 0
            batch.logits[row] = row >= rows - wanted
        if code := llama_cpp.llama_decode(self._context, batch):
            raise SystemExit(f"llama.cpp failed with code {code} on {rows} rows at position {self._cached}")
        self._cached += rows
        if wanted:
            logits = llama_cpp.llama_get_logits(self._context)  # waits for the pass
            self._logits = np.ctypeslib.as_array(logits, (wanted, self._vocab_size))


def open_engine(path: str, fmt: str, threads: int, room: int) -> Llama:
    return Llama(path, threads, room)
