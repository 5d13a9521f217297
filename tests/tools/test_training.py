"""Training sees exactly what decoding sees, and its parts do what they say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tools.tiny_python import drafter as drafters
from tools.tiny_python import target as targets
from tools.tiny_python.data import CHAT_SHARE, Corpus, standard_library
from tools.tiny_python.drafter import balanced_clusters, distillation_loss, new_drafter
from tools.tiny_python.export import write_drafter, write_target
from tools.tiny_python.target import new_target, next_token_loss, target_of
from tools.tiny_python.tokenizer import BOS, EOS, MODEL_HEADER, SPECIAL

from paceline.checkpoint import Checkpoint, resolve
from paceline.train.optimizer import Parameters
from paceline.train.run import replica
from tests.fixtures.pairs import tiny_tokenizer


@pytest.fixture(scope="module")
def first_pair() -> tuple[Parameters, Parameters]:
    target = new_target(0)
    return target, new_drafter(target, 0)


def test_every_weight_is_trained(first_pair: tuple[Parameters, Parameters]) -> None:
    """Losses compile as one graph, a gradient reaches all leaves, and a step against it lowers the loss."""
    target, drafter = map(replica, first_pair)
    tokens = torch.randint(0, targets.VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))
    fixed = target_of({name: weights.detach() for name, weights in target.items()})
    for weights, loss_of in ((target, next_token_loss), (drafter, lambda w, t: distillation_loss(fixed, w, t))):
        loss = torch.compile(loss_of, backend="eager", fullgraph=True, dynamic=False)(weights, tokens)
        loss.backward()
        for name, leaf in weights.items():
            assert not leaf.requires_grad or leaf.grad.abs().sum() > 0, name
        with torch.no_grad():
            for leaf in weights.values():
                if leaf.requires_grad:
                    leaf -= 0.01 * leaf.grad
            assert loss_of(weights, tokens) < loss


def test_what_is_written_is_read(first_pair: tuple[Parameters, Parameters], tmp_path: Path) -> None:
    """Under the official names, bit for bit."""
    write_target(first_pair[0], tiny_tokenizer(), tmp_path / "target", "a card")
    write_drafter(first_pair[1], tmp_path / "drafter")
    for weights, folder, config in zip(first_pair, ("target", "drafter"), (targets, drafters), strict=True):
        read = resolve(Checkpoint.open(tmp_path / folder), config.CONFIG)
        assert not read.skipped
        assert read.refs.keys() == weights.keys()
        assert all(np.array_equal(read[name].read(), tensor.numpy()) for name, tensor in weights.items())


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
