"""Passes are fixed sequences of operations: what a CUDA graph needs, shown without one.

A pass is traced once, and the trace, in which everything that does not depend on a tensor's contents has become a
constant, serves all later passes of that shape. On tensors without contents a pass that looked into them, or mixed
devices, would fail.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from paceline.backends.torch.backend import TorchBackend
from paceline.backends.torch.cuda_graphs import Recorder
from paceline.backends.torch.device_sampler import COLUMNS
from paceline.backends.torch.weights import RandomSource
from paceline.bench.shapes import official_drafter, official_target
from paceline.errors import BackendError
from paceline.types import Int32, SamplingParams
from tests.fixtures.backends import run, sequence, torch_backend
from tests.fixtures.pairs import SHAPES, VOCABULARY


class Tracer(Recorder):
    """Replays traces, as a CUDA device replays graphs."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.traces: dict = {}
        self.replays = 0

    def run(self, key: object, program: object, words: Int32) -> tuple:
        given = torch.from_numpy(words.copy())
        if key not in self.traces:
            with torch.inference_mode(False), torch.no_grad():
                self.traces[key] = make_fx(program)(given)
        else:
            self.replays += 1
        return self.traces[key](given)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("quant", ["bf16", "q4"])
def test_one_recording_serves_all_passes(folders, shape: str, quant: str) -> None:
    backend = torch_backend(*folders(shape), quant, slots=4)
    params = SamplingParams(temperature=0.8, top_k=50, seed=3)

    def texts() -> list:
        rng = np.random.default_rng(0)
        jobs = [
            sequence(backend, rng.integers(0, VOCABULARY, n).tolist(), params=params, draft_tokens=depth, max_tokens=8)
            for n, depth in ((5, 3), (30, 2), (5, 3), (30, 2))
        ]
        return run(backend, jobs[:2], chunk=16) + run(backend, jobs[2:], chunk=16)

    expected = texts()
    backend._recorder = tracer = Tracer()
    for ours, theirs in zip(texts(), expected, strict=True):
        assert ours.tokens == theirs.tokens
        assert np.array_equal(ours.logits.view(np.uint32), theirs.logits.view(np.uint32))
    assert len(tracer.traces) < tracer.replays


def test_what_a_device_cannot_do_is_said() -> None:
    with pytest.raises(BackendError, match=r"PyTorch cannot run this on meta .*; use --device cpu"):
        Recorder(torch.device("meta")).fetch(torch.zeros(3, dtype=torch.int32, device="meta"))


@pytest.mark.parametrize("shape", ["e2b", "e4b", "12b", "26b", "31b"])
@pytest.mark.parametrize("quant", ["bf16", "q8", "q4"])
def test_a_pass_looks_into_no_tensor_and_stays_on_its_device(shape: str, quant: str) -> None:
    """In the official shapes, whose weights would not fit here."""
    target, drafter = official_target(shape), official_drafter(shape)
    device = torch.device("meta")
    with torch.inference_mode():
        backend = TorchBackend(
            (target, RandomSource(target, quant, device)),
            (drafter, RandomSource(drafter, quant, device)),
            quant=quant,
            context=4096,
            slots=2,
        )
        for count, width in ((16, 16), (64, 16), (256, 0)):
            words = torch.zeros(4 * count + (3 + COLUMNS) * width, dtype=torch.int32, device=device)
            found = backend._target_program(count, width, 1024, rank=True)(words)
            assert all(part.device.type == "meta" for part in found)
            if width:
                assert [part.shape for part in found] == [(width + 2 * 16 * 15,), (width, target.vocab_size)]
        assert backend._states.shape == (2 * 256 + 1, target.hidden_size)
        words = torch.zeros(16 * (4 + COLUMNS), dtype=torch.int32, device=device)
        assert backend._drafter_program(16, 3, 1024, rank=True)(words) == ()
