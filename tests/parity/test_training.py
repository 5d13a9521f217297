"""Training sees exactly what decoding sees, and its parts do what they say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from paceline.config import drafter_config, target_config
from paceline.models.drafter import Drafter, load_drafter
from paceline.models.gemma4 import Cache, Gemma4, load_target
from paceline.train.checkpoint import Progress, trained
from paceline.train.data import CHAT_SHARE, Corpus, standard_library
from paceline.train.drafter import balanced_clusters, training_view
from paceline.train.optimizer import Optimizer, orthogonal
from paceline.train.target import schedule
from paceline.train.tokenizer import BOS, EOS, MODEL_HEADER, SPECIAL
from paceline.train.workers import Workers
from tests.parity.fixtures import VOCABULARY, WINDOW, read_config, tiny_tokenizer, write_pair


@torch.no_grad()
def test_all_anchors_at_once_equal_one_anchor_while_decoding(tmp_path: Path) -> None:
    """Three unrolled steps, given the same tokens, at anchors before and beyond the window."""
    target_folder, drafter_folder = write_pair(tmp_path, "text", seed=2)
    target = Gemma4(target_config(read_config(target_folder)))
    load_target(target, load_file(target_folder / "model.safetensors"))
    drafter = Drafter(drafter_config(read_config(drafter_folder)))
    load_drafter(drafter, load_file(drafter_folder / "model.safetensors"))
    tokens = torch.randint(4, VOCABULARY, (2, 3 * WINDOW))
    anchors, steps = 3 * WINDOW - 3, 3
    run = target(tokens)
    embeddings = target.embed_tokens(tokens)
    view = training_view(drafter, target, run.keys_values, anchors)
    feedback, states = run.hidden[:, :anchors], []
    for step in range(steps):
        state, feedback = drafter(embeddings[:, 1 + step : 1 + step + anchors], feedback, view)
        states.append(state)
    for row in range(2):
        cache = Cache(3 * WINDOW)
        hidden = target(tokens[row : row + 1], cache).hidden
        for position in (1, WINDOW, WINDOW + 1, 2 * WINDOW + 3):
            view, feedback = drafter.view(target, cache, position), hidden[:, position - 1 : position]
            for step in range(steps):
                newest = embeddings[row : row + 1, position + step : position + step + 1]
                state, feedback = drafter(newest, feedback, view)
                torch.testing.assert_close(states[step][row, position - 1], state[0, 0], rtol=1e-4, atol=1e-4)


def test_balanced_clusters() -> None:
    """Every row once, equal sizes, and well separated groups are found."""
    generator = np.random.default_rng(0)
    groups = np.repeat(np.eye(4, dtype=np.float32), 8, axis=0) + 0.01 * generator.random((32, 4), dtype=np.float32)
    order = generator.permutation(32)
    found = balanced_clusters(groups[order], 4, seed=1)
    assert sorted(found.flatten().tolist()) == list(range(32))
    assert found.shape == (4, 8)
    uneven = balanced_clusters(generator.random((32, 4), dtype=np.float32), 4, seed=0)
    assert sorted(uneven.flatten().tolist()) == list(range(32))


@pytest.mark.parametrize("shape", [(16, 16), (16, 48), (48, 16)])
def test_orthogonal(shape: tuple[int, int]) -> None:
    """Singular values come near one, singular vectors stay."""
    matrix = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal(matrix).float())
    assert values.min() > 0.3
    assert values.max() < 1.5
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    assert ((u @ v) * orthogonal(matrix).float()).sum((1, 2)).min() > 0.7 * 16


def test_optimizer_resumes_exactly(tmp_path: Path) -> None:
    """Two replicas, stopped and resumed half way, end where an uninterrupted run ends."""

    def run(stops: bool) -> torch.Tensor:
        workers, path = Workers(2), tmp_path / f"{stops}.pt"
        replicas = _replicas()
        optimizer = Optimizer(replicas, workers, 0.02, 0.01, 0.1)
        progress = Progress.resume(path, optimizer)
        for step in range(6):
            if stops and step == 3:
                progress.save(optimizer)
                replicas = _replicas()
                optimizer = Optimizer(replicas, workers, 0.02, 0.01, 0.1)
                progress = Progress.resume(path, optimizer)
            for number, replica in enumerate(replicas):
                x = torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * step + number))
                replica(x).square().sum().backward()
            optimizer.step(schedule(step / 6, step))
            progress.advance(1.0, 32, optimizer)
        progress.save(optimizer)
        assert trained(path) == (6.0, 192)
        assert torch.equal(replicas[0].layers[0].weight, replicas[1].layers[0].weight)
        return replicas[0].layers[0].weight.detach()

    first, second = run(False), run(True)
    assert torch.equal(first, second)
    assert not torch.equal(first, _replicas()[0].layers[0].weight)


def _replicas() -> list[nn.Module]:
    replicas = []
    for _ in range(2):
        torch.manual_seed(0)
        model = nn.Module()
        model.layers = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
        model.forward = model.layers.forward
        replicas.append(model)
    return replicas


def test_schedule() -> None:
    assert schedule(0.0, 0) < schedule(0.0, 10) < schedule(0.1, 100) == 1.0 == schedule(0.5, 100)
    assert schedule(0.75, 100) == 0.5
    assert schedule(1.0, 100) == 0.0


def test_corpus() -> None:
    """Sequences begin with `<bos>`, are stretches of the files, and about the stated share is in the chat format."""
    tokenizer = tiny_tokenizer()
    files = {f"{n}.py": "".join(f"x{i} = {i * n}\n" for i in range(60)) for n in range(5)}
    corpus = Corpus.encode(files, tokenizer)
    assert np.count_nonzero(corpus.tokens == EOS) == len(files)
    rows = corpus.batch(np.random.default_rng(0), 200, 63)
    assert rows.shape == (200, 64)
    assert torch.all(rows[:, 0] == BOS)
    texts = [tokenizer.decode(row.tolist(), skip_special_tokens=False) for row in rows]
    chats = [text for text in texts if text.startswith("<bos><|turn>user\n")]
    assert abs(len(chats) / len(texts) - CHAT_SHARE) < 0.1
    assert all(text.count(MODEL_HEADER) == 1 for text in chats)
    stream = tokenizer.decode(corpus.tokens.tolist(), skip_special_tokens=False)
    for text in chats:
        user, model = text.removeprefix("<bos><|turn>user\n").split(MODEL_HEADER)
        assert user + model in stream
    assert all(text.removeprefix("<bos>") in stream for text in texts if text not in chats)


def test_split_of_the_standard_library() -> None:
    sources = standard_library()
    names = [*sources.training, *sources.held_out]
    assert len(names) == len(set(names))
    assert 0.02 < len(sources.held_out) / len(names) < 0.1
    assert not any("test" in Path(name).parts or "tests" in Path(name).parts for name in names)
    assert sources == standard_library()
    assert len(SPECIAL) == len(set(SPECIAL))
