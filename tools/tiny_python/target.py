"""The target of tiny-python: its shape, its first weights and its training loop.

The shape is Gemma 4 E2B's, scaled down, so that every mechanism runs: sliding and full layers, per-layer embeddings,
the second half of the layers sharing the K/V of the first, double-wide MLPs there, soft cap.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tools.tiny_python.data import Corpus
from tools.tiny_python.tokenizer import BOS, EOS, PAD, TURN_END, VOCABULARY
from torch import Tensor
from torch.nn import functional as F

from paceline.checkpoint.config_json import target_config
from paceline.checkpoint.names import PLE_TABLE, target_tensors
from paceline.models import ops
from paceline.models.gemma4 import Target, load_target, logits
from paceline.train.optimizer import Parameters
from paceline.train.run import Run
from paceline.train.sequences import PlainWeights, states
from paceline.train.shape import first_weights

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


CONFIG = target_config(target_json())


def new_target(seed: int) -> Parameters:
    """First weights of the target."""
    weights = first_weights(target_tensors(CONFIG), seed)
    weights[PLE_TABLE] *= len(CONFIG.layers) ** 0.5  # it is one table of `ple_size` columns for each layer
    return weights


def target_of(weights: Parameters) -> Target:
    """The model of these weights."""
    return load_target(CONFIG, PlainWeights(weights))


def next_token_loss(weights: Parameters, tokens: Tensor) -> Tensor:
    """Mean nats per token of `tokens` [B, T + 1]."""
    target = target_of(weights)
    scores = logits(target, ops, states(target, tokens[:, :-1]).flatten(0, 1))
    return F.cross_entropy(scores, tokens[:, 1:].flatten())


def train_target(corpus: Corpus, run: Run[Tensor], seed: int) -> Parameters:
    """Train, or resume; returns the weights in bfloat16."""

    def batch(share: float, step: int) -> tuple[Tensor, ...]:
        sequences, length = next((s, t) for start, s, t in reversed(LENGTHS) if share >= start)
        return corpus.batch(np.random.default_rng((seed, step)), sequences, length).chunk(run.workers.count)

    return run.train(new_target(seed), next_token_loss, batch)
