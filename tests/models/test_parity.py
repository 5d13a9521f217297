"""The models in PyTorch against transformers, on random checkpoints that transformers wrote."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers as hf
from tools.tiny_python.evaluate import greedy
from torch import Tensor

from paceline.backends.torch.weights import CheckpointSource
from paceline.checkpoint import Checkpoint, resolve
from paceline.config import check_pair
from paceline.models import drafter as drafters
from paceline.models import ops
from paceline.models.drafter import Drafter, load_drafter
from paceline.models.gemma4 import Target, embed, load_target, logits
from paceline.train.sequences import Cache, DraftRows, draft, states
from tests.fixtures.pairs import SHAPES, VOCABULARY, WINDOW, Head, write_pair

ROWS = 5 * WINDOW
DEPTH = 5


@dataclass(frozen=True)
class Pair:
    target: Target
    drafter: Drafter
    hf_target: hf.PreTrainedModel
    hf_drafter: hf.PreTrainedModel


@pytest.fixture(scope="module", params=SHAPES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return read_pair(*write_pair(tmp_path_factory.mktemp("pair"), request.param, seed=1, head=head_of(request.param)))


def head_of(shape: str) -> Head:
    return "centroid" if shape in ("e2b", "e4b", "text") else "dense"


def our_pair(target_folder: Path, drafter_folder: Path, fmt: str = "f32") -> tuple[Target, Drafter]:
    checkpoints = Checkpoint.open(target_folder), Checkpoint.open(drafter_folder)
    configs = checkpoints[0].target_config(), checkpoints[1].drafter_config()
    check_pair(*configs)
    tensors = [resolve(checkpoint, config) for checkpoint, config in zip(checkpoints, configs, strict=True)]
    sources = [CheckpointSource(part, fmt, torch.device("cpu")) for part in tensors]
    return load_target(configs[0], sources[0]), load_drafter(configs[1], configs[0], sources[1])


def read_pair(target_folder: Path, drafter_folder: Path) -> Pair:
    target, drafter = our_pair(target_folder, drafter_folder)
    target_class = {
        "gemma4_text": hf.Gemma4ForCausalLM,
        "gemma4": hf.Gemma4ForConditionalGeneration,
        "gemma4_unified": hf.Gemma4UnifiedForConditionalGeneration,
    }[target.config.model_type]
    drafter_class = {
        "gemma4_assistant": hf.Gemma4AssistantForCausalLM,
        "gemma4_unified_assistant": hf.Gemma4UnifiedAssistantForCausalLM,
    }[drafter.config.model_type]
    return Pair(
        target,
        drafter,
        target_class.from_pretrained(target_folder).eval(),
        drafter_class.from_pretrained(drafter_folder).eval(),
    )


def logits_of(target: Target, hidden: Tensor) -> Tensor:
    """[1, T, H] -> [1, T, vocabulary]"""
    return logits(target, ops, hidden[0])[None]


def prompt(rows: int = ROWS, seed: int = 0) -> Tensor:
    return torch.randint(4, VOCABULARY, (1, rows), generator=torch.Generator().manual_seed(seed))


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@torch.no_grad()
def test_logits(pair: Pair) -> None:
    tokens = prompt()
    theirs = pair.hf_target(input_ids=tokens).logits
    assert theirs.std() > 0.5  # a degenerate model would agree with anything
    assert_close(logits_of(pair.target, states(pair.target, tokens)), theirs)


@torch.no_grad()
@pytest.mark.parametrize("chunks", [(1,) * ROWS, (WINDOW + 3, 1, 2 * WINDOW, 5, 1, 6), (ROWS - 1, 1)])
def test_chunks_through_the_cache(pair: Pair, chunks: tuple[int, ...]) -> None:
    tokens = prompt()
    theirs = pair.hf_target(input_ids=tokens).logits
    cache = Cache()
    parts = [states(pair.target, chunk, cache) for chunk in tokens.split(chunks, dim=1)]
    assert cache.length == ROWS
    assert_close(logits_of(pair.target, torch.cat(parts, dim=1)), theirs)


@torch.no_grad()
def test_rollback(pair: Pair) -> None:
    """Rows that were truncated leave no trace."""
    tokens = prompt()
    cache = Cache()
    states(pair.target, tokens[:, : ROWS - 4], cache)
    states(pair.target, prompt(6, seed=1), cache)
    cache.length = ROWS - 4
    hidden = states(pair.target, tokens[:, ROWS - 4 :], cache)
    assert_close(logits_of(pair.target, hidden), pair.hf_target(input_ids=tokens).logits[:, ROWS - 4 :])


@torch.no_grad()
@pytest.mark.parametrize("position", [WINDOW // 2, ROWS])
def test_draft_steps(pair: Pair, position: int) -> None:
    """Logits and hidden state of each draft step, fed back, with transformers shown exactly the visible rows."""
    tokens = prompt(position)
    theirs = pair.hf_target(input_ids=tokens, return_shared_kv_states=True, output_hidden_states=True, use_cache=False)
    seen = {"full_attention": position, "sliding_attention": min(position, WINDOW)}
    shared = {kind: tuple(part[:, :, -seen[kind] :] for part in theirs.shared_kv_states[kind]) for kind in seen}
    hidden = theirs.hidden_states[-1][:, -1:]
    their_embed = pair.hf_target.get_input_embeddings()
    cache = Cache()
    our_hidden = states(pair.target, tokens, cache)[:, -1:]
    assert_close(our_hidden, hidden)
    rows = DraftRows(pair.drafter, cache, torch.tensor([position]))
    token = theirs.logits[0, -1].argmax().view(1, 1)
    for _ in range(DEPTH):
        step = pair.hf_drafter(
            inputs_embeds=torch.cat((their_embed(token), hidden), dim=-1),
            position_ids=torch.tensor([[position]]),
            shared_kv_states=shared,
        )
        state, our_hidden = rows.step(embed(pair.target, token[0])[None], our_hidden)
        hidden = step.last_hidden_state
        assert_close(our_hidden, hidden)
        ours = drafters.logits(pair.drafter, ops, state[0], rows.positions)[None]
        scored = ours > ops.UNSEEN
        assert_close(ours[scored], step.logits[scored])
        # transformers gives tokens outside the chosen centroids one value below all others
        assert torch.all(step.logits[~scored] < ours[scored].min())
        token = step.logits[0].argmax(-1).view(1, 1)


@torch.no_grad()
def test_draft_ignores_stale_rows(pair: Pair) -> None:
    """What a rejected round left in the cache is invisible."""
    tokens = prompt()
    clean, stale = Cache(), Cache()
    hidden = states(pair.target, tokens, clean)[0, -1]
    states(pair.target, tokens, stale)
    states(pair.target, prompt(3, seed=1), stale)
    stale.length = ROWS
    drafts = [draft(pair.target, pair.drafter, cache, 7, hidden, DEPTH) for cache in (clean, stale)]
    assert drafts[0] == drafts[1]


@torch.no_grad()
@pytest.mark.parametrize("with_drafter", [False, True])
def test_greedy_text(pair: Pair, with_drafter: bool) -> None:
    tokens = prompt(WINDOW - 3)
    count = 3 * WINDOW
    pair.hf_target.generation_config = hf.GenerationConfig(do_sample=False, pad_token_id=0)  # and no end token
    theirs = pair.hf_target.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=count)
    assert len(set(theirs[0].tolist())) > 2 * WINDOW  # not one token over and over
    drafter = pair.drafter if with_drafter else None
    ours, _ = greedy(pair.target, drafter, tokens[0].tolist(), count, DEPTH if with_drafter else 0)
    assert ours[:count] == theirs[0, tokens.shape[1] :].tolist()


@pytest.mark.parametrize("shape", ["e2b", "12b", "26b"])
@torch.no_grad()
def test_bfloat16(tmp_path: Path, shape: str) -> None:
    """In bfloat16 the two agree to its rounding, the rounded embedding factor included.

    The median of the rows, for in a few of them rounding decides which expert comes last.
    """
    folders = write_pair(tmp_path, shape, seed=5, head=head_of(shape), dtype=torch.bfloat16)
    target, _ = our_pair(*folders, "bf16")
    theirs = hf.Gemma4UnifiedForConditionalGeneration if shape == "12b" else hf.Gemma4ForConditionalGeneration
    reference = theirs.from_pretrained(folders[0], dtype=torch.bfloat16).eval()
    tokens = prompt()
    assert torch.equal(embed(target, tokens[0]), reference.get_input_embeddings()(tokens)[0])
    ours, expected = logits_of(target, states(target, tokens)), reference(input_ids=tokens).logits.float()
    assert (ours - expected).abs().mean(-1).median() < 0.05 * expected.abs().mean()
