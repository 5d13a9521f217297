"""Shared fixtures. Caches (packed weights, costs) are kept apart from the user's own."""

import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # in the background of a shell; child processes would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

SLOW = ("bench", "cli", "models", "parity", "property", "server", "tools", "backends/torch")  # whole folders


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is not in the fast lane (`make check`); single tests are marked where they are."""
    root = Path(__file__).parent
    for item in items:
        if item.path.relative_to(root).as_posix().startswith(SLOW):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def _cache_folder() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PACELINE_CACHE"] = folder
        yield


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Random checkpoints of a pair by shape, written once."""
    from tests.fixtures.pairs import write_pair  # transformers takes a while to import

    root = tmp_path_factory.mktemp("folders")

    @cache
    def get(shape: str) -> tuple[Path, Path]:
        return write_pair(root / shape, shape, seed=0, head="centroid" if shape.startswith("e") else "dense")

    return get
