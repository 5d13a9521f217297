"""What a device can do: the limits that figures are compared with."""

from __future__ import annotations

import statistics
import time

import torch

BYTES = 1 << 28  # more than any cache
COPIES = 16


class CopyBandwidth:
    """Bandwidth of copies within a device's memory; measure it several times during a run and take the median.

    Args:
        device: whose memory.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._from = torch.ones(BYTES, dtype=torch.uint8, device=device)
        self._to = torch.empty_like(self._from)
        self.seen: list[float] = []  # GB/s, read and written

    def measure(self) -> float:
        """Bandwidth of one copy, in GB/s of bytes read and written."""
        self._wait()
        start = time.perf_counter()
        for _ in range(COPIES):
            self._to.copy_(self._from)
        self._wait()
        self.seen.append(COPIES * 2 * BYTES / (time.perf_counter() - start) / 1e9)
        return self.seen[-1]

    @property
    def median(self) -> float:
        return statistics.median(self.seen)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def device_name(device: torch.device) -> str:
    """The device's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def peak_memory(device: torch.device) -> int | None:
    """Most bytes of the device's memory held at a time; None where PyTorch does not count them."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def software() -> str:
    """Versions that figures depend on."""
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = "none"
    return f"torch {torch.__version__}, CUDA {torch.version.cuda}, Triton {triton}"
