"""Layers with feed-forward widths of their own."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.fixtures.backends import all_logits, any_backend, torch_backend
from tests.fixtures.checkpoints import PREFIX, TARGET, changed, target_weights, write


@pytest.mark.parametrize("make", [any_backend, torch_backend])
def test_padding_changes_nothing(tmp_path: Path, make: Any) -> None:
    """A layer padded with zeros, as fine-tunes are to please other programs, computes what it did."""
    weights = target_weights()
    padded = dict(weights)
    for layer, width in ((0, 96), (4, 192)):  # the last one is double-wide already
        for part in ("gate_proj", "up_proj", "down_proj"):
            name = f"{PREFIX}layers.{layer}.mlp.{part}.weight"
            more = width - max(weights[name].shape)
            padded[name] = np.pad(weights[name], ((0, 0), (0, more)) if part == "down_proj" else ((0, more), (0, 0)))
    widths = {"00": {"intermediate_size": 96}, "4": {"intermediate_size": 192}}
    folders = {"plain": (TARGET, weights), "padded": (changed(TARGET, per_layer_config=widths), padded)}
    logits = []
    for name, given in folders.items():
        backend = make(write(tmp_path / name, *given), None, max_rows=16)
        logits.append(all_logits(backend, backend.open_slot(), list(range(5, 30))))
    assert logits[0].std() > 0.1
    assert np.abs(logits[0] - logits[1]).max() <= 1e-5 * np.abs(logits[0]).max()
