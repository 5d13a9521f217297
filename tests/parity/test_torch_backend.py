"""The PyTorch backend on the processor: against transformers, the CPU backend, and bit for bit against itself."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paceline.backends.cuda.load import open_device
from paceline.checkpoint.hub import ASSETS
from paceline.decode.rules import Coupled
from paceline.engine.prefix import PrefixCache
from paceline.engine.scheduler import Scheduler
from paceline.errors import BackendError, PairError
from paceline.types import Sampling
from tests.parity.fixtures import SHAPES, VOCABULARY, WINDOW, write_pair
from tests.parity.test_native import DEPTH, ROWS, Case, anchors, assert_close, case, feed, prompt  # noqa: F401
from tests.property.test_exactness import assert_same, queued
from tests.support import Oracle, Recorder, Run, cpu_backend, run, sequence, torch_backend

TOKENS = 2 * WINDOW
FORMATS = ("f32", "bf16", "q8", "q4")
prompts = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=4 * WINDOW)
anything = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("torch")

    @cache
    def get(shape: str) -> tuple[Path, Path]:
        return write_pair(root / shape, shape, seed=0, head="centroid" if shape.startswith("e") else "dense")

    return get


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 7, ROWS])
def test_logits(case: Case, chunk: int) -> None:  # noqa: F811
    backend = torch_backend(case.target, None, max_rows=ROWS)
    slot = backend.open_slot()
    tokens = prompt()
    parts = [feed(backend, slot, tokens[i : i + chunk], i).logits for i in range(0, ROWS, chunk)]
    assert_close(np.concatenate(parts), case.hf_target(input_ids=torch.from_numpy(tokens).long()[None]).logits[0])


@torch.no_grad()
@pytest.mark.parametrize("draft_tokens", [0, 4])
def test_greedy_text(case: Case, draft_tokens: int) -> None:  # noqa: F811
    tokens = prompt(WINDOW - 3)
    case.hf_target.generation_config = hf.GenerationConfig(do_sample=False, pad_token_id=0)  # and no end token
    ids = torch.from_numpy(tokens).long()[None]
    theirs = case.hf_target.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS)
    backend = torch_backend(case.target, case.drafter)
    (ours,) = run(backend, [sequence(backend, tokens.tolist(), draft_tokens=draft_tokens, max_tokens=TOKENS)], chunk=3)
    assert ours.tokens == theirs[0, len(tokens) :].tolist()


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
        sampling = Sampling(temperature=temperature, top_k=64, top_p=0.95, seed=3)
        drafts.append(backend.draft(type(anchor)(**{**vars(anchor), "samplings": (sampling,)})).settled())
    assert drafts[0].tokens.tolist() == drafts[1].tokens.tolist()
    np.testing.assert_allclose(drafts[0].confidence, drafts[1].confidence, rtol=1e-3)


@pytest.mark.parametrize("quant", FORMATS)
@anything
@given(
    shape=st.sampled_from(SHAPES),
    prompt=prompts,
    depth=st.integers(1, 8),
    chunk=st.integers(1, 32),
    honesty=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
)
def test_drafts_and_chunks_change_nothing(
    folders, quant: str, shape: str, prompt: list[int], depth: int, chunk: int, honesty: float
) -> None:
    backend = torch_backend(*folders(shape), quant)
    (plain,) = run(backend, [sequence(backend, prompt, max_tokens=TOKENS)], chunk=32)
    oracle = Oracle(backend, [*prompt, *plain.tokens], honesty, seed=depth) if honesty else backend
    (drafted,) = run(oracle, [sequence(oracle, prompt, max_tokens=TOKENS, draft_tokens=depth)], chunk)
    assert_same(plain, drafted)


@pytest.mark.parametrize("quant", FORMATS)
@anything
@given(
    shape=st.sampled_from(SHAPES),
    requests=st.lists(st.tuples(prompts, st.integers(0, 8)), min_size=2, max_size=4),
    chunk=st.integers(1, 32),
)
def test_company_changes_nothing(folders, quant: str, shape: str, requests: list[tuple], chunk: int) -> None:
    backend = torch_backend(*folders(shape), quant, slots=4)
    together = run(
        backend, [sequence(backend, prompt, draft_tokens=depth, max_tokens=8) for prompt, depth in requests], chunk
    )
    for (alone, _), mine in zip(requests, together, strict=True):
        assert_same(run(backend, [sequence(backend, alone, max_tokens=8)], chunk=32)[0], mine)


@anything
@given(shape=st.sampled_from(SHAPES), first=prompts, common=st.integers(0, 50), own=prompts, depth=st.integers(0, 8))
def test_rows_taken_over_change_nothing(
    folders, shape: str, first: list[int], common: int, own: list[int], depth: int
) -> None:
    backend = torch_backend(*folders(shape), slots=2)
    scheduler = Scheduler(backend, 16, prefixes=PrefixCache(backend, 1 << 30))
    before = queued(scheduler, first * 3, depth)
    prompt = [*before.tokens[:common], *own]
    for _ in range(2):
        other = queued(scheduler, prompt, depth)
        (expected,) = run(backend, [sequence(backend, prompt, max_tokens=len(other.generated))], chunk=16)
        assert_same(Run(other.generated, np.array(other.rule.rows), other.statistics), expected)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_bundled_pair_writes_what_the_cpu_backend_writes(temperature: float) -> None:
    """In f32, and with the same draws; logits differ by rounding, which decides no token of this text."""
    pair = ASSETS / "tiny-python", ASSETS / "tiny-python-assistant"
    sampling = Sampling(temperature=temperature, top_k=64, top_p=0.95, seed=1)
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
