"""`paceline eval`: its table, its line of JSON, and what it refuses."""

from __future__ import annotations

import gc
import json
import shutil
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest

import paceline
from paceline.cli.main import run
from paceline.cli.texts import bundled, read_texts
from tests.fixtures.checkpoints import TARGET, changed, target_weights, write, write_target
from tests.fixtures.text_samples import byte_level, gemma_like

KEYS = {"quant", "bits_per_weight", "weight_bytes", "perplexity", "kl_mean", "kl_99_percent", "same_top_token"}


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paceline.bench.machine.BUFFER", 1 << 22)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_target(tmp_path_factory.mktemp("eval") / "tiny")
    gemma_like().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes("\ufeffA paceline is a line of riders. ".encode() * 20)
    return path


def measured(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert run(["eval", *map(str, arguments)]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1
    return json.loads(out) | {"table": err.splitlines()}


def test_the_table_and_the_json(model: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = measured(capsys, model, text, "--positions", 90, "--context", 40)
    assert (found["benchmark"], found["positions"], found["context"]) == ("eval", 90, 40)
    assert found["logits_bytes"] == 90 * TARGET["text_config"]["vocab_size"] * 4
    assert found["read_bandwidth_gb_s"] > 0
    rows = [found["reference"], *found["formats"]]
    assert [row["quant"] for row in rows if row["quant"] not in ("q6", "q5")] == ["f32", "bf16", "q8", "q4"]
    assert all(row.keys() >= KEYS and row["positions"] == 90 for row in rows)
    assert all(row["by_text"].keys() == {str(text)} for row in rows)
    reference, bf16, *_, q4 = rows
    assert reference["kl_mean"] is None
    assert 0 < bf16["kl_mean"] < q4["kl_mean"]
    assert q4["same_top_token"] < bf16["same_top_token"] <= 1
    assert reference["bits_per_weight"] == 32
    assert 4.5 <= q4["bits_per_weight"] < 10  # matrices of 32 columns are padded to 64, and have headers for 256
    head, columns, *lines = found["table"]
    assert "90 positions of 1 texts, at most 40 tokens at a time" in head
    assert columns.split()[0] == "bits/weight"
    assert [line.split()[0] for line in lines] == [row["quant"] for row in rows]
    assert f"{q4['kl_mean']:.5f}" in lines[-1]


def test_json_alone(model: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = measured(capsys, model, text, "--positions", 20, "--quant", "q8", "--reference", "q8", "--json")
    assert found["table"] == []
    [same] = found["formats"]
    assert (same["kl_mean"], same["kl_99_percent"], same["same_top_token"]) == (0, 0, 1)
    assert same["perplexity"] == found["reference"]["perplexity"]


def test_another_model_is_the_reference(model: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed = text.with_name("packed")
    assert run(["convert", str(model), str(packed), "--quant", "q8"]) == 0
    capsys.readouterr()
    found = measured(capsys, packed, text, "--positions", 50, "--reference", model)
    itself = measured(capsys, model, text, "--positions", 50, "--quant", "q8")
    assert (found["reference"]["model"], found["reference"]["quant"]) == (str(model), "f32")
    for key in KEYS:
        assert found["formats"][0][key] == itself["formats"][0][key]


def test_windows_end_at_the_models_limit(model: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = shutil.copytree(model, text.with_name("short"))
    (short / "config.json").write_text(json.dumps(changed(TARGET, max_position_embeddings=16)))
    assert measured(capsys, short, text, "--positions", 50, "--quant", "q8")["context"] == 16
    assert run(["eval", str(short), str(text), "--positions", "50", "--reference", str(model)]) == 2
    assert f"windows of 1024 tokens do not fit {short}; use --context 16 or less" in capsys.readouterr().err


def test_one_model_is_loaded_at_a_time(
    model: Path, text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load, loaded = paceline.load, []

    def watched(*arguments: Any, **settings: Any) -> paceline.Engine:
        gc.collect()
        assert [backend() for backend in loaded] == [None] * len(loaded)
        engine = load(*arguments, **settings)
        loaded.append(weakref.ref(engine.backend))
        return engine

    monkeypatch.setattr(paceline, "load", watched)
    measured(capsys, model, text, "--positions", 20, "--quant", "q8", "--quant", "q4")
    assert len(loaded) == 3


def test_the_bundled_texts(capsys: pytest.CaptureFixture[str]) -> None:
    texts = read_texts(bundled("eval"))
    readme = (next(iter(bundled("eval").values())).parent / "README.md").read_text()
    assert list(texts) == ["code", "dialogue", "facts", "languages", "licence", "story"]
    assert all(f"`{name}.txt`" in readme for name in texts)
    assert 20_000 < sum(len(text.encode()) for text in texts.values()) < 40_000
    found = measured(capsys, "tiny-python", "--positions", 60, "--quant", "q8")
    assert {name: row["positions"] for name, row in found["reference"]["by_text"].items()} == dict.fromkeys(texts, 10)
    assert found["reference"]["quant"] == "bf16"


def test_through_pytorch(model: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = (model, text, "--positions", 40, "--quant", "q8")
    native = measured(capsys, *options)
    found = measured(capsys, *options, "--device", "torch:cpu")
    assert found["device"] == "cpu"
    assert found["reference"]["perplexity"] == pytest.approx(native["reference"]["perplexity"], rel=1e-5)
    assert found["formats"][0]["kl_mean"] == pytest.approx(native["formats"][0]["kl_mean"], rel=0.5)


def test_plot(model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "loss.png"
    measured(capsys, model, text, "--positions", 20, "--reference", "q8", "--quant", "q8", "--plot", picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    assert run(["eval", str(model), "--plot", str(tmp_path / "loss.png")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1  # before anything was measured
    assert "pip install 'paceline[plot]'" in err


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (None, "cannot be read (No such file or directory); give a text file"),
        (b"good\nb\xe4d\n", "is not UTF-8 text (byte 0xe4 at offset 6); convert it first"),
        (b"", "is too short (0 tokens); give a text of some sentences"),
    ],
)
def test_a_bad_text_gets_one_line(
    model: Path, tmp_path: Path, content: bytes | None, cause: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    assert run(["eval", str(model), str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"paceline: error: {path}: {cause}")
    assert len(err.splitlines()) == 1


def test_another_vocabulary(model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_target(tmp_path / "other")
    byte_level().save(str(other / "tokenizer.json"))
    larger = changed(TARGET, vocab_size=448, vocab_size_per_layer_input=448)
    wide = write(tmp_path / "wide", larger, target_weights(larger))
    shutil.copy(model / "tokenizer.json", wide)
    for reference in (other, wide):
        assert run(["eval", str(model), str(text), "--quant", "q8", "--reference", str(reference)]) == 2
        message = f"{model} has another vocabulary than {reference}; give a --reference with the same tokens"
        assert message in " ".join(capsys.readouterr().err.split())


def test_a_model_without_a_tokenizer(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["eval", str(write_target(tmp_path / "mute")), str(text)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "tokenizer.json" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["no-such-model"], "no-such-model"),
        (["tiny-python", "--quant", "q3"], "unknown quantisation 'q3'"),
        (["tiny-python", "--reference", "no-such-model"], "no-such-model"),
        (["tiny-python", "--reference", "q4"], "no format smaller than q4"),
        (["tiny-python", "--positions", "0"], "greater than or equal to 1"),
        (["tiny-python", "--context", "1"], "--context"),
        (["tiny-python", "--plot", "no/such/folder/loss.png"], "no such folder"),
        ([], "MODEL"),
    ],
)
def test_bad_settings_get_one_line(arguments: list[str], cause: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["eval", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert cause in err
    assert len(err.splitlines()) == 1


def test_what_a_cache_format_costs(model: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (model, text, "--positions", 90, "--reference", "bf16", "--quant", "bf16", "--kv")
    same = measured(capsys, *arguments, "auto")["formats"][0]
    assert (same["kv"], same["kl_mean"], same["same_top_token"]) == ("bf16", 0, 1)
    found = measured(capsys, *arguments, "q8")
    assert (found["reference"]["kv"], found["formats"][0]["kv"]) == ("bf16", "q8")
    assert 0 < found["formats"][0]["kl_mean"] < 0.01
    assert found["table"][-1].startswith("bf16, q8 cache")
