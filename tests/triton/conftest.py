"""Everything here runs Triton's interpreter, on the processor: `TRITON_INTERPRET=1 pytest tests/triton`."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def kernels() -> None:
    from paceline.backends.cuda import kernels

    kernels.install("cpu")
