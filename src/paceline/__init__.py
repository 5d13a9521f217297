"""paceline: Gemma 4 with its MTP drafters, the target's own text at several tokens a pass.

>>> engine = paceline.load("tiny-python")
>>> for event in engine.stream("def fibonacci(n):", raw=True):
...     print(event.text, end="")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paceline.build import load as load
    from paceline.engine.async_engine import AsyncEngine as AsyncEngine
    from paceline.engine.engine import Engine as Engine
    from paceline.engine.stream import Stream as Stream
    from paceline.sampling_params import SamplingParams as SamplingParams

__version__ = "0.1.0"
__all__ = ["AsyncEngine", "Engine", "SamplingParams", "Stream", "__version__", "load"]

_HOMES = {
    "load": "paceline.build",
    "Engine": "paceline.engine.engine",
    "AsyncEngine": "paceline.engine.async_engine",
    "Stream": "paceline.engine.stream",
    "SamplingParams": "paceline.sampling_params",
}


def __getattr__(name: str) -> Any:
    """Load the heavy modules on first use, so that `paceline --help` is instant."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'paceline' has no attribute {name!r}")
