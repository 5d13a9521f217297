"""llama.cpp as an engine to compare, through the C interface that llama-cpp-python exposes."""

from __future__ import annotations

import ctypes

import llama_cpp
from llama_api import LlamaEngine


@llama_cpp.llama_log_callback
def _silent(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    """Loading reports every tensor otherwise."""


class Llama(LlamaEngine):
    def __init__(self, path: str, threads: int, room: int) -> None:
        llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        settings = llama_cpp.llama_model_default_params()
        settings.n_gpu_layers = 0
        model = llama_cpp.llama_model_load_from_file(path.encode(), settings)
        if not model:
            raise SystemExit(f"{path}: llama.cpp cannot load this file")
        context = llama_cpp.llama_context_default_params()
        context.swa_full = True  # sliding layers keep what a rewind needs
        super().__init__(llama_cpp, model, context, threads, room)
        self._memory = llama_cpp.llama_get_memory(self._context)
        self.version = f"llama.cpp of llama-cpp-python {llama_cpp.__version__}"

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(self._memory, True)

    def remove(self, first: int) -> bool:
        return bool(llama_cpp.llama_memory_seq_rm(self._memory, 0, first, -1))


def open_engine(path: str, fmt: str, threads: int, room: int) -> Llama:
    return Llama(path, threads, room)
