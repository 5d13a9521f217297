"""The drafter of tiny-python: its shape, its first weights and its distillation.

Every position of a sequence is an anchor. From each, several draft steps are unrolled on the drafter's own hidden
feedback, with the anchor's position and view of the target's cache held constant, as in decoding; each step is fitted
to the target's distribution (Kullback-Leibler divergence). Half of the sequences are the target's own text, because
that is what a drafter meets.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from paceline.config import drafter_config
from paceline.models.drafter import Drafter, View
from paceline.models.gemma4 import Cache, Gemma4
from paceline.train.checkpoint import Progress
from paceline.train.data import Corpus
from paceline.train.optimizer import Optimizer
from paceline.train.target import WINDOW, rope_json, schedule
from paceline.train.tokenizer import BOS, EOS, PAD, VOCABULARY
from paceline.train.workers import Workers

DEPTH = 4  # draft steps unrolled in training
CENTROIDS = 128
CENTROID_WEIGHT = 0.25  # of the centroid loss beside the token loss
OFF_PATH = 0.2  # weight of a step behind a token that the target itself would not have chosen


def drafter_json() -> dict[str, Any]:
    """`config.json` of the drafter, in the official spelling."""
    return {
        "architectures": ["Gemma4AssistantForCausalLM"],
        "model_type": "gemma4_assistant",
        "dtype": "bfloat16",
        "backbone_hidden_size": 384,
        "use_ordered_embeddings": True,
        "num_centroids": CENTROIDS,
        "centroid_intermediate_top_k": 16,
        "tie_word_embeddings": True,
        "text_config": {
            "model_type": "gemma4_text",
            "dtype": "bfloat16",
            "vocab_size": VOCABULARY,
            "vocab_size_per_layer_input": 0,
            "hidden_size": 128,
            "hidden_size_per_layer_input": 0,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
            "num_kv_shared_layers": 4,
            "use_double_wide_mlp": False,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 64,
            "global_head_dim": 128,
            "attention_k_eq_v": False,
            "attention_bias": False,
            "enable_moe_block": False,
            "hidden_activation": "gelu_pytorch_tanh",
            "sliding_window": WINDOW,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "rope_parameters": rope_json(),
            "tie_word_embeddings": True,
            "pad_token_id": PAD,
            "eos_token_id": EOS,
            "bos_token_id": BOS,
        },
    }


@torch.no_grad()
def new_drafter(target: Gemma4, seed: int) -> Drafter:
    """First weights in float32: the table is the target's, reduced to its principal components, and its balanced
    clusters are the centroids."""
    torch.manual_seed(seed)
    model = Drafter(drafter_config(drafter_json()))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            parameter.normal_(std=parameter.shape[1] ** -0.5)
        elif name.endswith("q_norm.weight"):
            parameter.fill_(1.5 * parameter.shape[0] ** -0.25)
        elif ".post_" in name:
            parameter.fill_(0.4)
    table = target.embed_tokens.weight.float()  # [vocabulary, backbone]
    _, _, directions = torch.linalg.svd(table, full_matrices=False)
    model.model.embed_tokens.weight.copy_(table @ directions[: model.config.hidden_size].T)
    clusters = balanced_clusters(F.normalize(table, dim=-1).numpy(), CENTROIDS, seed)
    assert model.masked_embedding is not None
    model.masked_embedding.token_ordering.copy_(torch.from_numpy(clusters.flatten()))
    means = model.model.embed_tokens.weight[torch.from_numpy(clusters)].mean(1)  # [centroids, hidden]
    model.masked_embedding.centroids.weight.copy_(F.normalize(means, dim=-1))
    return model


def balanced_clusters(rows: NDArray[np.float32], count: int, seed: int, rounds: int = 8) -> NDArray[np.int64]:
    """k-means with equal clusters: [count, len(rows) / count] row numbers.

    Each round gives the pairs (row, centre) out in order of similarity until a centre is full.
    """
    size = len(rows) // count
    centres = rows[np.random.default_rng(seed).permutation(len(rows))[:count]]
    members = np.empty((count, size), dtype=np.int64)
    for _ in range(rounds):
        order = np.argsort(-(rows @ centres.T), axis=None)
        taken = np.zeros(len(rows), dtype=bool)
        filled = [0] * count
        for row, centre in zip(*(part.tolist() for part in np.divmod(order, count)), strict=True):
            if not taken[row] and filled[centre] < size:
                members[centre, filled[centre]] = row
                filled[centre] += 1
                taken[row] = True
        centres = rows[members].mean(axis=1)
        centres /= np.linalg.norm(centres, axis=1, keepdims=True) + 1e-9
    return np.sort(members, axis=1)


def training_view(
    drafter: Drafter, target: Gemma4, keys_values: dict[int, tuple[Tensor, Tensor]], anchors: int
) -> View:
    """What the anchors at positions 1 .. anchors see of a pass over whole sequences."""
    positions = torch.arange(1, anchors + 1)
    seen, masks = {}, {}
    for sliding in (True, False):
        source = target.config.last_layer(sliding=sliding)
        assert source is not None
        keys, values = keys_values[source]
        seen[sliding] = (keys[:, :, :anchors].detach(), values[:, :, :anchors].detach())
        distance = positions[:, None] - torch.arange(anchors)[None]
        masks[sliding] = (distance > 0) & (distance <= target.config.sliding_window) if sliding else distance > 0
    return View(seen, masks, drafter.rotations(positions, drafter.pre_projection.weight.dtype))


def distillation_loss(drafter: Drafter, target: Gemma4, tokens: Tensor) -> Tensor:
    """Mean nats per anchor and step over `tokens` [B, T]; anchors at 1 .. T - DEPTH."""
    anchors = tokens.shape[1] - DEPTH
    with torch.no_grad():
        run = target(tokens)
        shares = target.logits(run.hidden).float().softmax(-1)  # [B, T, vocabulary]
        # [B, T] whether the target would have chosen the token that follows
        agreed = F.pad(shares[:, :-1].argmax(-1) == tokens[:, 1:], (0, 1))
        embeddings = target.embed_tokens(tokens)
    view = training_view(drafter, target, run.keys_values, anchors)
    feedback = run.hidden[:, :anchors]
    head = drafter.masked_embedding
    assert head is not None
    weights = torch.ones(tokens.shape[0], anchors)
    total, weight_sum = torch.zeros(()), torch.zeros(())
    for step in range(DEPTH):
        newest = slice(1 + step, 1 + step + anchors)
        state, feedback = drafter(embeddings[:, newest], feedback, view)
        wanted = shares[:, newest]  # [B, A, vocabulary]
        token_scores = F.linear(state, drafter.model.embed_tokens.weight).float().log_softmax(-1)
        loss = -(wanted * token_scores).sum(-1)
        by_centroid = wanted[..., head.token_ordering].view(*wanted.shape[:2], CENTROIDS, -1).sum(-1)
        loss = loss - CENTROID_WEIGHT * (by_centroid * head.centroids(state).float().log_softmax(-1)).sum(-1)
        total = total + (weights * loss).sum()
        weight_sum = weight_sum + weights.sum()
        weights = weights * torch.where(agreed[:, newest], 1.0, OFF_PATH)
    return total / weight_sum


@torch.no_grad()
def continuations(target: Gemma4, prompts: Tensor, length: int, temperature: float, seed: int) -> Tensor:
    """Continue `prompts` [B, T] to `length` tokens with the target itself; temperature 0 is greedy. [B, length]"""
    generator = torch.Generator().manual_seed(seed)
    cache = Cache(length)
    tokens = prompts
    rows = prompts
    while tokens.shape[1] < length:
        logits = target.logits(target(rows, cache).hidden[:, -1]).float()
        if temperature == 0:
            rows = logits.argmax(-1, keepdim=True)
        else:
            rows = (logits / temperature).softmax(-1).multinomial(1, generator=generator)
        tokens = torch.cat((tokens, rows), dim=1)
    return tokens


@dataclass(frozen=True)
class DrafterRun:
    """One distillation, boxed in time, against a finished target in bfloat16."""

    corpus: Corpus
    folder: Path
    minutes: float
    workers: Workers
    seed: int = 0
    sequences: int = 6
    length: int = 320
    own_batches: int = 6  # batches of 128 sequences of the target's own text, every other one greedy
    muon_rate: float = 0.02
    adam_rate: float = 0.004

    def train(self, target: Gemma4, report: Callable[[str], None] = print) -> Drafter:
        """Train, or resume from `folder`; returns the weights in bfloat16."""
        target.requires_grad_(False)
        own = self.own_text(target)
        report(f"{own.numel()} tokens of the target's own text")
        first = new_drafter(target, self.seed).bfloat16()
        replicas = [first]
        while len(replicas) < self.workers.count:
            replicas.append(Drafter(first.config).bfloat16())
            replicas[-1].load_state_dict(first.state_dict())
        optimizer = Optimizer(replicas, self.workers, self.muon_rate, self.adam_rate, 0.0)
        progress = Progress.resume(self.folder / "drafter.pt", optimizer)
        loss_of = torch.compile(distillation_loss, dynamic=False)
        losses: deque[float] = deque(maxlen=50)
        while progress.seconds < 60 * self.minutes:
            tick = time.monotonic()
            tokens = self.batch(own, np.random.default_rng((self.seed, optimizer.steps)))

            def backward(replica: Drafter, part: Tensor) -> float:
                loss = loss_of(replica, target, part) * (len(part) / self.sequences)
                loss.backward()  # type: ignore[no-untyped-call]
                return loss.item()

            parts = tokens.chunk(self.workers.count)
            jobs = [partial(backward, replica, part) for replica, part in zip(replicas, parts, strict=False)]
            losses.append(sum(self.workers.run(jobs, together=len(losses) > 0)))
            optimizer.step(schedule(progress.seconds / (60 * self.minutes), optimizer.steps))
            progress.advance(time.monotonic() - tick, tokens.numel(), optimizer)
            if optimizer.steps % 20 == 0:
                share, rate = progress.seconds / (60 * self.minutes), progress.tokens / progress.seconds
                report(f"step {optimizer.steps} share {share:.3f} loss {fmean(losses):.4f} tokens/s {rate:.0f}")
        progress.save(optimizer)
        return replicas[0]

    def batch(self, own: Tensor, generator: np.random.Generator) -> Tensor:
        """[sequences, length]: one half source, one half the target's own text."""
        half = self.sequences // 2
        source = self.corpus.batch(generator, self.sequences - half, self.length - 1)
        chosen = torch.from_numpy(generator.integers(len(own), size=half))
        return torch.cat((source, own[chosen]))[torch.from_numpy(generator.permutation(self.sequences))]

    def own_text(self, target: Gemma4) -> Tensor:
        """[128 * own_batches, length] tokens, kept beside the checkpoint."""
        path = self.folder / "own_text.pt"
        if path.exists():
            kept: Tensor = torch.load(path, weights_only=True)
            return kept
        jobs = []
        for number in range(self.own_batches):
            generator = np.random.default_rng((self.seed, 1, number))
            prompts = self.corpus.batch(generator, 128, int(generator.integers(24, 128)))
            temperature = 0.0 if number % 2 == 0 else 0.8
            jobs.append(partial(continuations, target, prompts, self.length, temperature, number))
        own = torch.cat(self.workers.run(jobs))
        torch.save(own, path)
        return own
