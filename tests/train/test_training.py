"""`paceline train` as users run it, on tiny random models."""

from __future__ import annotations

import errno
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers as hf

import paceline
from paceline.bench.shapes import TARGETS
from paceline.checkpoint import Checkpoint
from paceline.checkpoint.config_json import drafter_config, target_config
from paceline.cli.main import run
from paceline.config import check_pair
from paceline.errors import PairError, SettingsError
from paceline.train import capture
from paceline.train.acceptance import acceptance, repeats
from paceline.train.shape import drafter_json
from paceline.types import GREEDY, SamplingParams
from tests.fixtures.gemma3 import write_gemma3
from tests.fixtures.pairs import write_pair
from tests.models.test_parity import assert_close, our_pair

QUICK = ("--tokens", "1500", "--length", "48", "--minutes", "0.03", "--threads", "2")
SMALL = ("--hidden-size", "32", "--intermediate-size", "48")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_pair(tmp_path_factory.mktemp("train"), "e2b", text=True)


@pytest.fixture
def target(pair: tuple[Path, Path]) -> str:
    return str(pair[0])


def last_line(out: str) -> dict:
    return json.loads(out.splitlines()[-1])


def test_a_new_drafter(target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Dense, so transformers loads it, too, and both give the same logits; and the engine drafts with it."""
    out = tmp_path / "drafter"
    assert run(["train", target, str(out), *QUICK, *SMALL, "--plot", str(tmp_path / "plot.png")]) == 0
    found = last_line(capsys.readouterr().out)
    assert found["settings"]["target"] == target
    assert found["texts"] == 2 * capture.SHARD
    assert len(found["history"]) > 1
    assert found["history"][-1]["loss"] < found["history"][0]["loss"]
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["drafter", "plot.png"]
    assert "base_model" in (out / "README.md").read_text()

    ours, drafter = our_pair(Path(target), out)
    theirs = hf.Gemma4AssistantForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    assert_drafts_alike(ours, drafter, theirs)
    engine = paceline.load(target, drafter=str(out), threads=1)
    settings = {"sampling": SamplingParams(temperature=1, seed=3), "max_tokens": 30}
    assert engine.generate("Hello", **settings, draft_tokens=4).text == engine.generate("Hello", **settings).text


@torch.no_grad()
def assert_drafts_alike(target, drafter, theirs) -> None:  # type: ignore[no-untyped-def]
    """One draft step after some tokens, in our code and in transformers'."""
    from paceline.models import drafter as drafters
    from paceline.models import ops
    from paceline.models.gemma4 import embed
    from paceline.train.sequences import Cache, DraftRows, states
    from paceline.train.shape import sources

    tokens, cache = torch.arange(4, 11)[None], Cache()
    hidden = states(target, tokens, cache)[:, -1:]
    newest = embed(target, torch.tensor([20]))[None]
    rows = DraftRows(drafter, cache, torch.tensor([7]))
    state, feedback = rows.step(newest, hidden)
    layers = dict(zip(("sliding_attention", "full_attention"), sources(target.config), strict=True))
    found = theirs(
        inputs_embeds=torch.cat((newest, hidden), dim=-1),
        position_ids=torch.tensor([[7]]),
        shared_kv_states={kind: cache.rows[layer] for kind, layer in layers.items()},
    )
    assert_close(drafters.logits(drafter, ops, state[0], rows.positions), found.logits[0])
    assert_close(feedback, found.last_hidden_state)


def test_from_a_drafter_and_text(pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One with centroids keeps its form; before and after are reported."""
    text = tmp_path / "text.txt"
    text.write_text("\ufeff" + "It was the best of times, it was the worst of times. " * 40)
    options = ["--from", str(pair[1]), "--text", str(text)]
    assert run(["train", str(pair[0]), str(tmp_path / "drafter"), *QUICK, *options]) == 0
    found = last_line(capsys.readouterr().out)
    assert list(found["acceptance"]) == ["before", "after"]
    assert found["settings"]["data"] == [str(text)]
    mine, given = (Checkpoint.open(path) for path in (tmp_path / "drafter", pair[1]))
    assert mine.drafter_config() == given.drafter_config()
    assert mine.tensors.keys() == given.tensors.keys()


def test_a_part_of_the_vocabulary_for_gemma3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.fixtures.pairs import tiny_tokenizer, write_tokenizer

    target = write_gemma3(tmp_path / "target")
    write_tokenizer(tiny_tokenizer(), target)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("One\n\nTwo\nThree\n")
    options = [*QUICK, *SMALL, "--draft-vocabulary", "100", "--prompts", str(prompts)]
    assert run(["train", str(target), str(tmp_path / "drafter"), *options]) == 0
    assert last_line(capsys.readouterr().out)["acceptance"]["after"]["greedy"]["texts"] == 1
    engine = paceline.load(str(target), drafter=str(tmp_path / "drafter"), threads=1)
    assert engine.drafter_config.draft_vocab_size == 100
    assert engine.generate("One", sampling=GREEDY, max_tokens=20, draft_tokens=4).statistics.drafted


@pytest.mark.slow
def test_killed_at_any_moment(target: str, tmp_path: Path) -> None:
    """Ten times, then to the end: as good as without, and nothing is left but the drafter."""

    def command(name: str) -> list[str]:
        options = ["--tokens", "200000", "--length", "48", "--minutes", "0.4", "--threads", "1", *SMALL]
        return [sys.executable, "-m", "paceline", "train", target, str(tmp_path / name), *options]

    dice, stages = random.Random(0), set()
    for _ in range(10):
        process = subprocess.Popen(command("killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(dice.uniform(2.5, 6))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (tmp_path / "killed").exists()
        names = sorted(path.name for path in (tmp_path / "killed.train").glob("*") if path.suffix != ".part")
        stages.add(tuple(names))
    assert len(stages) > 2  # it gets further
    ends = []
    for name in ("killed", "whole"):
        ended = subprocess.run(command(name), check=True, capture_output=True, text=True)
        assert ("going on" in ended.stderr) == (name == "killed")
        ends.append(last_line(ended.stdout))
        assert sorted(p.name for p in (tmp_path / name).iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "whole"]
    killed, whole = (end["history"][-1] for end in ends)
    assert killed["loss"] == pytest.approx(whole["loss"], rel=0.1)
    assert killed["agreement"] == pytest.approx(whole["agreement"], abs=0.05)


def test_going_on_needs_the_same_settings(target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = tmp_path / "drafter.train"
    work.mkdir()
    (work / "settings.json").write_text(json.dumps({"target": "another"}))
    assert run(["train", target, str(tmp_path / "drafter"), *QUICK]) == 2
    err = capsys.readouterr().err
    assert "was begun with target 'another'" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        (["--prompts", "missing.txt"], "cannot be read"),
        (["--prompts", "empty.txt"], "too little text"),
        (["--prompts", "one.txt"], "too little text"),
        (["--text", "empty.txt"], "too little text"),
        (["--text", "latin.txt"], "is not UTF-8"),
        (["--budget", "0.00001"], "holds too few texts"),
        (["--from", "nothing-there"], "nothing-there"),
        (["--from", "SELF", "--hidden-size", "32"], "has its own sizes"),
        (["--draft-vocabulary", "100000"], "draft_vocab_size"),
        (["--quant", "q3"], "q3"),
        (["--minutes", "0"], "--minutes"),
        (["--length", "4"], "--length"),
        (["--device", "tpu"], "tpu"),
        (["--plot", "nowhere/plot.png"], "no such folder"),
    ],
)
def test_wrong_input_gets_one_line(
    target: str,
    tmp_path: Path,
    options: list[str],
    cause: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "one.txt").write_text("only one\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    options = [target if option == "SELF" else option for option in options]
    assert run(["train", target, "drafter", *QUICK, *options]) == 2
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if "error:" in line]
    assert cause in err
    assert len(errors) == 1
    assert "Traceback" not in err
    assert out == ""


def test_what_exists_is_not_touched(target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    assert run(["train", target, str(tmp_path), *QUICK]) == 2
    assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk(target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:  # type: ignore[no-untyped-def]
    whole = capture.atomic_file

    def full(path: Path):  # type: ignore[no-untyped-def]
        if path.name.startswith("00001"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(path)

    monkeypatch.setattr(capture, "atomic_file", full)
    command = ["train", target, str(tmp_path / "drafter"), *QUICK, *SMALL]
    assert run(command) == 2
    err = capsys.readouterr().err
    assert "No space left on device); free some" in err
    assert "Traceback" not in err
    monkeypatch.setattr(capture, "atomic_file", whole)
    assert run(command) == 0  # it goes on


def test_a_target_of_one_kind_of_layer(tmp_path: Path) -> None:
    config = target_config(TARGETS["e2b"] | {"layer_types": ["full_attention"] * 35})
    with pytest.raises(PairError, match="no sliding-attention layers"):
        drafter_json(config)


@pytest.mark.parametrize("shape", TARGETS)
def test_shapes_of_official_targets(shape: str) -> None:
    """New drafters have the official sizes, and fit."""
    from paceline.bench.shapes import official_drafter

    target = target_config(TARGETS[shape])
    mine, official = drafter_config(drafter_json(target)), official_drafter(shape)
    check_pair(target, mine)
    assert (mine.hidden_size, mine.heads, mine.layers) == (official.hidden_size, official.heads, official.layers)


def test_acceptance_counts(pair: tuple[Path, Path]) -> None:
    """Against the rounds of one text, counted by hand; a text that loops is left out."""
    engine = paceline.load(str(pair[0]), drafter=str(pair[1]), threads=1)
    prompt, params = [2, 30, 40], SamplingParams(temperature=1)
    found = acceptance(engine, [prompt], params, 40)
    with engine.stream(prompt, sampling=SamplingParams(temperature=1, seed=0), max_tokens=40, draft_tokens=4) as stream:
        rounds = [event.accepted for event in stream if event.drafted == 4]
    assert found.rounds == len(rounds)
    assert found.accepted == tuple(sum(accepted > depth for accepted in rounds) for depth in range(4))
    assert found.length == 1 + sum(rounds) / len(rounds)
    with pytest.raises(SettingsError):
        acceptance(engine, [prompt], params, 0)


def test_what_repeats() -> None:
    assert not repeats(list(range(100)))
    assert repeats([*range(20), 99, *range(20)])
    assert not repeats([*range(19), 99, *range(19)])
    assert repeats([5] * 21)
    assert not repeats([])
