"""ik_llama.cpp with weights that it repacks at load: its option -rtr."""

from __future__ import annotations

from engine_ik import IkLlama


def open_engine(path: str, fmt: str, threads: int, room: int) -> IkLlama:
    return IkLlama(path, threads, room, repacked=True)
