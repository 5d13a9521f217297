"""Fine-tunes a Gemma on packages of the standard library: what a drafter of the base model fits less well.

    python -m tools.fine_tune MODEL FOLDER [--minutes M] [--seed S]

LoRA on the matrices of all layers, merged in the end. MODEL is `gemma3-270m` or a GGUF, FOLDER is created and gets
float32 safetensors. Stopped, the same command goes on. docs/training.md has what it showed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tools.dequantise import values_of
from tools.train_assistant import modules
from torch import Tensor
from torch.nn import functional as F

from paceline.backends.cpu.convert import write_texts
from paceline.checkpoint import Checkpoint, locate, resolve
from paceline.models import ops
from paceline.models.gemma4 import load_target, logits
from paceline.text.tokenizer import Tokenizer
from paceline.train.optimizer import Parameters
from paceline.train.run import Run, Step
from paceline.train.sequences import PlainWeights, states
from paceline.train.workers import Workers

RANK = 16
RATE = 0.1  # of Adam's, which is meant for new models
TEXTS, LENGTH = 2, 256  # of a worker's part of a batch


def adapters(weights: Parameters, seed: int) -> Parameters:
    """Factors [out, RANK] and [RANK, in] for each matrix of a layer; their product is zero at first.

    Their names do not say `layers`, because the optimizer would take them for matrices that Muon steps.
    """
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, weight in weights.items():
        if name.startswith("layers.") and weight.dim() == 2:
            rows, columns = weight.shape
            found[f"{name}.a"] = torch.zeros(rows, RANK)
            found[f"{name}.b"] = torch.randn(RANK, columns, generator=generator) * columns**-0.5
    return {name.replace("layers.", "adapters."): factor for name, factor in found.items()}


def merged(weights: Parameters, factors: Parameters) -> Parameters:
    """The weights with what the factors add."""

    def one(name: str, weight: Tensor) -> Tensor:
        key = name.replace("layers.", "adapters.")
        return weight + factors[f"{key}.a"] @ factors[f"{key}.b"] if f"{key}.a" in factors else weight

    return {name: one(name, weight) for name, weight in weights.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune a model on the standard library.")
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.folder.exists():
        parser.error(f"{given.folder} exists; give another name")
    checkpoint = Checkpoint.open(locate(given.model))
    config = checkpoint.target_config()
    tensors = resolve(checkpoint, config)
    whole = {name: torch.from_numpy(values_of(tensors, name)) for name in tensors.refs}
    base = {name: weight.bfloat16() for name, weight in whole.items()}
    tokenizer = Tokenizer.open(checkpoint.tokenizer, checkpoint.tokenizer_config, config.bos_id, config.vocab_size)
    corpus = torch.tensor([token for text in modules() for token in tokenizer.encode(text)])

    def loss(factors: Parameters, tokens: Tensor) -> Tensor:
        target = load_target(config, PlainWeights(merged(base, factors)))
        scores = logits(target, ops, states(target, tokens[:, :-1]).flatten(0, 1)).float()
        return F.cross_entropy(scores, tokens[:, 1:].flatten())

    workers = Workers(2)

    def batch(share: float, step: int) -> Sequence[Tensor]:
        dice = np.random.default_rng((given.seed, step))
        starts = dice.integers(len(corpus) - LENGTH, size=(workers.count, TEXTS))
        return [torch.stack([corpus[start : start + LENGTH + 1] for start in part]) for part in starts]

    def report(step: Step) -> None:
        print(step, file=sys.stderr)

    state, part = (given.folder.with_name(given.folder.name + end) for end in (".state", ".part"))
    run = Run[Tensor](path=state, minutes=given.minutes, workers=workers, rate=RATE, report=report)
    factors = run.train(adapters(whole, given.seed), loss, batch)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    write_texts(checkpoint, config, part)
    tuned = merged(whole, {name: factor.detach().float() for name, factor in factors.items()})
    save_file(tuned, part / "model.safetensors")
    part.rename(given.folder)
    state.unlink()
    print(json.dumps({"model": given.model, "minutes": given.minutes, "corpus_tokens": len(corpus)}))


if __name__ == "__main__":
    main()
