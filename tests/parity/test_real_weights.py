"""Gemma 3 270M, a real file (Q5_0, Q4_K, Q6_K, Q8_0), against transformers on the file's values in f32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf

import paceline
from paceline import _cpu
from paceline.bench.evaluation import Window, cut, log_softmax
from paceline.checkpoint import Checkpoint, TensorRef, Tensors, resolve
from paceline.checkpoint.location import ASSETS
from paceline.config import TargetConfig
from paceline.types import SamplingParams
from tests.fixtures.backends import all_logits, cpu_backend
from tests.fixtures.real_gguf import real_gguf

pytestmark = pytest.mark.slow

PROMPT = "The capital of France is"
# Greedy, transformers 5.17 in f32.
CONTINUATION = (
    "506 5279 529 506 2891 529 7001 236761 1030 563 506 7488 3207 528 7001 532 506 1855 7488 3207 528 3879 236761 1030 "
    "563 5628 528 506 6029 529 506 2891 532 563 506 5279 529 506 4128 529"
)
TEXTS = ("story", "code", "licence", "facts", "dialogue")  # prose and code in English, which the model was made for
POSITIONS, CONTEXT = 2000, 700  # more than the sliding window


@pytest.fixture(scope="module")
def file() -> Path:
    return real_gguf()


@pytest.fixture(scope="module")
def theirs(file: Path) -> hf.PreTrainedModel:
    checkpoint = Checkpoint.open(file)
    config = checkpoint.target_config()
    tensors = resolve(checkpoint, config)
    settings = hf.Gemma3TextConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.layers[0].intermediate_size,
        num_hidden_layers=len(config.layers),
        layer_types=["sliding_attention" if layer.sliding else "full_attention" for layer in config.layers],
        num_attention_heads=config.heads,
        num_key_value_heads=config.layers[0].kv_heads,
        head_dim=config.layers[0].head_dim,
        sliding_window=config.sliding_window,
        query_pre_attn_scalar=256,
        max_position_embeddings=config.max_positions,
        rms_norm_eps=1e-6,
    )
    with torch.device("meta"):
        model = hf.Gemma3ForCausalLM(settings)
    weights = {f"model.{name}": torch.from_numpy(values(tensors, name)) for name in tensors.refs}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights, strict=False, assign=True)
    fresh = hf.Gemma3ForCausalLM(settings)  # buffers, such as rotary frequencies, are not in the files
    fresh.load_state_dict(model.state_dict(), strict=False)
    return fresh.eval()


def values(tensors: Tensors, name: str) -> np.ndarray:
    """A tensor as transformers has it in f32: norm weights less 1."""
    ref: TensorRef = tensors[name]
    if ref.block_type:
        return _cpu.dequantise(ref.read(), ref.block_type, ref.shape[-1])
    return tensors.vector(name) - np.float32(1) if "norm" in name else ref.read().astype(np.float32)


def windows(engine: paceline.Engine, names: tuple[str, ...]) -> list[Window]:
    texts = [(ASSETS / "eval" / f"{name}.txt").read_text() for name in names]
    tokens = [engine.tokenizer.encode(text) for text in texts]
    return cut(tokens, engine.tokenizer.bos_id, POSITIONS, CONTEXT)


def differences(
    file: Path, theirs: hf.PreTrainedModel, quant: str, names: tuple[str, ...]
) -> Iterator[tuple[float, bool]]:
    """KL divergence from theirs, and whether the best token is theirs, by position."""
    engine = paceline.load(str(file), quant=quant, drafter="none", context=CONTEXT + 16)
    backend = engine.backend
    for window in windows(engine, names):
        slot = backend.open_slot()
        ours = all_logits(backend, slot, window.tokens[:-1])
        backend.close_slot(slot)
        with torch.no_grad():
            logits = theirs(input_ids=torch.tensor([window.tokens[:-1]])).logits[0].numpy()
        for expected, found in zip(logits, ours, strict=True):
            p, q = log_softmax(expected), log_softmax(found)
            yield float((np.exp(p) * (p - q)).sum()), bool(expected.argmax() == found.argmax())


def test_greedy_text(file: Path) -> None:
    """In f32 the reference's own tokens; with 8-bit activations until two are nearly as likely (0.08 nats)."""
    expected = [int(token) for token in CONTINUATION.split()]
    for quant, count in (("f32", 40), ("auto", 25)):
        engine = paceline.load(str(file), quant=quant, context=128)
        found = engine.generate(PROMPT, raw=True, sampling=SamplingParams(), max_tokens=count)
        assert list(found.tokens) == expected[:count]


def test_logits_in_f32(file: Path, theirs: hf.PreTrainedModel) -> None:
    backend = cpu_backend(file, None, "f32", threads=2, context=CONTEXT + 16)
    engine = paceline.load(str(file), context=CONTEXT + 16)
    tokens = windows(engine, TEXTS)[0].tokens[:600]
    ours = all_logits(backend, backend.open_slot(), tokens)
    with torch.no_grad():
        logits = theirs(input_ids=torch.tensor([tokens])).logits[0].numpy()
    assert np.abs(ours - logits).max() <= 1e-4 * np.abs(logits).max()
    assert isinstance(engine.target_config, TargetConfig)


def test_logits_as_the_file_is(file: Path, theirs: hf.PreTrainedModel, capsys: pytest.CaptureFixture[str]) -> None:
    """All that differs is the rounding of activations to 8 bits, and of keys and values to bf16."""
    kl, same = map(np.array, zip(*differences(file, theirs, "auto", TEXTS), strict=True))
    with capsys.disabled():
        print(f"\n{len(kl)} positions: KL {kl.mean():.5f} nats, same top token {same.mean():.2%}")
    assert len(kl) == POSITIONS
    assert kl.mean() <= 0.004
    assert same.mean() >= 0.965
