"""Kernels in Triton's interpreter: `TRITON_INTERPRET=1 pytest tests/backends/torch/interpreted`."""

import os
from importlib.util import find_spec

import pytest

if os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def kernels() -> None:
    from paceline.backends.torch import kernels

    kernels.install("cpu")
