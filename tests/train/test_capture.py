"""What is captured natively is what the model in PyTorch computes."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import paceline
from paceline.backends.cpu.backend import CpuBackend
from paceline.backends.torch.weights import CheckpointSource
from paceline.bench.shapes import TARGETS
from paceline.checkpoint import Checkpoint, resolve
from paceline.checkpoint.config_json import target_config
from paceline.checkpoint.names import target_tensors
from paceline.checkpoint.sizes import cache_bytes
from paceline.config import TargetConfig
from paceline.errors import BackendError, SettingsError
from paceline.models import ops
from paceline.models.gemma4 import Target, embed, load_target, logits
from paceline.train import capture
from paceline.train.sequences import Cache, states
from paceline.train.shape import sources
from paceline.types import GREEDY, Draft, SamplingParams, Work
from tests.fixtures.backends import cpu_backend
from tests.fixtures.checkpoints import TEXT
from tests.fixtures.gemma3 import write_gemma3
from tests.fixtures.pairs import SHAPES, VOCABULARY, WINDOW, write_pair

LENGTH = 9 * WINDOW  # the last chunk is not whole, and sliding rings have gone round


def target_in_pytorch(folder: Path) -> Target:
    checkpoint = Checkpoint.open(folder)
    config = checkpoint.target_config()
    return load_target(config, CheckpointSource(resolve(checkpoint, config), "f32", torch.device("cpu")))


def captured(backend: CpuBackend, config: TargetConfig, tokens: list[int], length: int) -> dict[str, torch.Tensor]:
    """What the target does over given tokens."""
    recording = capture.Recording(list(tokens), GREEDY)
    capture.Recorder(backend, config, (), len(tokens)).record([recording])
    assert recording.tokens == tokens
    return recording.tensors(length)


def text(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(4, VOCABULARY, count).tolist()


@torch.no_grad()
@pytest.mark.parametrize("shape", [*SHAPES, "gemma3 small", "gemma3 large"])
def test_against_pytorch(shape: str, tmp_path: Path) -> None:
    """States, keys and values of both layers, and the best logits, at every position."""
    if shape.startswith("gemma3"):
        folder = write_gemma3(tmp_path / "target", shape.removeprefix("gemma3 "))
    else:
        folder, _ = write_pair(tmp_path, shape)
    target, backend, tokens = target_in_pytorch(folder), cpu_backend(folder, None), text(LENGTH)
    found = captured(backend, target.config, tokens, LENGTH + 5)
    cache = Cache()
    hidden = states(target, torch.tensor([tokens]), cache)[0]
    expected = {"states": hidden}
    for kind, layer in zip(capture.KINDS, sources(target.config), strict=True):
        keys, values = cache.rows[layer]
        expected |= {f"{kind}.keys": keys[0].transpose(0, 1), f"{kind}.values": values[0].transpose(0, 1)}
    for name, theirs in expected.items():
        ours = found[name].float()
        ours = ours.transpose(0, 1) if "." in name else ours
        assert (ours[:LENGTH] - theirs).abs().max() <= 0.005 * theirs.abs().max(), name  # bfloat16 has 8 bits
        assert not ours[LENGTH:].any(), name
    scores = logits(target, ops, hidden)
    best = scores.topk(capture.KEPT, dim=-1)
    assert torch.equal(found["top_ids"][:LENGTH, :3].long(), best.indices[:, :3])
    shifted = best.values - best.values[:, :1]
    torch.testing.assert_close(found["top_logits"][:LENGTH].float(), shifted, atol=0.01, rtol=0.002)
    assert found["tokens"].tolist() == [*tokens, *[0] * 5]
    assert found["lengths"] == LENGTH
    rows = capture.embeddings(backend, np.array(tokens, np.int32))
    torch.testing.assert_close(torch.from_numpy(rows), embed(target, torch.tensor(tokens)), rtol=1e-3, atol=1e-3)


def test_bytes_of_a_position(tmp_path: Path) -> None:
    folder, _ = write_pair(tmp_path, "12b")
    backend = cpu_backend(folder, None)
    config = Checkpoint.open(folder).target_config()
    found = captured(backend, config, text(40), 40)
    assert sum(tensor.nbytes for tensor in found.values()) == 40 * capture.position_bytes(config) + 4


@pytest.mark.parametrize("kv", ["bf16", "q8"])
def test_formats_of_the_cache(kv: str, tmp_path: Path) -> None:
    """Other formats give the same numbers as f32, rounded."""
    folder, _ = write_pair(tmp_path, "e4b")
    config = Checkpoint.open(folder).target_config()
    rows = []
    for fmt in ("f32", kv):
        backend = cpu_backend(folder, None, kv=fmt)
        slot = backend.open_slot()
        backend.run([Work(slot, 0, text(20))])
        rows.append([backend.keys_values(layer, slot, 4, 16) for layer in sources(config)])
    for exact, rounded in zip(*rows, strict=True):
        apart = np.abs(exact - rounded).max()
        assert 0 < apart <= 0.02 * np.abs(exact).max()


def test_rows_that_the_cache_does_not_hold(tmp_path: Path) -> None:
    folder, _ = write_pair(tmp_path, "text")
    config = Checkpoint.open(folder).target_config()
    backend = cpu_backend(folder, None, max_rows=16)
    sliding, full = sources(config)
    slot = backend.open_slot()
    for start in range(0, 64, 16):
        backend.run([Work(slot, start, text(16))])
    assert backend.keys_values(full, slot, 0, 64).shape[2] == 64
    assert backend.keys_values(sliding, slot, 64 - WINDOW, WINDOW).shape[2] == WINDOW
    for layer, first, count in (
        (sliding, 0, 4),  # the ring has gone round
        (full, 60, 5),
        (full, -1, 2),
        (full, 0, -1),
        (full, 1 << 62, 1),
        (99, 0, 1),
        (-1, 0, 1),
        (len(config.layers) - 1, 0, 1),  # shares the keys and values of another
    ):
        with pytest.raises(ValueError, match=r"does not hold|layer"):
            backend.keys_values(layer, slot, first, count)
    with pytest.raises(IndexError):
        backend.keys_values(full, 7, 0, 1)


def test_states_of_several_works(tmp_path: Path) -> None:
    """Those of the rows that are sampled after, in the order of the works; of a chunk that is not, none."""
    folder, _ = write_pair(tmp_path, "text")
    backend = cpu_backend(folder, None, slots=3)
    first, second, third = (backend.open_slot() for _ in range(3))
    works = [
        Work(first, 0, text(5), GREEDY),
        Work(second, 0, text(4, seed=1)),
        Work(third, 0, text(3, seed=2), GREEDY, Draft(tuple(text(2, seed=3)), simulated=2)),
    ]
    backend.run(works)
    together = backend.states()
    assert len(together) == 1 + 3
    np.testing.assert_array_equal(together[0], backend._decoder.hidden(first))
    np.testing.assert_array_equal(together[3], backend._decoder.hidden(third))


@pytest.mark.parametrize("count", [1, 2, 64, VOCABULARY])
def test_the_best_logits(count: int, tmp_path: Path) -> None:
    """Against a stable sort of all."""
    folder, _ = write_pair(tmp_path, "text")
    backend = cpu_backend(folder, None, threads=2)
    slot, tokens = backend.open_slot(), text(20)
    draft = Draft(tuple(tokens[1:]), simulated=19)
    [result] = backend.run([Work(slot, 0, tokens[:1], GREEDY, draft, logits=True)])
    ids, kept = backend.best(count)
    np.testing.assert_array_equal(ids, np.argsort(-result.logits, axis=-1, kind="stable")[:, :count])
    np.testing.assert_array_equal(kept, np.take_along_axis(result.logits, ids, axis=-1))


def test_the_best_of_a_large_vocabulary() -> None:
    """Of many blocks, the last of them not whole; and all logits alike."""
    for spread in (1, 0):
        native, tokens = wide_model(5003, spread), [1, 2, 3]
        slot = native.open_slot()
        [result] = native.run([Work(slot, 0, tokens[:1], GREEDY, Draft((2, 3), simulated=2), logits=True)])
        ids, _ = native.best(64)
        np.testing.assert_array_equal(ids, np.argsort(-result.logits, axis=-1, kind="stable")[:, :64])


def test_logits_that_are_no_numbers() -> None:
    native = wide_model(600, np.nan)
    native.run([Work(native.open_slot(), 0, [1], GREEDY)])
    with pytest.raises(BackendError, match="are no numbers"):
        native.best(3)


def wide_model(vocabulary: int, spread: float) -> CpuBackend:
    """A random target of so many tokens; with a spread of 0 all have the same logit."""
    settings = TEXT | {"vocab_size": vocabulary, "vocab_size_per_layer_input": vocabulary}
    config, dice = target_config(settings), np.random.default_rng(0)
    shapes = target_tensors(config)
    arrays = {name: dice.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    arrays["embed_tokens.weight"] *= spread
    with tempfile.TemporaryDirectory() as folder:
        save_file({f"model.{name}": array for name, array in arrays.items()}, Path(folder) / "model.safetensors")
        (Path(folder) / "config.json").write_text(json.dumps(settings))
        return cpu_backend(Path(folder), None)


@pytest.mark.parametrize("count", [0, -1, VOCABULARY + 1])
def test_more_logits_than_there_are(count: int, tmp_path: Path) -> None:
    folder, _ = write_pair(tmp_path, "text")
    backend = cpu_backend(folder, None)
    backend.run([Work(backend.open_slot(), 0, text(3), GREEDY)])
    with pytest.raises(BackendError, match="count"):
        backend.best(count)


def test_texts_that_the_target_writes(tmp_path: Path) -> None:
    """Several at once are those of the engine, and what is kept is what each alone gives, bit for bit."""
    folder, _ = write_pair(tmp_path, "e2b", text=True)
    engine = paceline.load(str(folder), drafter="none", context=128, slots=5, prompt_chunk=capture.ROWS, threads=2)
    config, backend = engine.target_config, engine.backend
    prompts = [text(count, seed=count) for count in (1, 2, 33, 34, 40)]
    params = [
        SamplingParams(temperature=2.0, seed=7),
        GREEDY,
        *(SamplingParams(temperature=3.0, seed=i) for i in range(3)),
    ]
    stops = frozenset(range(100, 110))  # so that some end early
    recordings = [capture.Recording(list(p), s) for p, s in zip(prompts, params, strict=True)]
    capture.Recorder(backend, config, stops, 60).record(recordings)
    lengths = [len(one.tokens) for one in recordings]
    assert max(lengths) == 60
    assert min(lengths) < 60
    engine = dataclasses.replace(engine, stop_ids=stops)
    for one, prompt, sampling in zip(recordings, prompts, params, strict=True):
        with engine.stream(prompt, sampling=sampling, max_tokens=60 - len(prompt)) as stream:
            for _ in stream:
                pass
            assert one.tokens == stream.sequence.tokens
        alone = captured(backend, config, one.tokens, 60)
        together = one.tensors(60)
        assert alone.keys() == together.keys()
        for name in alone:
            assert torch.equal(alone[name], together[name]), name


def test_penalties_and_suppressed_tokens(tmp_path: Path) -> None:
    """A model's own settings hold while it writes."""
    folder, _ = write_pair(tmp_path, "e2b", text=True)
    engine = paceline.load(str(folder), drafter="none", context=128, prompt_chunk=capture.ROWS, threads=2)
    params = SamplingParams(temperature=1.0, seed=3, repetition_penalty=1.5, suppressed=tuple(range(50, 400)))
    recording = capture.Recording(text(40), params)
    capture.Recorder(engine.backend, engine.target_config, engine.stop_ids, 70).record([recording])
    with engine.stream(text(40), sampling=params, max_tokens=30) as stream:
        for _ in stream:
            pass
    assert recording.tokens == stream.sequence.tokens
    written = recording.tokens[40:]
    assert len(written) > 5
    assert not set(written) & set(range(50, 400))


