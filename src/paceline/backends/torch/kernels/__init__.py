"""The operations of `ops` as Triton kernels. Importing this needs Triton."""

from __future__ import annotations

from paceline.backends.torch import ops
from paceline.backends.torch.kernels import attention, head, matmul, rows, sampler

KERNELS = (
    (ops.norm, rows.norm),
    (ops.join, rows.join),
    (ops.gated, rows.gated),
    (ops.choose, rows.choose),
    (ops.matmul, matmul.matmul),
    (ops.scores, matmul.scores),
    (ops.gate_up, matmul.gate_up),
    (ops.experts, matmul.experts),
    (ops.heads, attention.heads),
    (ops.attend, attention.attend),
    (ops.centroid_scores, head.centroid_scores),
    (ops.sample, sampler.sample),
)


def install(device: str) -> None:
    """Use the kernels on a kind of device."""
    for operation, kernel in KERNELS:
        operation.register_kernel(device)(kernel)
