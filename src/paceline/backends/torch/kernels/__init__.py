"""The operations of `ops` as Triton kernels. Importing this needs Triton."""

from __future__ import annotations

from paceline.backends.torch import ops
from paceline.backends.torch.kernels import attention, head, matmul, rows, sampler

KERNELS = {
    rows: ("norm", "join", "gated", "choose"),
    matmul: ("matmul", "scores", "gate_up", "experts"),
    attention: ("heads", "attend"),
    head: ("centroid_scores",),
    sampler: ("sample",),
}


def install(device: str) -> None:
    """Use the kernels on a kind of device."""
    for module, names in KERNELS.items():
        for name in names:
            getattr(ops, name).register_kernel(device)(getattr(module, name))
