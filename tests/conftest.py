"""Nothing that tests keep between starts (packed weights, measured costs) mixes with the user's own."""

import os
import tempfile
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def _cache_folder() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PACELINE_CACHE"] = folder
        yield
