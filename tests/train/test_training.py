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
from paceline.errors import PairError, PromptError, SettingsError
from paceline.train import capture, work
from paceline.train.acceptance import acceptance, repeats
from paceline.train.shape import new_config, official_json
from paceline.train.texts import read_prompts
from paceline.train.work import WorkFolder
from paceline.types import GREEDY, SamplingParams
from tests.fixtures.gemma3 import write_gemma3
from tests.fixtures.pairs import write_pair
from tests.models.test_parity import assert_close, our_pair

QUICK = ("--tokens", "1500", "--length", "160", "--minutes", "0.03", "--threads", "2")
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
    scores = drafters.logits(drafter, ops, state[0], rows.positions)
    scored = scores > -1e38  # by a head of centroids only some are
    assert scored.any()
    assert_close(scores[scored], found.logits[0][scored])
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
        options = ["--tokens", "100000", "--length", "160", "--minutes", "0.4", "--threads", "1", *SMALL]
        return [sys.executable, "-m", "paceline", "train", target, str(tmp_path / name), *options]

    dice, stages = random.Random(0), set()
    for _ in range(10):
        process = subprocess.Popen(command("killed"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        begun = ("drafter: ", "going on")
        assert any(what in line for line in process.stderr for what in begun)  # it has imported what it needs
        time.sleep(dice.uniform(0, 4))
        process.send_signal(signal.SIGKILL)
        process.stderr.close()
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
        (["--budget", "0.00001"], "too small; this run needs at least"),
        (["--budget", "inf"], "--budget is inf"),
        (["--budget", "nan"], "--budget"),
        (["--minutes", "inf"], "--minutes is inf"),
        (["--seed", "18446744073709551616"], "--seed"),
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
    """Neither OUT, nor a folder of another kind that is called like the work folder, nor others' copies."""
    (tmp_path / "file").write_text("mine")
    assert run(["train", target, str(tmp_path), *QUICK]) == 2
    assert "exists already" in capsys.readouterr().err
    for name in ("drafter.train", "drafter.old", "drafter.new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("mine")
    command = ["train", target, str(tmp_path / "drafter"), *QUICK, *SMALL]
    assert run(command) == 2
    assert "is not of a training; move it away" in capsys.readouterr().err
    (tmp_path / "drafter.train").rename(tmp_path / "mine")
    assert run(command) == 0
    assert [(tmp_path / name / "file").read_text() for name in ("mine", "drafter.old", "drafter.new")] == ["mine"] * 3
    assert (tmp_path / "file").read_text() == "mine"


def test_killed_at_the_very_end(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the drafter is there and the work folder is not gone: the same command cleans up and reports."""
    command, whole = ["train", target, str(tmp_path / "drafter"), *QUICK, *SMALL], WorkFolder._remove

    def killed(folder: WorkFolder) -> None:
        (folder.path / "first.safetensors").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(WorkFolder, "_remove", killed)
    assert run(command) == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == ["drafter", "drafter.train"]
    monkeypatch.setattr(WorkFolder, "_remove", whole)
    capsys.readouterr()
    assert run(command) == 0
    assert last_line(capsys.readouterr().out)["texts"] == 2 * capture.SHARD
    assert [path.name for path in tmp_path.iterdir()] == ["drafter"]


def test_going_on_needs_the_same_texts(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that was edited meanwhile is another."""
    prompts, whole = tmp_path / "prompts.txt", capture.Shards.write

    def killed(shards: capture.Shards, number: int, texts: list) -> None:
        if number:
            raise KeyboardInterrupt
        whole(shards, number, texts)

    monkeypatch.setattr(capture.Shards, "write", killed)
    command = ["train", target, str(tmp_path / "drafter"), *QUICK, *SMALL, "--prompts", str(prompts)]
    prompts.write_text("One\nTwo\nThree\n")
    assert run(command) == 130
    prompts.write_text("One\nTwo\nFour\n")
    monkeypatch.setattr(capture.Shards, "write", whole)
    capsys.readouterr()
    assert run(command) == 2
    assert "was begun with texts" in capsys.readouterr().err
    prompts.write_text("One\nTwo\nThree\n")
    (tmp_path / "drafter.train" / "state.pt.x.part").write_bytes(b"half")
    assert run(command) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["drafter", "prompts.txt"]


def test_prompts_that_are_too_long(pair: tuple[Path, Path]) -> None:
    """They are left out whole, with one line: a chat template must not be cut."""
    engine = paceline.load(str(pair[0]), drafter="none", context=49, threads=1)
    lines, notices = ["Hi", "Ho", "word " * 30, "word " * 3000], []
    found = read_prompts(engine, lines, [], 48, 0, notices.append)
    assert sorted(found.training + found.held_out) == sorted(engine.encode(line) for line in lines[:2])
    assert notices == ["prompts: 2 of 4 are left out because they are longer than half of --length 48"]


def test_a_prompt_that_is_given_often_is_held_out_as_a_whole(target: str) -> None:
    engine = paceline.load(target, drafter="none", threads=1)
    lines = [f"prompt {number}" for number in range(20)]
    found = read_prompts(engine, lines * 8, [], 48, 0)
    assert len(found.held_out) == 2
    assert len(found.training) == 18 * 8
    assert not [prompt for prompt in found.held_out if prompt in found.training]
    with pytest.raises(PromptError, match="too little text"):
        read_prompts(engine, lines[:1] * 8, [], 48, 0)


@pytest.mark.parametrize("shape", ["e2b", "12b"])
def test_official_spelling(shape: str, tmp_path: Path) -> None:
    """Of a drafter that comes from a GGUF: transformers reads it, and so do we."""
    folders = write_pair(tmp_path, shape, head="centroid" if shape == "e2b" else "dense")
    target, drafter = (Checkpoint.open(folder) for folder in folders)
    config = drafter.drafter_config()
    mine = official_json(config, target.target_config())
    assert drafter_config(mine) == config
    (folders[1] / "config.json").write_text(json.dumps(mine))
    classes = {"e2b": hf.Gemma4AssistantForCausalLM, "12b": hf.Gemma4UnifiedAssistantForCausalLM}
    theirs = classes[shape].from_pretrained(folders[1], dtype=torch.float32).eval()
    assert_drafts_alike(*our_pair(*folders), theirs)


def test_a_full_disk(target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:  # type: ignore[no-untyped-def]
    whole = work.atomic_file

    def full(path: Path):  # type: ignore[no-untyped-def]
        if path.name.startswith("00001"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(path)

    monkeypatch.setattr(work, "atomic_file", full)
    command = ["train", target, str(tmp_path / "drafter"), *QUICK, *SMALL]
    assert run(command) == 2
    err = capsys.readouterr().err
    assert "No space left on device); free some" in err
    assert "Traceback" not in err
    monkeypatch.setattr(work, "atomic_file", whole)
    assert run(command) == 0  # it goes on


def test_a_target_of_one_kind_of_layer(tmp_path: Path) -> None:
    config = target_config(TARGETS["e2b"] | {"layer_types": ["full_attention"] * 35})
    with pytest.raises(PairError, match="no sliding-attention layers"):
        new_config(config)


@pytest.mark.parametrize("shape", TARGETS)
def test_shapes_of_official_targets(shape: str) -> None:
    """New drafters have the official sizes, and fit."""
    from paceline.bench.shapes import official_drafter

    target = target_config(TARGETS[shape])
    mine, official = new_config(target), official_drafter(shape)
    assert drafter_config(official_json(mine, target)) == mine
    check_pair(target, mine)
    assert (mine.hidden_size, mine.heads, mine.layers) == (official.hidden_size, official.heads, official.layers)


def test_acceptance_counts(pair: tuple[Path, Path]) -> None:
    """Against the rounds of two texts, counted by hand; a text that loops is left out."""
    engine = paceline.load(str(pair[0]), drafter=str(pair[1]), threads=1)
    prompts, params = [[2, 30, 40], [2, 50]], SamplingParams(temperature=1)
    found = acceptance(engine, prompts, params, 40)
    rounds = []
    for seed, prompt in enumerate(prompts):
        sampling = SamplingParams(temperature=1, seed=seed)
        with engine.stream(prompt, sampling=sampling, max_tokens=40, draft_tokens=4) as stream:
            rounds += [event.accepted for event in list(stream)[1:]]
    assert (found.texts, found.loops, found.rounds) == (2, 0, len(rounds))
    assert found.accepted == tuple(sum(accepted > depth for accepted in rounds) for depth in range(4))
    assert found.length == 1 + sum(rounds) / len(rounds)
    looping = acceptance(engine, prompts, SamplingParams(bias=((7, 100.0),)), 40)
    assert (looping.texts, looping.loops, looping.rounds) == (2, 2, 0)
    with pytest.raises(SettingsError):
        acceptance(engine, prompts, params, 0)


def test_what_repeats() -> None:
    assert not repeats(list(range(100)))
    assert repeats([*range(20), 99, *range(20)])
    assert not repeats([*range(19), 99, *range(19)])
    assert repeats([5] * 21)
    assert not repeats([])
