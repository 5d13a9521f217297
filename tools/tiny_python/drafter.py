"""The drafter of tiny-python: its shape, its first weights and its distillation.

From every position of a sequence several draft steps are unrolled on the drafter's own hidden feedback, with the
position and the visible part of the target's cache held constant, as in decoding; each step is fitted to the target's
distribution (Kullback-Leibler divergence). Half of the sequences are the target's own text, because that is what a
drafter meets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tools.tiny_python.data import Corpus
from tools.tiny_python.target import CONFIG as TARGET_CONFIG
from tools.tiny_python.target import WINDOW, rope_json, target_of
from tools.tiny_python.tokenizer import BOS, EOS, PAD, VOCABULARY
from torch import Tensor
from torch.nn import functional as F

from paceline.checkpoint.config_json import drafter_config
from paceline.checkpoint.names import TOKEN_ORDERING, drafter_tensors
from paceline.models import ops
from paceline.models.drafter import Drafter, load_drafter
from paceline.models.gemma4 import Target, embed, logits
from paceline.train.optimizer import Parameters
from paceline.train.run import Run
from paceline.train.sequences import Cache, DraftRows, PlainWeights, states
from paceline.train.shape import first_weights

DEPTH = 4  # draft steps unrolled in training
CENTROIDS = 128
CENTROID_WEIGHT = 0.25  # of the centroid loss beside the token loss
OFF_PATH = 0.2  # weight of a step after a token that the target would not have chosen


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


CONFIG = drafter_config(drafter_json())


def new_drafter(target: Parameters, seed: int) -> Parameters:
    """First weights in float32: the table is the target's, reduced to its principal components, and its balanced
    clusters are the centroids."""
    weights = first_weights(drafter_tensors(CONFIG), seed)
    table = target["embed_tokens.weight"].detach().float()  # [vocabulary, backbone]
    _, _, directions = torch.linalg.svd(table, full_matrices=False)
    reduced = table @ directions[: CONFIG.hidden_size].T
    clusters = torch.from_numpy(balanced_clusters(F.normalize(table, dim=-1).numpy(), CENTROIDS, seed))
    weights["embed_tokens.weight"] = reduced
    weights[TOKEN_ORDERING] = clusters.flatten()
    weights["masked_embedding.centroids.weight"] = F.normalize(reduced[clusters].mean(1), dim=-1)
    return weights


def drafter_of(weights: Parameters) -> Drafter:
    """The model of these weights."""
    return load_drafter(CONFIG, TARGET_CONFIG, PlainWeights(weights))


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


def distillation_loss(target: Target, weights: Parameters, tokens: Tensor) -> Tensor:
    """Mean nats per sequence position and step over `tokens` [B, T]; A positions draft, 1 .. T - DEPTH."""
    batch, count = len(tokens), tokens.shape[1] - DEPTH
    cache = Cache()
    with torch.no_grad():
        hidden = states(target, tokens, cache)  # [B, T, backbone]
        shares = logits(target, ops, hidden.flatten(0, 1)).softmax(-1).view(*tokens.shape, -1)
        # [B, T] whether the target would have chosen the token that follows
        agreed = F.pad(shares[:, :-1].argmax(-1) == tokens[:, 1:], (0, 1))
        embeddings = embed(target, tokens.flatten()).view(hidden.shape)
    rows = DraftRows(drafter_of(weights), cache, torch.arange(1, count + 1), batch)
    feedback = hidden[:, :count]
    sure = torch.ones(batch, count)
    total, weight_sum = torch.zeros(()), torch.zeros(())
    for step in range(DEPTH):
        newest = slice(1 + step, 1 + step + count)
        state, feedback = rows.step(embeddings[:, newest], feedback)
        expected = shares[:, newest]  # [B, A, vocabulary]
        token_scores = F.linear(state, weights["embed_tokens.weight"]).float().log_softmax(-1)
        centroid_scores = F.linear(state, weights["masked_embedding.centroids.weight"]).float().log_softmax(-1)
        by_centroid = expected[..., weights[TOKEN_ORDERING]].view(batch, count, CENTROIDS, -1).sum(-1)
        loss = -(expected * token_scores).sum(-1) - CENTROID_WEIGHT * (by_centroid * centroid_scores).sum(-1)
        total = total + (sure * loss).sum()
        weight_sum = weight_sum + sure.sum()
        sure = sure * torch.where(agreed[:, newest], 1.0, OFF_PATH)
    return total / weight_sum


@torch.no_grad()
def continuations(target: Target, prompts: Tensor, length: int, temperature: float, seed: int) -> Tensor:
    """Continue `prompts` [B, T] to `length` tokens with the target itself; temperature 0 is greedy. [B, length]"""
    generator = torch.Generator().manual_seed(seed)
    cache = Cache()
    tokens = rows = prompts
    while tokens.shape[1] < length:
        scores = logits(target, ops, states(target, rows, cache)[:, -1])
        if temperature == 0:
            rows = scores.argmax(-1, keepdim=True)
        else:
            rows = (scores / temperature).softmax(-1).multinomial(1, generator=generator)
        tokens = torch.cat((tokens, rows), dim=1)
    return tokens


@dataclass(frozen=True)
class Distillation:
    """Trains a drafter against a finished target in bfloat16."""

    corpus: Corpus
    run: Run[Tensor]
    report: Callable[[str], None] = print
    seed: int = 0
    sequences: int = 6
    length: int = 320
    own_batches: int = 6  # batches of 128 sequences of the target's own text, every other one greedy

    def train(self, target: Parameters) -> Parameters:
        """Train, or resume; returns the weights in bfloat16."""
        fixed = target_of({name: weights.detach() for name, weights in target.items()})
        own = self.own_text(fixed)
        self.report(f"{own.numel()} tokens of the target's own text")

        def batch(share: float, step: int) -> tuple[Tensor, ...]:
            return self.batch(own, np.random.default_rng((self.seed, step))).chunk(self.run.workers.count)

        return self.run.train(new_drafter(target, self.seed), partial(distillation_loss, fixed), batch)

    def batch(self, own: Tensor, generator: np.random.Generator) -> Tensor:
        """[sequences, length]: one half source, one half the target's own text."""
        half = self.sequences // 2
        source = self.corpus.batch(generator, self.sequences - half, self.length - 1)
        chosen = torch.from_numpy(generator.integers(len(own), size=half))
        return torch.cat((source, own[chosen]))[torch.from_numpy(generator.permutation(self.sequences))]

    def own_text(self, target: Target) -> Tensor:
        """[128 * own_batches, length] tokens, kept beside the training state."""
        path = self.run.path.with_name("own_text.pt")
        if path.exists():
            kept: Tensor = torch.load(path, weights_only=True)
            return kept
        jobs = []
        for number in range(self.own_batches):
            generator = np.random.default_rng((self.seed, 1, number))
            prompts = self.corpus.batch(generator, 128, int(generator.integers(24, 128)))
            temperature = 0.0 if number % 2 == 0 else 0.8
            jobs.append(partial(continuations, target, prompts, self.length, temperature, number))
        own = torch.cat(self.run.workers.run(jobs))
        torch.save(own, path)
        return own
