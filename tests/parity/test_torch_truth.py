"""The readable truth against transformers, on random checkpoints that transformers wrote."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import Tensor

from paceline.config import check_pair, drafter_config, target_config
from paceline.errors import CheckpointError
from paceline.models.drafter import Drafter, draft, load_drafter
from paceline.models.gemma4 import Cache, Gemma4, load_target, official_state
from paceline.train.evaluate import greedy
from tests.parity.fixtures import SHAPES, VOCABULARY, WINDOW, Head, read_config, write_pair

ROWS = 5 * WINDOW
DEPTH = 5


@dataclass(frozen=True)
class Pair:
    target: Gemma4
    drafter: Drafter
    hf_target: hf.PreTrainedModel
    hf_drafter: hf.PreTrainedModel


@pytest.fixture(scope="module", params=SHAPES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return read_pair(*write_pair(tmp_path_factory.mktemp("pair"), request.param, seed=1, head=head_of(request.param)))


def head_of(shape: str) -> Head:
    return "centroid" if shape in ("e2b", "e4b", "text") else "dense"


def read_pair(target_folder: Path, drafter_folder: Path) -> Pair:
    target = Gemma4(target_config(read_config(target_folder)))
    load_target(target, load_file(target_folder / "model.safetensors"))
    drafter = Drafter(drafter_config(read_config(drafter_folder)))
    load_drafter(drafter, load_file(drafter_folder / "model.safetensors"))
    check_pair(target.config, drafter.config)
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
        target.eval(),
        drafter.eval(),
        target_class.from_pretrained(target_folder).eval(),
        drafter_class.from_pretrained(drafter_folder).eval(),
    )


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
    assert_close(pair.target.logits(pair.target(tokens).hidden), theirs)


@torch.no_grad()
@pytest.mark.parametrize("chunks", [(1,) * ROWS, (WINDOW + 3, 1, 2 * WINDOW, 5, 1, 6), (ROWS - 1, 1)])
def test_chunks_through_the_cache(pair: Pair, chunks: tuple[int, ...]) -> None:
    tokens = prompt()
    theirs = pair.hf_target(input_ids=tokens).logits
    cache = Cache(ROWS)
    parts = [pair.target(chunk, cache).hidden for chunk in tokens.split(chunks, dim=1)]
    assert cache.length == ROWS
    assert_close(pair.target.logits(torch.cat(parts, dim=1)), theirs)


@torch.no_grad()
def test_rollback(pair: Pair) -> None:
    """Rows that were truncated leave no trace."""
    tokens = prompt()
    cache = Cache(ROWS + 4)
    pair.target(tokens[:, : ROWS - 4], cache)
    pair.target(prompt(6, seed=1), cache)
    cache.truncate(ROWS - 4)
    hidden = pair.target(tokens[:, ROWS - 4 :], cache).hidden
    assert_close(pair.target.logits(hidden), pair.hf_target(input_ids=tokens).logits[:, ROWS - 4 :])


@torch.no_grad()
@pytest.mark.parametrize("position", [WINDOW // 2, ROWS])
def test_draft_steps(pair: Pair, position: int) -> None:
    """Logits and hidden state of each draft step, fed back, with transformers shown exactly the visible rows."""
    tokens = prompt(position)
    theirs = pair.hf_target(input_ids=tokens, return_shared_kv_states=True, output_hidden_states=True, use_cache=False)
    rows = {"full_attention": position, "sliding_attention": min(position, WINDOW)}
    shared = {kind: tuple(part[:, :, -rows[kind] :] for part in theirs.shared_kv_states[kind]) for kind in rows}
    hidden = theirs.hidden_states[-1][:, -1:]
    embed = pair.hf_target.get_input_embeddings()
    cache = Cache(position + 1)
    our_hidden = pair.target(tokens, cache).hidden[:, -1:]
    assert_close(our_hidden, hidden)
    view = pair.drafter.view(pair.target, cache, position)
    token = theirs.logits[0, -1].argmax().view(1, 1)
    for _ in range(DEPTH):
        step = pair.hf_drafter(
            inputs_embeds=torch.cat((embed(token), hidden), dim=-1),
            position_ids=torch.tensor([[position]]),
            shared_kv_states=shared,
        )
        state, our_hidden = pair.drafter(pair.target.embed_tokens(token), our_hidden, view)
        hidden = step.last_hidden_state
        assert_close(our_hidden, hidden)
        ours = pair.drafter.logits(state)
        scored = ours.isfinite()
        assert_close(ours[scored], step.logits[scored])
        # transformers gives tokens outside the chosen centroids one value below all others
        assert torch.all(step.logits[~scored] < ours[scored].min())
        token = step.logits[0].argmax(-1).view(1, 1)


@torch.no_grad()
def test_draft_ignores_rows_from_the_anchor_on(pair: Pair) -> None:
    """What a rejected round left in the cache is invisible."""
    tokens = prompt()
    clean, stale = Cache(ROWS), Cache(ROWS + 3)
    hidden = pair.target(tokens, clean).hidden[0, -1]
    pair.target(tokens, stale)
    pair.target(prompt(3, seed=1), stale)
    guesses = [draft(pair.drafter, pair.target, cache, 7, hidden, ROWS, DEPTH) for cache in (clean, stale)]
    assert guesses[0] == guesses[1]


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
    """In bfloat16 the two agree to its rounding, the rounded embedding factor included."""
    target_folder, _ = write_pair(tmp_path, shape, seed=5, dtype=torch.bfloat16)
    target = Gemma4(target_config(read_config(target_folder))).bfloat16()
    load_target(target, load_file(target_folder / "model.safetensors"))
    theirs = hf.Gemma4UnifiedForConditionalGeneration if shape == "12b" else hf.Gemma4ForConditionalGeneration
    reference = theirs.from_pretrained(target_folder, dtype=torch.bfloat16).eval()
    tokens = prompt()
    assert torch.equal(target.embed_tokens(tokens), reference.get_input_embeddings()(tokens))
    ours, logits = target.logits(target(tokens).hidden), reference(input_ids=tokens).logits
    assert ours.dtype == torch.bfloat16
    assert (ours.float() - logits.float()).abs().mean() < 0.05 * logits.float().abs().mean()


def test_loading_is_exact(tmp_path: Path) -> None:
    """A missing, a left-over and a misshapen tensor are refused by name; what is official comes back out."""
    folder, _ = write_pair(tmp_path, "text")
    tensors = load_file(folder / "model.safetensors")
    model = Gemma4(target_config(read_config(folder)))
    load_target(model, tensors)
    saved = official_state(model)
    assert saved.keys() == tensors.keys() - {"lm_head.weight"}
    assert all(torch.equal(saved[name], tensors[name]) for name in saved)
    name = "model.layers.2.mlp.up_proj.weight"
    for broken, message in (
        ({key: value for key, value in tensors.items() if key != name}, "missing"),
        ({**tensors, "model.layers.2.mlp.up_proj.bias": torch.zeros(1)}, "left over"),
        ({**tensors, name: tensors[name][:-1]}, "config.json says"),
    ):
        with pytest.raises(CheckpointError, match=message) as error:
            load_target(model, broken)
        assert "layers.2.mlp.up_proj" in str(error.value)
