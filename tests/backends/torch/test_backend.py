"""The PyTorch backend beside the CPU backend. PACELINE_TEST_DEVICE runs the tests of parity and exactness on it."""

from __future__ import annotations

import numpy as np
import pytest

from paceline.backends.torch.load import open_device
from paceline.checkpoint.location import ASSETS
from paceline.errors import BackendError, PairError
from paceline.types import GREEDY, Draft, SamplingParams, Work
from tests.fixtures.backends import cpu_backend, run, sequence, torch_backend
from tests.fixtures.pairs import WINDOW
from tests.parity.test_transformers import DEPTH, ROWS, Case, case, prompt  # noqa: F401


@pytest.mark.parametrize("position", [WINDOW // 2, ROWS])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafts_are_the_cpu_backends(case: Case, position: int, temperature: float) -> None:  # noqa: F811
    tokens = prompt(position).tolist()
    params = SamplingParams(temperature=temperature, top_k=64, top_p=0.95, seed=3)
    rounds = []
    for make in (cpu_backend, torch_backend):
        backend = make(case.target, case.drafter, max_rows=ROWS)
        slot = backend.open_slot()
        (first,) = backend.run([Work(slot, 0, tokens, params)])
        rounds += backend.run([Work(slot, position, [*first.sampled], params, Draft(length=DEPTH))])
    assert len(rounds[0].drafted) == DEPTH
    assert rounds[0].drafted == rounds[1].drafted
    assert rounds[0].sampled == rounds[1].sampled
    np.testing.assert_allclose(rounds[0].confidence, rounds[1].confidence, rtol=1e-3)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_bundled_pair_writes_what_the_cpu_backend_writes(temperature: float) -> None:
    """In f32, and with the same noise; logits differ by rounding, which decides no token of this text."""
    pair = ASSETS / "tiny-python", ASSETS / "tiny-python-assistant"
    params = SamplingParams(temperature=temperature, top_k=64, top_p=0.95, seed=1)
    texts, lengths = [], []
    for make in (cpu_backend, torch_backend):
        backend = make(*pair, "f32", context=256)
        one = sequence(backend, [2, *range(300, 340)], params=params, draft_tokens=4, max_tokens=40)
        (written,) = run(backend, [one], 32)
        texts.append(written.tokens)
        lengths.append(written.statistics.acceptance_length)
    assert texts[0] == texts[1]
    assert lengths[0] == lengths[1] > 1


def test_rows_sampled_on_the_device_and_on_the_host(folders) -> None:
    """A step of both kinds, in several passes, gives what each work gives alone."""

    class Nothing:
        """A constraint, so that rows are sampled on the host."""

        def __init__(self) -> None:
            self.committed: list[int] = []

        def apply(self, logits: np.ndarray) -> None:
            assert len(logits) == 512

        def commit(self, token: int) -> None:
            self.committed.append(token)

    params = [
        SamplingParams(0.9, top_k=40, seed=1),
        SamplingParams(1.0, top_p=0.9, seed=2),  # a nucleus of the whole vocabulary: on the host
        GREEDY,
    ]
    backend = torch_backend(*folders("e2b"), slots=3)
    slots = [backend.open_slot() for _ in params]
    tokens = prompt(24).tolist()
    backend.run([Work(slot, 0, tokens) for slot in slots])  # 72 rows, in passes of 16

    def works(length: int = 6) -> list[Work]:
        drafts = [Draft(tuple(tokens[:length])), Draft(tuple(tokens[length : 2 * length]), simulated=3), Draft()]
        given = zip(slots, params, drafts, strict=True)
        return [Work(slot, 24, [7], p, draft, logits=draft.simulated is None) for slot, p, draft in given]

    def again(works: list[Work]) -> list:
        for slot in slots:
            backend.truncate(slot, 24)
        return backend.run(works)

    together = backend.run(works())
    assert [len(result.sampled) for result in together][1:] == [4, 1]
    assert [len(result.drafted) for result in together] == [6, 6, 0]
    for work, expected in zip(works(), together, strict=True):
        (alone,) = again([work])
        assert alone.sampled == expected.sampled
        assert (alone.logits is None) == (expected.logits is None) == (work.draft.simulated is not None)
        if alone.logits is not None:
            assert np.array_equal(alone.logits.view(np.uint32), expected.logits.view(np.uint32))
        if work.draft.simulated is None:
            constraint = Nothing()
            (on_host,) = again([Work(work.slot, 24, [7], work.params, work.draft, constraint)])
            assert constraint.committed == list(on_host.sampled) == list(expected.sampled)


def test_what_cannot_be_done_is_refused(folders) -> None:
    backend = torch_backend(*folders("e2b"), max_rows=16)
    slot = backend.open_slot()
    for start in range(0, 96, 16):
        backend.run([Work(slot, start, prompt(16).tolist())])
    with pytest.raises(BackendError, match="sliding rings hold only"):
        backend.truncate(slot, 20)
    with pytest.raises(BackendError, match="cannot truncate"):
        backend.truncate(slot, 200)
    for work, message in (
        (Work(slot, 95, [1]), "cannot continue at position 95"),
        (Work(slot + 1, 0, [1]), "cannot continue"),
        (Work(slot, 96, [1] * 33), "do not fit a context of 128"),
        (Work(slot, 96, [1] * 17), "17 rows"),
        (Work(slot, 96, []), "0 rows"),
        (Work(slot, 96, [1], GREEDY, Draft(tuple(range(16)))), "17 rows"),
        (Work(slot, 96, [1], GREEDY, Draft(length=16)), "17 rows"),
        (Work(slot, 96, [1], GREEDY, Draft(length=3)), "no sampled token to draft after"),
    ):
        with pytest.raises(BackendError, match=message):
            backend.run([work])
    with pytest.raises(BackendError, match="two works of one slot"):
        backend.run([Work(slot, 96, [1])] * 2)
    with pytest.raises(BackendError, match="cannot use the device 'nowhere'"):
        open_device("nowhere")
    with pytest.raises(PairError):
        torch_backend(folders("e2b")[0], folders("31b")[1])
