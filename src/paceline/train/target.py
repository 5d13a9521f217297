"""The target of tiny-python: its shape, its first weights and its training loop.

The shape is Gemma 4 E2B's, scaled down, so that every mechanism runs: sliding and full layers, per-layer embeddings,
the second half of the layers sharing the K/V of the first, double-wide MLPs there, soft cap.
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
from torch import Tensor
from torch.nn import functional as F

from paceline.config import target_config
from paceline.models.gemma4 import Gemma4
from paceline.train.checkpoint import Progress
from paceline.train.data import Corpus
from paceline.train.optimizer import Optimizer
from paceline.train.tokenizer import BOS, EOS, PAD, TURN_END, VOCABULARY
from paceline.train.workers import Workers

WINDOW = 128
# (share of the training time from which it holds, sequences per step, tokens per sequence): mostly short sequences,
# at the end long ones, so that full layers and positions far beyond the window are trained too.
LENGTHS = ((0.0, 24, 256), (0.8, 6, 1024))


def target_json() -> dict[str, Any]:
    """`config.json` of the target, in the official spelling."""
    return {
        "architectures": ["Gemma4ForCausalLM"],
        "model_type": "gemma4_text",
        "dtype": "bfloat16",
        "vocab_size": VOCABULARY,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size": 384,
        "hidden_size_per_layer_input": 32,
        "intermediate_size": 512,
        "num_hidden_layers": 10,
        "layer_types": ["sliding_attention"] * 4 + ["full_attention"] + ["sliding_attention"] * 4 + ["full_attention"],
        "num_kv_shared_layers": 5,
        "use_double_wide_mlp": True,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "global_head_dim": 128,
        "attention_k_eq_v": False,
        "attention_bias": False,
        "enable_moe_block": False,
        "hidden_activation": "gelu_pytorch_tanh",
        "final_logit_softcapping": 30.0,
        "sliding_window": WINDOW,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_parameters": rope_json(),
        "tie_word_embeddings": True,
        "pad_token_id": PAD,
        "eos_token_id": [EOS, TURN_END],
        "bos_token_id": BOS,
    }


def rope_json() -> dict[str, Any]:
    return {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "proportional", "rope_theta": 1000000.0, "partial_rotary_factor": 0.25},
    }


@torch.no_grad()
def new_target(seed: int) -> Gemma4:
    """First weights in float32: embeddings and attention scores of about unit variance, small residual branches."""
    torch.manual_seed(seed)
    config = target_config(target_json())
    model = Gemma4(config)
    for name, parameter in model.named_parameters():
        if name == "embed_tokens_per_layer.weight":
            parameter.normal_(std=config.ple_size**-0.5)
        elif parameter.dim() == 2:
            parameter.normal_(std=parameter.shape[1] ** -0.5 if "embed" not in name else config.hidden_size**-0.5)
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            parameter.fill_(1.5 * parameter.shape[0] ** -0.25)
        elif ".post_" in name:
            parameter.fill_(0.4)
    return model


def next_token_loss(model: Gemma4, tokens: Tensor) -> Tensor:
    """Mean nats per token of `tokens` [B, T + 1]."""
    logits = model.logits(model(tokens[:, :-1]).hidden).float()
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


@dataclass(frozen=True)
class TargetRun:
    """One training run, boxed in time: the schedule is a function of the share of `minutes` spent."""

    corpus: Corpus
    folder: Path
    minutes: float
    workers: Workers
    seed: int = 0
    muon_rate: float = 0.02
    adam_rate: float = 0.004
    decay: float = 0.1

    def train(self, report: Callable[[str], None] = print) -> Gemma4:
        """Train, or resume from `folder`; returns the weights in bfloat16."""
        replicas = [new_target(self.seed).bfloat16() for _ in range(self.workers.count)]
        optimizer = Optimizer(replicas, self.workers, self.muon_rate, self.adam_rate, self.decay)
        progress = Progress.resume(self.folder / "target.pt", optimizer)
        loss_of = torch.compile(next_token_loss, dynamic=False)
        compiled: set[int] = set()
        losses: deque[float] = deque(maxlen=50)
        while progress.seconds < 60 * self.minutes:
            tick = time.monotonic()
            share = progress.seconds / (60 * self.minutes)
            sequences, length = next((s, t) for start, s, t in reversed(LENGTHS) if share >= start)
            tokens = self.corpus.batch(np.random.default_rng((self.seed, optimizer.steps)), sequences, length)

            def backward(replica: Gemma4, part: Tensor, total: int = sequences) -> float:
                loss = loss_of(replica, part) * (len(part) / total)
                loss.backward()  # type: ignore[no-untyped-call]
                return loss.item()

            parts = tokens.chunk(self.workers.count)
            jobs = [partial(backward, replica, part) for replica, part in zip(replicas, parts, strict=False)]
            losses.append(sum(self.workers.run(jobs, together=length in compiled)))
            compiled.add(length)
            optimizer.step(schedule(share, optimizer.steps))
            progress.advance(time.monotonic() - tick, sequences * length, optimizer)
            if optimizer.steps % 20 == 0:
                rate = progress.tokens / progress.seconds
                report(f"step {optimizer.steps} share {share:.3f} loss {fmean(losses):.4f} tokens/s {rate:.0f}")
        progress.save(optimizer)
        return replicas[0]


def schedule(share: float, step: int, warm_up: int = 20, final_share: float = 0.5) -> float:
    """Linear warm-up, a plateau, then linear to zero over the last `final_share` of the run."""
    return min(1.0, (step + 1) / warm_up, max(0.0, (1 - share) / final_share))
