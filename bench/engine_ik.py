"""ik_llama.cpp as an engine to compare, through the C interface that ik-llama-cpp-python exposes."""

from __future__ import annotations

import ctypes
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ik_llama_cpp._ctypes_api as api
from llama_api import LlamaEngine

# What the package does not declare.
_remove = api._lib.llama_kv_cache_seq_rm
_remove.argtypes, _remove.restype = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32], ctypes.c_bool
_get_logits = api._lib.llama_get_logits
_get_logits.argtypes, _get_logits.restype = [ctypes.c_void_p], ctypes.POINTER(ctypes.c_float)
_set_log = api._lib.llama_log_set
CPUINFO = Path("/proc/cpuinfo")
LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


@LOG
def _silent(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    """Loading reports every tensor otherwise."""


class IkLlama(LlamaEngine):
    def __init__(self, path: str, threads: int, room: int, repacked: bool) -> None:
        _set_log(_silent, ctypes.c_void_p(0))
        api.llama_backend_init()
        settings = api.llama_model_default_params()
        settings.n_gpu_layers = 0
        settings.repack_tensors = repacked
        settings.use_mmap = not repacked
        model = api.llama_model_load_from_file(path.encode(), settings)
        if not model:
            raise SystemExit(f"{path}: ik_llama.cpp cannot load this file")
        context = api.llama_context_default_params()
        # As the package has it; but it ends in an assertion without AVX-VNNI, and where repacked weights give NaN.
        context.flash_attn = not repacked and "avx_vnni" in CPUINFO.read_text()
        super().__init__(api, model, context, threads, room)
        how = ", weights repacked at load" if repacked else ""
        self.version = f"ik_llama.cpp of ik-llama-cpp-python {version('ik-llama-cpp-python')}{how}"

    def clear(self) -> None:
        api.llama_kv_cache_clear(self._context)

    def remove(self, first: int) -> bool:
        return bool(_remove(self._context, 0, first, -1))

    def get_logits(self) -> Any:
        return _get_logits(self._context)


def open_engine(path: str, fmt: str, threads: int, room: int) -> IkLlama:
    return IkLlama(path, threads, room, repacked=False)
