"""Memory that glibc keeps for itself: given back after large requests. Other C libraries are left alone."""

from __future__ import annotations

import ctypes
import threading

M_ARENA_MAX = -8  # malloc.h
ARENAS = 2  # by default eight per core, each of which keeps what its threads once needed

_trimming = threading.Lock()


def limit_arenas() -> None:
    """Have all threads share a few arenas. Call it before there are threads."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_ARENA_MAX, ARENAS)


def give_back() -> None:
    """Give free memory back to the system; done by one thread at a time, and without the interpreter's lock."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim and _trimming.acquire(blocking=False):
        try:
            trim(ctypes.c_size_t(0))
        finally:
            _trimming.release()
