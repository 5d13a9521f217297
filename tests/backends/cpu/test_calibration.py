"""Calibration: what the native code sees of matrices' inputs, and what conversion makes of it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from torch import nn

import paceline
from paceline.backends.cpu.backend import CpuBackend
from paceline.backends.cpu.calibration import DRAFTED, LEAST_ROWS, ROWS, calibrate, importance
from paceline.backends.cpu.convert import convert
from paceline.backends.cpu.packfile import open_pack
from paceline.backends.cpu.weights import Weights, pack_checkpoint
from paceline.checkpoint import Checkpoint, resolve
from paceline.checkpoint.sizes import weight_bytes
from paceline.cli.main import run as paceline_run
from paceline.cli.texts import bundled, read_texts
from paceline.config import TargetConfig
from paceline.errors import BackendError, CheckpointError, PromptError, SettingsError
from paceline.memory import AUTO_SHARE
from paceline.types import GREEDY, Draft, Work
from tests.fixtures.backends import all_logits
from tests.fixtures.pairs import VOCABULARY, WINDOW, write_pair
from tests.models.test_parity import head_of, read_pair

LENGTH = 5 * WINDOW
TEXTS = {"story": "the riders are in line and the one in front rides at the pace of all. " * 12, "short": "no more"}


@pytest.fixture(scope="module", params=["e2b", "12b", "26b"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("calibrate")
    return write_pair(folder, request.param, seed=6, head=head_of(request.param), text=True)


@pytest.fixture(scope="module")
def e2b(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_pair(tmp_path_factory.mktemp("calibrate"), "e2b", seed=7, text=True)


def opened(pair: tuple[Path, Path], quant: str = "f32", **sizes: int) -> tuple[CpuBackend, Weights, Weights]:
    checkpoints = [Checkpoint.open(folder) for folder in pair]
    configs = checkpoints[0].target_config(), checkpoints[1].drafter_config()
    weights = [pack_checkpoint(resolve(c, f), f, quant) for c, f in zip(checkpoints, configs, strict=True)]
    sizes = {"threads": 2, "context": 128, "max_rows": 32} | sizes
    backend = CpuBackend((configs[0], weights[0]), (configs[1], weights[1]), **sizes)
    return backend, *weights


def tokens_of(count: int = LENGTH) -> list[int]:
    return np.random.default_rng(3).integers(3, VOCABULARY, count).tolist()


# -- a slow twin: the inputs of transformers' own layers ---------------------------------------------------------------


@contextmanager
def inputs_of(model: hf.PreTrainedModel) -> Iterator[dict[str, list[np.ndarray]]]:
    """Rows [n, columns] that each of a model's matrices is multiplied with, by native name."""
    rows: dict[str, list[np.ndarray]] = {}
    hooks = []

    def keep(name: str, x: torch.Tensor) -> None:
        rows.setdefault(name, []).append(x.reshape(-1, x.shape[-1]).double().numpy())

    def keep_experts(name: str, module: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        x, chosen, _ = given
        for expert in range(module.num_experts):
            mine = x.reshape(-1, x.shape[-1])[(chosen.reshape(len(chosen), -1) == expert).any(-1)]
            gate, up = nn.functional.linear(mine, module.gate_up_proj[expert]).chunk(2, dim=-1)
            for part in ("gate_proj", "up_proj"):
                keep(f"{name}.{part}.{expert}", mine)
            keep(f"{name}.down_proj.{expert}", module.act_fn(gate) * up)

    for full, module in model.named_modules():
        name = full.removeprefix("model.").removeprefix("language_model.")
        if isinstance(module, nn.Linear):
            name = "embed_tokens.weight" if name == "lm_head" else f"{name}.weight"
            hooks.append(module.register_forward_pre_hook(lambda _, given, name=name: keep(name, given[0])))
        elif type(module).__name__ == "Gemma4TextExperts":
            hooks.append(module.register_forward_pre_hook(lambda m, given, name=name: keep_experts(name, m, given)))
    yield rows
    for hook in hooks:
        hook.remove()


def assert_seen(backend: CpuBackend, weights: Weights, rows: dict[str, list[np.ndarray]]) -> None:
    """The backend has seen these rows, and no others."""
    for name, matrix in weights.matrices:
        count, squares = backend.seen(matrix)
        expected = np.concatenate(rows.pop(name, [np.zeros((0, matrix.shape[1]))]))
        assert count == len(expected), name
        np.testing.assert_allclose(squares, (expected**2).sum(0), rtol=2e-3, atol=2e-4 * count, err_msg=name)


@torch.no_grad()
def test_the_target_sees_what_transformers_sees(pair: tuple[Path, Path]) -> None:
    theirs, tokens = read_pair(*pair).hf_target, tokens_of()
    with inputs_of(theirs) as rows:
        theirs(input_ids=torch.tensor([tokens]))
    backend, weights, _ = opened(pair)
    backend.observe()
    all_logits(backend, backend.open_slot(), tokens)
    assert len(rows["layers.0.self_attn.o_proj.weight"][0]) == LENGTH
    assert_seen(backend, weights, rows)
    assert not [name for name in rows if name.startswith(("layers", "lm_head", "embed", "per_layer"))]


@torch.no_grad()
def test_the_drafter_sees_what_transformers_sees(pair: tuple[Path, Path]) -> None:
    theirs, tokens = read_pair(*pair), tokens_of()
    out = theirs.hf_target(
        input_ids=torch.tensor([tokens]), return_shared_kv_states=True, output_hidden_states=True, use_cache=False
    )
    visible = {"full_attention": LENGTH, "sliding_attention": WINDOW}
    shared = {kind: tuple(part[:, :, -visible[kind] :] for part in out.shared_kv_states[kind]) for kind in visible}
    hidden, token = out.hidden_states[-1][:, -1:], tokens[5]
    backend, _, weights = opened(pair)
    slot = backend.open_slot()
    backend.run([Work(slot, 0, tokens[: -ROWS // 2])])
    backend.run([Work(slot, LENGTH - ROWS // 2, tokens[-ROWS // 2 :], GREEDY)])
    backend.observe()
    backend.run([Work(slot, LENGTH, [token], GREEDY, Draft(length=DRAFTED, simulated=0))])
    with inputs_of(theirs.hf_drafter) as rows:
        for _ in range(DRAFTED):
            embedded = theirs.hf_target.get_input_embeddings()(torch.tensor([[token]]))
            step = theirs.hf_drafter(
                inputs_embeds=torch.cat((embedded, hidden), dim=-1),
                position_ids=torch.tensor([[LENGTH]]),
                shared_kv_states=shared,
            )
            hidden, token = step.last_hidden_state, int(step.logits[0, 0].argmax())
    if "ordered_head.weight" in weights.tensors:
        rows["ordered_head.weight"] = list(rows["masked_embedding.centroids.weight"])
        rows.pop("embed_tokens.weight", None)
    assert len(rows["pre_projection.weight"]) == DRAFTED
    assert_seen(backend, weights, rows)
    assert not rows


@pytest.mark.parametrize("quant", ["bf16", "q8"])
def test_rows_are_seen_in_every_activation_format(e2b: tuple[Path, Path], quant: str) -> None:
    tokens = tokens_of()
    found = []
    for fmt in ("f32", quant):
        backend, weights, _ = opened(e2b, fmt)
        backend.observe()
        all_logits(backend, backend.open_slot(), tokens)
        found.append({name: backend.seen(matrix) for name, matrix in weights.matrices})
    for name, (count, exact) in found[0].items():
        other, squares = found[1][name]
        assert other == count
        assert np.linalg.norm(squares - exact) <= 0.1 * np.linalg.norm(exact), name


def test_observing_changes_nothing(pair: tuple[Path, Path]) -> None:
    backend, weights, _ = opened(pair, "q8")
    tokens = tokens_of()

    def run() -> list[np.ndarray]:
        slot = backend.open_slot()
        logits = all_logits(backend, slot, tokens)
        (round_,) = backend.run([Work(slot, LENGTH, [7], GREEDY, Draft(length=DRAFTED), logits=True)])
        backend.close_slot(slot)
        return [logits, round_.logits, np.array(round_.drafted)]

    plain = run()
    backend.observe()
    for expected, found in zip(plain, run(), strict=True):
        np.testing.assert_array_equal(expected, found)
    head = weights.tensors["embed_tokens.weight"]
    assert backend.seen(head)[0] == LENGTH + 1 + DRAFTED
    backend.observe()  # from zero again
    assert backend.seen(head)[0] == 0


def test_nothing_is_seen_before_it_is_asked_for(e2b: tuple[Path, Path]) -> None:
    backend, weights, _ = opened(e2b)
    with pytest.raises(ValueError, match="nothing is observed"):
        backend.seen(weights.tensors["embed_tokens.weight"])


# -- importance --------------------------------------------------------------------------------------------------------


class Seen:
    """A backend that has seen given numbers."""

    def __init__(self, seen: dict[int, tuple[int, np.ndarray]]) -> None:
        self._seen = seen

    def seen(self, matrix: object) -> tuple[int, np.ndarray]:
        return self._seen[id(matrix)]


def found_in(rows_and_squares: list[tuple[int, list[float]]]) -> dict[str, np.ndarray]:
    matrices = [paceline._cpu.Matrix("f32", 16, 2) for _ in rows_and_squares]
    seen = {id(m): (n, np.array(s)) for m, (n, s) in zip(matrices, rows_and_squares, strict=True)}
    tensors = {"experts": matrices} if len(matrices) > 1 else {"one": matrices[0]}
    return importance(Seen(seen), Weights("q4", tensors))  # type: ignore[arg-type]


def test_experts_that_saw_little_take_the_mean() -> None:
    many = LEAST_ROWS
    found = found_in([(many, [3.0 * many, 1.0 * many]), (many - 1, [0.0, 1e6]), (0, [0.0, 0.0])])
    mean = np.array([3.0 * many, 1.0 * many + 1e6])
    np.testing.assert_allclose(found["experts.0"], [1.5, 0.5])
    for other in ("experts.1", "experts.2"):
        np.testing.assert_allclose(found[other], mean / mean.mean(), rtol=1e-6)


def test_a_matrix_that_saw_nothing_has_no_importance() -> None:
    assert found_in([(0, [0.0, 0.0])]) == {}
    assert found_in([(5, [0.0, 0.0])]) == {}
    assert found_in([(0, [0.0, 0.0]), (0, [0.0, 0.0])]) == {}
    np.testing.assert_allclose(found_in([(1, [0.0, 4.0])])["one"], [0.0, 2.0])


def test_activations_that_are_no_numbers() -> None:
    with pytest.raises(BackendError, match="inputs of one are no numbers"):
        found_in([(1, [1.0, np.inf])])


def test_a_pair_is_calibrated(pair: tuple[Path, Path]) -> None:
    checkpoints = [Checkpoint.open(folder) for folder in pair]
    target = checkpoints[0], checkpoints[0].target_config()
    drafter = checkpoints[1], checkpoints[1].drafter_config()
    heard = []
    found = calibrate(target, drafter, TEXTS, "q4", 2, lambda *told: heard.append(told))
    assert found.quant == "file"
    assert found.tokens > 2 * ROWS
    assert heard[-1] == ("calibration", found.tokens, found.tokens)
    assert [done for _, done, _ in heard] == sorted(done for _, done, _ in heard)
    for one, part in zip((found.target, found.drafter), opened(pair)[1:], strict=True):
        assert one.keys() == dict(part.matrices).keys()
        for name, matrix in part.matrices:
            assert one[name].dtype == np.float32
            assert one[name].shape == matrix.shape[1:]
            assert one[name].mean() == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("held", ["file", "bf16", "q4"])
def test_weights_are_held_as_memory_allows(e2b: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, held: str) -> None:
    checkpoint = Checkpoint.open(e2b[0])
    config = checkpoint.target_config()
    size = weight_bytes(config, held, resolve(checkpoint, config).elements)
    monkeypatch.setattr("paceline.backends.cpu.calibration.available_memory", lambda: size / AUTO_SHARE + 1)
    made: list[weakref.ref[CpuBackend]] = []

    class Watched(CpuBackend):
        def __init__(self, target: tuple[TargetConfig, Weights], *others: object, **sizes: int) -> None:
            assert target[1].quant == held
            made.append(weakref.ref(self))
            super().__init__(target, *others, **sizes)

    monkeypatch.setattr("paceline.backends.cpu.calibration.CpuBackend", Watched)
    assert calibrate((checkpoint, config), None, TEXTS, "q4", 1).quant == held
    assert [one() for one in made] == [None]  # before the weights are packed again


def test_a_model_of_two_positions(e2b: tuple[Path, Path]) -> None:
    checkpoint = Checkpoint.open(e2b[0])
    config = replace(checkpoint.target_config(), max_positions=2)
    assert calibrate((checkpoint, config), None, TEXTS, "q4", 1).tokens % 2 == 0  # each token after a bos token


# -- conversion --------------------------------------------------------------------------------------------------------


def test_a_calibrated_folder(pair: tuple[Path, Path], tmp_path: Path) -> None:
    plain = convert(*pair, tmp_path / "plain", "q4", threads=1)
    done = convert(*pair, tmp_path / "out", "q4", threads=1, texts=TEXTS)
    assert plain.calibration is None
    assert done.bits_per_weight == plain.bits_per_weight
    checkpoint = Checkpoint.open(pair[0])
    config = checkpoint.target_config()
    expected = pack_checkpoint(resolve(checkpoint, config), config, "q4", importance=done.calibration.target)
    parts = [dict(open_pack(tmp_path / name / "model.paceline", config, 1).matrices) for name in ("plain", "out")]
    for name, matrix in expected.matrices:
        np.testing.assert_array_equal(parts[1][name].packed(), matrix.packed(), err_msg=name)
        same = np.array_equal(parts[0][name].packed(), matrix.packed())
        assert same == (matrix.format in ("bf16", "f32")), name  # the router
    text = paceline.load(str(tmp_path / "out"), context=64).generate([5, 6, 7], max_tokens=3)
    assert len(text.tokens) > 0


def test_a_calibrated_folder_says_so(
    e2b: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXTS["story"])
    out = str(tmp_path / "out")
    assert paceline_run(["convert", str(e2b[0]), out, "--calibration-text", str(text)]) == 0
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("calibrated on ")
    assert first.endswith("weights held as file meanwhile")
    assert "q4" in last
    assert paceline_run(["inspect", out]) == 0
    tokens = first.split()[2]
    assert f"packed weights, calibrated on {tokens} tokens" in capsys.readouterr().out


def test_the_bundled_texts_are_not_those_of_eval() -> None:
    ours, theirs = (read_texts(bundled(name)) for name in ("calibration", "eval"))
    assert len(ours) >= 5
    assert sum(map(len, ours.values())) > 20_000

    def lines(texts: dict[str, str]) -> set[str]:
        return {line.strip() for text in texts.values() for line in text.splitlines() if len(line.strip()) > 24}

    assert not lines(ours) & lines(theirs)


def test_calibration_refuses_what_it_cannot_do(e2b: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(PromptError, match="nothing: is empty"):
        convert(*e2b, out, "q4", threads=1, texts={"nothing": ""})
    for quant in ("file", "f32", "bf16", "q8"):
        with pytest.raises(SettingsError, match=f"{quant} gains nothing from calibration; use it with q6, q5, q4"):
            convert(*e2b, out, quant, threads=1, texts=TEXTS)
    (e2b[0] / "tokenizer.json").rename(tmp_path / "kept.json")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        convert(*e2b, out, "q4", threads=1, texts=TEXTS)
    (tmp_path / "kept.json").rename(e2b[0] / "tokenizer.json")
    assert not list(tmp_path.iterdir())


def test_a_text_that_is_missing(e2b: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = tmp_path / "none.txt"
    assert paceline_run(["convert", str(e2b[0]), str(tmp_path / "out"), "--calibration-text", str(wanted)]) != 0
    assert capsys.readouterr().err.splitlines() == [
        f"paceline: error: {wanted}: cannot be read (No such file or directory); give a text file"
    ]
