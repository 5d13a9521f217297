"""The loss is that of decoding: each step's distribution against the target's at the token it stands for."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from paceline.checkpoint import Checkpoint, resolve
from paceline.config import DrafterConfig, TargetConfig
from paceline.models import ops
from paceline.models.drafter import load_drafter
from paceline.train import capture, distill
from paceline.train.distill import DEPTH, Data, Distillation, embeddings_path
from paceline.train.run import replica
from paceline.train.sequences import Cache, DraftRows, PlainWeights
from paceline.train.shape import new_config, new_drafter, sources
from tests.fixtures.backends import cpu_backend
from tests.fixtures.pairs import VOCABULARY, write_pair
from tests.train.test_capture import captured as recorded

LENGTH = 40


@dataclass(frozen=True)
class Case:
    """A captured shard of a random target's, and a drafter."""

    target: TargetConfig
    config: DrafterConfig
    weights: dict[str, Tensor]
    data: Data


@pytest.fixture(scope="module", params=["e4b", "12b"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """With a head of centroids, and a dense one."""
    head = "centroid" if request.param == "e4b" else "dense"
    return captured(tmp_path_factory.mktemp("distil"), request.param, head)


def captured(folder: Path, shape: str, head: str) -> Case:
    target, drafter = write_pair(folder, shape, head=head, seed=3)
    backend = cpu_backend(target, None)
    config = Checkpoint.open(target).target_config()
    dice = np.random.default_rng(0)
    lengths = [LENGTH] * (capture.SHARD - 1) + [20]
    texts = [dice.integers(4, VOCABULARY, count).tolist() for count in lengths]
    shards = capture.Shards(folder)
    shards.write(0, [recorded(backend, config, tokens, LENGTH) for tokens in texts])
    tokens = torch.unique(next(shards.tokens(1)))
    rows = torch.from_numpy(capture.embeddings(backend, tokens.numpy()))
    embeddings_path(folder).write_bytes(save({"tokens": tokens.int(), "embeddings": rows}))
    checkpoint = Checkpoint.open(drafter)
    found = resolve(checkpoint, checkpoint.drafter_config())
    weights = {name: torch.from_numpy(np.array(found.refs[name].read())) for name in found.refs}
    return Case(config, checkpoint.drafter_config(), weights, Data.open(shards, 1))


def loss_of(case: Case, config: DrafterConfig | None = None) -> Distillation:
    return Distillation(config or case.config, case.target, case.data.embeddings)


@torch.no_grad()
def test_steps_against_one_position_at_a_time(case: Case) -> None:
    """With the drafter's own head, over the whole vocabulary."""
    batch = case.data.batch(0, 2, 7).to("cpu", torch.float32)
    assert len(batch.positions) == 7
    steps = list(loss_of(case).steps(case.weights, batch))
    drafter = load_drafter(case.config, case.target, PlainWeights(case.weights))
    layers = dict(zip(capture.KINDS, sources(case.target), strict=True))
    for text in range(2):
        cache = Cache(LENGTH, {layer: tuple(x[text : text + 1] for x in batch.rows[k]) for k, layer in layers.items()})
        for place, position in enumerate(batch.positions.tolist()):
            feedback = batch.states[text, position - 1].view(1, 1, -1)
            for depth, step in enumerate(steps):
                at = position + depth
                assert bool(step.seen[text, place]) == (at < LENGTH)
                if at >= LENGTH:
                    break
                newest = case.data.embeddings[batch.tokens[text, at]].float().view(1, 1, -1)
                state, feedback = DraftRows(drafter, cache, torch.tensor([position])).step(newest, feedback)
                scores = ops.scores(state[0], *dataclasses.replace(drafter, centroids=None).head, 0.0)[0]
                shares = scores.double().softmax(-1)
                ids, top = batch.top_ids[text, at], batch.top_logits[text, at].double().softmax(-1)
                divergence = float((top * (top / shares[ids]).log()).sum())
                if case.config.centroids:
                    centroid = ops.scores(state[0], *drafter.centroids, 0.0)[0].double().log_softmax(-1)
                    size = VOCABULARY // case.config.centroids
                    owner = {int(token): row // size for row, token in enumerate(drafter.tokens.flatten())}
                    chosen = torch.tensor([owner[int(token)] for token in ids])
                    divergence -= distill.CENTROID_WEIGHT * float((top * centroid[chosen]).sum())
                shared = float(torch.minimum(top, shares[ids]).sum())
                loss = divergence - distill.ACCEPTANCE_WEIGHT * math.log(shared)
                assert float(step.loss[text, place]) == pytest.approx(loss, rel=1e-3, abs=1e-3)
                assert float(step.agreement[text, place]) == pytest.approx(shared, rel=1e-3, abs=1e-4)


def test_every_weight_is_trained(case: Case) -> None:
    """A gradient reaches all leaves, and a step against it lowers the loss."""
    weights, loss = replica(case.weights, torch.float32), loss_of(case)
    batch = case.data.batch(0, 3, 20).to("cpu", torch.float32)
    before = loss.loss(weights, batch)
    before.backward()
    for name, leaf in weights.items():
        assert not leaf.requires_grad or leaf.grad.abs().sum() > 0, name
    with torch.no_grad():
        for leaf in weights.values():
            if leaf.requires_grad:
                leaf -= 0.02 * leaf.grad / leaf.grad.norm().clamp(min=1e-6)
        assert loss.loss(weights, batch) < before


@torch.no_grad()
def test_a_large_head_is_estimated(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a sample the loss is near that of all tokens, and all that the target would choose are in it."""
    batch = case.data.batch(1, 1, 9).to("cpu", torch.float32)
    batch = dataclasses.replace(batch, top_ids=batch.top_ids[..., :4], top_logits=batch.top_logits[..., :4])
    loss, head = loss_of(case), case.weights["embed_tokens.weight"]
    weights = case.weights | {"embed_tokens.weight": 0.3 * head}  # without tails that a sample may miss
    whole = [step.loss for step in loss.steps(weights, batch)]
    monkeypatch.setattr(distill, "MOST_SCORED", 400)
    monkeypatch.setattr(distill, "LEAST_SAMPLED", 50)
    scored, estimate = loss._scored(weights, batch)
    for depth in range(DEPTH):
        newest = (batch.positions + depth).clamp(max=LENGTH - 1)
        assert (scored.columns[batch.top_ids[:, newest]] >= 0).all()
    assert len(scored.head) == 400
    assert float(estimate.max()) > 0
    for exact, sampled in zip(whole, loss.steps(weights, batch), strict=True):
        assert 0 < (exact - sampled.loss).abs().max() < 0.2


@torch.no_grad()
def test_steps_beyond_a_text_do_not_count(case: Case) -> None:
    [held_out] = case.data.held_out(50)
    assert held_out.tokens.shape == (1, 20)
    assert held_out.positions.tolist() == list(range(1, 20))
    assert held_out.numel() == 19
    batch = case.data.batch(2, 15, 30).to("cpu", torch.float32)
    cut = dataclasses.replace(batch, lengths=torch.full_like(batch.lengths, int(batch.positions[3]) + 2))
    for depth, step in enumerate(loss_of(case).steps(case.weights, cut)):
        assert torch.equal(step.seen[0], batch.positions + depth < cut.lengths[0])
    assert cut.numel() == int((batch.positions < cut.lengths[0]).sum()) * 15


def test_depth_grows(case: Case) -> None:
    depths = [case.data.batch(0, 1, 5, share / 100).depth for share in range(101)]
    assert depths[0] == 1
    assert depths == sorted(depths)
    assert depths[30:] == [DEPTH] * 71
    batch = case.data.batch(0, 1, 5, 0.1).to("cpu", torch.float32)
    assert len(list(loss_of(case).steps(case.weights, batch))) == batch.depth == 2


@torch.no_grad()
def test_a_perfect_drafter(case: Case) -> None:
    """Where both distributions are one, nothing is lost and everything is accepted."""
    batch = case.data.batch(3, 2, 6).to("cpu", torch.float32)
    loss = loss_of(case)
    drafter = load_drafter(case.config, case.target, PlainWeights(case.weights))
    newest = batch.positions
    layers = dict(zip(capture.KINDS, sources(case.target), strict=True))
    rows = DraftRows(drafter, Cache(LENGTH, {layer: batch.rows[k] for k, layer in layers.items()}), newest, 2)
    state, _ = rows.step(case.data.embeddings[batch.tokens[:, newest]].float(), batch.states[:, newest - 1])
    expected = (state @ case.weights["embed_tokens.weight"].T).float()
    best = expected.topk(VOCABULARY, dim=-1)
    top_ids = batch.top_ids.new_zeros((*batch.top_ids.shape[:2], VOCABULARY))
    top_logits = batch.top_logits.new_zeros(top_ids.shape)
    top_ids[:, newest], top_logits[:, newest] = best.indices, best.values
    step = next(loss.steps(case.weights, dataclasses.replace(batch, top_ids=top_ids, top_logits=top_logits)))
    torch.testing.assert_close(step.agreement, torch.ones(2, 6), rtol=1e-3, atol=1e-3)
    if not case.config.centroids:
        assert step.loss.abs().max() < 1e-3


@pytest.mark.parametrize("vocabulary", [None, 100])
def test_a_new_drafter(vocabulary: int | None, tmp_path: Path) -> None:
    """Its head begins as the target's embedding, seen from fewer directions; its queries as the target's."""
    target, _ = write_pair(tmp_path, "text")
    backend, config = cpu_backend(target, None), Checkpoint.open(target).target_config()
    settings = new_config(config, 48, 64, vocabulary)
    tokens = None if vocabulary is None else np.arange(7, 7 + vocabulary, dtype=np.int32)
    norms = {sliding: torch.full((config.layers[i].head_dim,), 0.5) for sliding, i in ((True, 0), (False, 4))}
    weights = new_drafter(settings, lambda part: capture.embeddings(backend, part), norms, tokens, 0)
    head = weights["embed_tokens.weight"]
    whole = capture.embeddings(backend, np.arange(VOCABULARY, dtype=np.int32) if tokens is None else tokens)
    assert head.shape == (len(whole), 48)
    assert float(head.norm(dim=-1).mean()) == pytest.approx(1, rel=1e-3)
    ours, theirs = (torch.corrcoef(torch.as_tensor(x) @ torch.as_tensor(x).T) for x in (head, whole))
    assert float((ours - theirs).abs().mean()) < 0.1
    load_drafter(settings, config, PlainWeights(weights))
