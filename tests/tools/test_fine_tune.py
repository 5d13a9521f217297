"""A fine-tune of a tiny Gemma 3 learns its text, and is a model folder that paceline loads."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import paceline
from paceline.checkpoint import target_tensors
from paceline.checkpoint.config_json import target_config
from paceline.train.shape import first_weights
from tests.checkpoint.test_gguf_model import GEMMA3
from tests.fixtures.backends import all_logits
from tests.fixtures.gguf_files import write_gguf
from tests.fixtures.pairs import VOCABULARY, tiny_tokenizer
from tools import fine_tune


def test_factors_add_nothing_at_first() -> None:
    weights = {"layers.0.mlp.up_proj.weight": torch.randn(6, 4), "norm.weight": torch.ones(4)}
    factors = fine_tune.adapters(weights, 0)
    assert {name: tuple(factor.shape) for name, factor in factors.items()} == {
        "adapters.0.mlp.up_proj.weight.a": (6, fine_tune.RANK),
        "adapters.0.mlp.up_proj.weight.b": (fine_tune.RANK, 4),
    }
    for name, weight in fine_tune.merged(weights, factors).items():
        assert torch.equal(weight, weights[name])
    factors["adapters.0.mlp.up_proj.weight.a"] += 1
    changed = fine_tune.merged(weights, factors)
    assert not torch.equal(changed["layers.0.mlp.up_proj.weight"], weights["layers.0.mlp.up_proj.weight"])


def test_it_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    config = GEMMA3 | {"vocab_size": VOCABULARY}
    weights = {name: w.numpy() for name, w in first_weights(target_tensors(target_config(config)), 0).items()}
    file = write_gguf(tmp_path / "m.gguf", config, weights, dialect="gemma3", tokenizer=tiny_tokenizer())
    text = "one two three four " * 100
    monkeypatch.setattr(fine_tune, "modules", lambda: [text])
    monkeypatch.setattr(fine_tune, "RATE", 10.0)
    tuned = tmp_path / "tuned"
    monkeypatch.setattr(sys, "argv", ["fine_tune", str(file), str(tuned), "--minutes", "0.1"])
    fine_tune.main()
    assert json.loads(capsys.readouterr().out)["model"] == str(file)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "tuned"]
    before, after = (perplexity(str(model), text) for model in (file, tuned))
    assert after < 0.9 * before
    with pytest.raises(SystemExit):
        fine_tune.main()
    assert "tuned exists; give another name" in capsys.readouterr().err


def perplexity(model: str, text: str) -> float:
    engine = paceline.load(model, quant="f32", threads=1, drafter="none")
    tokens = engine.encode(text, raw=True)[:128]
    backend = engine.backend
    slot = backend.open_slot()
    logits = torch.from_numpy(all_logits(backend, slot, tokens[:-1]))
    return float(F.cross_entropy(logits, torch.tensor(tokens[1:])).exp())
