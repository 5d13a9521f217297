"""The PyTorch backend beside the CPU backend. PACELINE_TEST_DEVICE runs the tests of parity and exactness on it."""

from __future__ import annotations

import numpy as np
import pytest

from paceline.backends.torch.load import open_device
from paceline.checkpoint.hub import ASSETS
from paceline.decode.rules import Coupled
from paceline.errors import BackendError, PairError
from paceline.types import SamplingParams
from tests.parity.fixtures import WINDOW
from tests.parity.test_native import DEPTH, ROWS, Case, anchors, assert_close, case, feed, prompt  # noqa: F401
from tests.support import Recorder, cpu_backend, run, sequence, torch_backend


@pytest.mark.parametrize("position", [WINDOW // 2, ROWS])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafts_are_the_cpu_backends(case: Case, position: int, temperature: float) -> None:  # noqa: F811
    """The native drafter is compared with transformers step by step; here this one is compared with it."""
    tokens = prompt(position)
    drafts = []
    for backend in (
        cpu_backend(case.target, case.drafter, max_rows=ROWS),
        torch_backend(case.target, case.drafter, max_rows=ROWS),
    ):
        slot = backend.open_slot()
        output = feed(backend, slot, tokens)
        at = np.array([slot], np.int32), np.array([position], np.int32)
        anchor = anchors(at, int(np.asarray(output.logits[-1]).argmax()), output.hidden[-1:].copy(), DEPTH)
        sampling = SamplingParams(temperature=temperature, top_k=64, top_p=0.95, seed=3)
        drafts.append(backend.draft(type(anchor)(**{**vars(anchor), "samplings": (sampling,)})).settled())
    assert drafts[0].tokens.tolist() == drafts[1].tokens.tolist()
    np.testing.assert_allclose(drafts[0].confidence, drafts[1].confidence, rtol=1e-3)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_bundled_pair_writes_what_the_cpu_backend_writes(temperature: float) -> None:
    """In f32, and with the same draws; logits differ by rounding, which decides no token of this text."""
    pair = ASSETS / "tiny-python", ASSETS / "tiny-python-assistant"
    sampling = SamplingParams(temperature=temperature, top_k=64, top_p=0.95, seed=1)
    texts, lengths = [], []
    for backend in (cpu_backend(*pair, "f32", context=256), torch_backend(*pair, context=256)):
        rule = Recorder(Coupled(sampling, backend.draw))
        (one,) = run(backend, [sequence(backend, [2, *range(300, 340)], rule=rule, draft_tokens=4, max_tokens=40)], 32)
        texts.append(one.tokens)
        lengths.append(one.statistics.acceptance_length)
    assert texts[0] == texts[1]
    assert lengths[0] == lengths[1] > 1


def test_what_cannot_be_done_is_refused(folders) -> None:
    backend = torch_backend(*folders("e2b"), max_rows=16)
    slot = backend.open_slot()
    for start in range(0, 96, 16):
        feed(backend, slot, prompt(16), start)
    with pytest.raises(BackendError, match="sliding rings hold only"):
        backend.truncate(slot, 20)
    with pytest.raises(BackendError, match="cannot truncate"):
        backend.truncate(slot, 500)
    with pytest.raises(BackendError, match="position 90 where 96 follows"):
        feed(backend, slot, prompt(3), 90)
    with pytest.raises(BackendError, match="more than 16 rows"):
        feed(backend, slot, prompt(17), 96)
    with pytest.raises(BackendError, match="cannot use the device 'nowhere'"):
        open_device("nowhere")
    with pytest.raises(PairError):
        torch_backend(folders("e2b")[0], folders("31b")[1])
