"""The native f32 backend against transformers, on random checkpoints that transformers wrote."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf

from paceline import _cpu
from paceline.backends.base import Backend
from paceline.backends.cpu.weights import choose_formats
from paceline.checkpoint import Checkpoint, resolve
from paceline.quant.recipes import RECIPES
from paceline.types import GREEDY, Draft, Result, Work
from tests.fixtures import reference_formats
from tests.fixtures.backends import all_logits, any_backend, only_native, run, sequence, torch_backend
from tests.fixtures.native import as_stored
from tests.fixtures.pairs import SHAPES, VOCABULARY, WINDOW, _randomise, write_pair
from tests.models.test_parity import head_of, read_pair

ROWS = 5 * WINDOW
DEPTH = 5


@dataclass(frozen=True)
class Case:
    target: Path
    drafter: Path
    hf_target: hf.PreTrainedModel
    hf_drafter: hf.PreTrainedModel


@pytest.fixture(scope="module", params=SHAPES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folders = write_pair(tmp_path_factory.mktemp("native"), request.param, seed=2, head=head_of(request.param))
    theirs = read_pair(*folders)
    return Case(*folders, theirs.hf_target, theirs.hf_drafter)


def prompt(rows: int = ROWS, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, VOCABULARY, rows).astype(np.int32)


def feed(backend: Backend, slot: int, tokens: np.ndarray, start: int = 0) -> np.ndarray:
    """Logits [tokens, vocabulary] of all rows in one pass."""
    return all_logits(backend, slot, tokens.tolist(), start)


def prefill(backend: Backend, slot: int, tokens: np.ndarray, start: int = 0) -> None:
    """Run tokens without sampling."""
    backend.run([Work(slot, start, tokens.tolist())])


def assert_close(ours: np.ndarray, theirs: torch.Tensor) -> None:
    reference = theirs.float().numpy()
    assert np.abs(ours - reference).max() <= 1e-4 * np.abs(reference).max()


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 7, 16])
def test_logits(case: Case, chunk: int) -> None:
    backend = any_backend(case.target, None, max_rows=ROWS)
    slot = backend.open_slot()
    tokens = prompt()
    parts = [feed(backend, slot, tokens[i : i + chunk], i) for i in range(0, ROWS, chunk)]
    theirs = case.hf_target(input_ids=torch.from_numpy(tokens).long()[None]).logits[0]
    assert theirs.std() > 0.5
    assert_close(np.concatenate(parts), theirs)


@torch.no_grad()
def test_rows_that_are_not_sampled(case: Case) -> None:
    """Rows that are not sampled from stop early in the stack; what they leave in the KV cache must be the same."""
    backend = any_backend(case.target, None, max_rows=ROWS)
    slot = backend.open_slot()
    tokens = prompt()
    prefill(backend, slot, tokens[:-1])
    logits = feed(backend, slot, tokens[-1:], ROWS - 1)
    assert_close(logits, case.hf_target(input_ids=torch.from_numpy(tokens).long()[None]).logits[0, -1:])


@torch.no_grad()
def test_rollback_leaves_no_trace(case: Case) -> None:
    backend = any_backend(case.target, None, max_rows=12)
    slot = backend.open_slot()
    tokens = prompt()
    for start in range(0, ROWS, 4):
        prefill(backend, slot, prompt(11, seed=start + 1), start)
        backend.truncate(slot, start)
        logits = feed(backend, slot, tokens[start : start + 4], start)
    assert_close(logits, case.hf_target(input_ids=torch.from_numpy(tokens).long()[None]).logits[0, -4:])


@only_native  # PyTorch's drafts are compared with these
@torch.no_grad()
@pytest.mark.parametrize("position", [WINDOW // 2, ROWS])
def test_draft_steps(case: Case, position: int) -> None:
    """Logits and hidden state of every step, fed back, with transformers shown exactly the visible rows."""
    tokens = prompt(position)
    ids = torch.from_numpy(tokens).long()[None]
    theirs = case.hf_target(input_ids=ids, return_shared_kv_states=True, output_hidden_states=True, use_cache=False)
    rows = {"full_attention": position, "sliding_attention": min(position, WINDOW)}
    shared = {kind: tuple(part[:, :, -rows[kind] :] for part in theirs.shared_kv_states[kind]) for kind in rows}
    hidden = theirs.hidden_states[-1][:, -1:]
    embed = case.hf_target.get_input_embeddings()

    backend = any_backend(case.target, case.drafter, max_rows=ROWS)

    def draft(length: int) -> tuple[Result, np.ndarray, np.ndarray]:
        """A round after the prompt, and the logits and next hidden state of its last draft step."""
        slot = backend.open_slot()
        (first,) = backend.run([Work(slot, 0, tokens.tolist(), GREEDY)])
        assert_close(backend._decoder.hidden(slot), theirs.hidden_states[-1][0, -1])
        (result,) = backend.run([Work(slot, position, first.sampled, GREEDY, Draft(length=length))])
        backend.close_slot(slot)
        return result, *backend._decoder.last_draft_step(0)

    token = int(theirs.logits[0, -1].argmax())
    whole, *_ = draft(DEPTH)
    for step in range(DEPTH):
        reference = case.hf_drafter(
            inputs_embeds=torch.cat((embed(torch.tensor([[token]])), hidden), dim=-1),
            position_ids=torch.tensor([[position]]),
            shared_kv_states=shared,
        )
        result, logits, next_hidden = draft(step + 1)
        hidden = reference.last_hidden_state
        assert_close(next_hidden, hidden[0, 0])
        scored = logits > -1e38
        assert_close(logits[scored], reference.logits[0, 0][torch.from_numpy(scored)])
        token = int(reference.logits[0, 0].argmax())
        assert result.drafted[step] == token == whole.drafted[step]
        shares = np.exp(logits[scored] - logits[scored].max())
        assert result.confidence[step] == pytest.approx(shares.max() / shares.sum(), rel=1e-4)
        assert whole.confidence[step] == result.confidence[step]


@torch.no_grad()
@pytest.mark.parametrize("draft_tokens", [0, 4])
def test_greedy_text(case: Case, draft_tokens: int) -> None:
    tokens = prompt(WINDOW - 3)
    count = 3 * WINDOW
    case.hf_target.generation_config = hf.GenerationConfig(do_sample=False, pad_token_id=0)  # and no end token
    ids = torch.from_numpy(tokens).long()[None]
    theirs = case.hf_target.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count)
    backend = any_backend(case.target, case.drafter, max_rows=16)
    settings = {"draft_tokens": draft_tokens, "max_tokens": count}
    (ours,) = run(backend, [sequence(backend, tokens.tolist(), **settings)], chunk=3)
    assert ours.tokens == theirs[0, len(tokens) :].tolist()


@pytest.mark.parametrize("shape", ["e2b", "26b"])
def test_bfloat16_checkpoints(tmp_path: Path, shape: str) -> None:
    """Official files are bf16: their embedding factors are rounded to bf16 too."""
    target, _ = write_pair(tmp_path, shape, seed=3, dtype=torch.bfloat16)
    reference = hf.Gemma4ForConditionalGeneration.from_pretrained(target, dtype=torch.bfloat16).eval()
    exact = reference.float()  # bf16 weights and factors, f32 arithmetic
    tokens = prompt()
    with torch.no_grad():
        theirs = exact(input_ids=torch.from_numpy(tokens).long()[None]).logits[0]
    backend = any_backend(target, None, max_rows=ROWS)
    ours = feed(backend, backend.open_slot(), tokens)
    assert np.abs(ours - theirs.numpy()).max() <= 2e-3 * np.abs(theirs.numpy()).max()


@torch.no_grad()
@pytest.mark.parametrize(
    "odd",
    [
        {"hidden_size_per_layer_input": 512, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 16},
        {"hidden_size_per_layer_input": 48, "hidden_size": 80, "intermediate_size": 72, "head_dim": 48},
        {"vocab_size": 497, "vocab_size_per_layer_input": 497, "sliding_window": 1, "intermediate_size": 20},
        {"tie_word_embeddings": False},
    ],
    ids=["wide per-layer embeddings", "odd widths", "odd vocabulary, window of one", "a head of its own"],
)
def test_odd_shapes(tmp_path: Path, odd: dict) -> None:
    settings = {
        "vocab_size": VOCABULARY,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size": 64,
        "hidden_size_per_layer_input": 32,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "global_head_dim": 16,
        "sliding_window": WINDOW,
    }
    torch.manual_seed(0)
    model = hf.Gemma4ForCausalLM(hf.Gemma4TextConfig(**{**settings, **odd})).eval()
    _randomise(model)
    model.save_pretrained(tmp_path)
    tokens = prompt() % 497
    theirs = model(input_ids=torch.from_numpy(tokens).long()[None]).logits[0]
    for chunk, make in ((1, any_backend), (7, any_backend), (16, any_backend), (16, torch_backend)):
        backend = make(tmp_path, None, max_rows=ROWS, **({} if make is torch_backend else {"threads": 2}))
        slot = backend.open_slot()
        parts = [feed(backend, slot, tokens[i : i + chunk], i) for i in range(0, ROWS, chunk)]
        assert_close(np.concatenate(parts), theirs)


@only_native
@pytest.mark.parametrize("isa", _cpu.usable_isas())
@pytest.mark.parametrize("quant", RECIPES)
def test_logits_are_exact_integer_sums(tmp_path: Path, quant: str, isa: str) -> None:
    """From the hidden states on, logits are exact integer sums in q8 and q4, up to float rounding."""
    target, _ = write_pair(tmp_path, "e2b", seed=5)
    checkpoint = Checkpoint.open(target)
    config = checkpoint.target_config()
    table = resolve(checkpoint, config)["embed_tokens.weight"].read()
    backend = any_backend(target, None, quant, max_rows=ROWS, isa=isa)
    slot, logits, hidden = backend.open_slot(), [], []
    for position, token in enumerate(prompt().tolist()):
        logits.append(feed(backend, slot, np.array([token]), position)[0])
        hidden.append(backend._decoder.hidden(slot))
    fmt = choose_formats(config, quant, lambda _: "F32")["embed_tokens.weight"]
    product = reference_formats.product(as_stored(table, fmt), np.array(hidden), fmt)
    expected = config.softcap * np.tanh(product / config.softcap) if config.softcap else product
    assert np.abs(np.array(logits) - expected).max() <= 2e-6 * np.abs(expected).max()