def test_how_many_texts_at_once() -> None:
    assert capture.at_once(target_config(TARGETS["e2b"]), 512) == capture.TOGETHER
    for shape in TARGETS:
        config = target_config(TARGETS[shape])
        for length in (64, 512, 2048):
            count = capture.at_once(config, length)
            assert count == 1 or count * cache_bytes(config, length) <= capture.CACHE_BYTES
            assert count % capture.SHARD == 0 or count < capture.SHARD


def test_what_is_written_is_read(tmp_path: Path) -> None:
    shards = capture.Shards(tmp_path)
    texts = [{"tokens": torch.full((6,), row, dtype=torch.int32)} for row in range(capture.SHARD)]
    shards.write(3, texts)
    assert shards.read(3, [2, 5])["tokens"].tolist() == [[2] * 6, [5] * 6]
    assert [path.name for path in tmp_path.iterdir()] == ["00003.safetensors"]
    with pytest.raises(SettingsError, match="cannot be written"):
        capture.Shards(tmp_path / "missing").write(0, texts)


def test_more_than_a_context(tmp_path: Path) -> None:
    folder, _ = write_pair(tmp_path, "text")
    backend = cpu_backend(folder, None, context=32)
    with pytest.raises(BackendError, match="context"):
        captured(backend, Checkpoint.open(folder).target_config(), text(40), 40)
    backend.open_slot()  # it was given back
