"""`paceline verify` on a tiny random pair, whole and broken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from paceline.backends.cpu.backend import CpuBackend
from paceline.bench.audit import TIMED_DEPTHS
from paceline.cli.main import run
from paceline.types import Result, Work
from tests.fixtures.checkpoints import write_drafter, write_target
from tests.fixtures.text_samples import gemma_like

KEYS = {
    "model",
    "quant",
    "threads",
    "identical",
    "cases",
    "first_difference",
    "acceptance_by_depth",
    "acceptance_by_proposer",
    "controller_regret_percent",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_target(tmp_path_factory.mktemp("verify") / "tiny")
    write_drafter(folder.with_name("tiny-assistant"))
    gemma_like().save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text('{"eos_token_id": []}')  # never stops by itself
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffWhere is the key?\r\n\n   \nÜber alle Berge\n".encode())
    return path


def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on the number of rows in a round shows in the logits."""
    whole = CpuBackend.run

    def broken_run(self: CpuBackend, works: list[Work]) -> list[Result]:
        results = whole(self, works)
        for result in results:
            if result.logits is not None:
                result.logits[:, 7] += np.float32(len(result.drafted) > 1)
        return results

    monkeypatch.setattr(CpuBackend, "run", broken_run)


def assert_no_complaints(err: str) -> None:
    """A random pair's low acceptance may be told: whether enough was drafted for that depends on the measured times."""
    assert [line for line in err.splitlines() if not line.startswith("paceline: drafter: ")] == []


def test_a_whole_pair(model: Path, prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--prompts", str(prompts), "--max-tokens", "12", "--quant", "bf16", "--threads", "2"]
    assert run(["verify", str(model), *options, "--json"]) == 0
    out, err = capsys.readouterr()
    assert_no_complaints(err)
    assert len(out.splitlines()) == 1
    found = json.loads(out)
    assert found.keys() >= KEYS
    assert found["identical"] is True
    assert found["first_difference"] is None
    assert found["prompts"] == 2  # blank lines are none, and neither is the byte order mark
    assert found["cases"] == 2 * 3 * 7
    assert found["rows"] == found["cases"] * 12
    assert len(found["acceptance_by_depth"]) == 8
    assert found["tokens_per_second"].keys() == {str(depth) for depth in TIMED_DEPTHS}
    assert isinstance(found["controller_regret_percent"], float)
    assert (found["model"], found["quant"], found["threads"]) == (str(model), "bf16", 2)


def test_the_report_for_people(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", str(model), "--max-tokens", "3", "--quant", "q8", "--threads", "1"]) == 0
    out, err = capsys.readouterr()
    assert_no_complaints(err)
    assert "prompts: 6" in out
    assert "4 drafts, 2 threads" in out  # with one thread loaded, two are the other number
    assert "IDENTICAL: 126 runs, 378 rows" in out
    assert "best fixed" in out
    assert "auto is" in out


@pytest.mark.parametrize("as_json", [False, True])
def test_a_broken_backend(
    model: Path, prompts: Path, as_json: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken(monkeypatch)
    options = ["--prompts", str(prompts), "--max-tokens", "6", "--quant", "f32"]
    assert run(["verify", str(model), *options, *["--json"] * as_json]) == 1
    out, err = capsys.readouterr()
    assert_no_complaints(err)
    if not as_json:
        assert "IDENTICAL" not in out
        assert "DIFFERENT: " in out
        assert "'Where is the key?'" in out
        assert "2 drafts" in out
        assert "differ by 1 at most, those of token 7" in out
        return
    found = json.loads(out)
    assert found["identical"] is False
    assert 0 < found["different_cases"] < found["cases"]
    first = found["first_difference"]
    assert (first["prompt"], first["sampling"], first["case"]) == ("Where is the key?", "greedy", "2 drafts")
    assert first["largest_difference"] == pytest.approx(1)
    assert first["largest_difference_at"] == 7
    assert len(first["expected_top"]) == len(first["found_top"]) == 5
    assert first["expected_top"] != first["found_top"] or first["expected_token"] == first["found_token"]


def test_without_a_drafter(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = shutil.copytree(model, tmp_path / "alone")
    options = [str(alone), "--drafter", "none", "--max-tokens", "4", "--quant", "f32", "--threads", "2"]
    assert run(["verify", *options]) == 0
    out = capsys.readouterr().out
    assert "no drafter" in out
    assert "IDENTICAL: 36 runs" in out
    assert run(["verify", *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cases"] == 36
    assert found["acceptance_by_depth"] == []
    assert found["controller_regret_percent"] is None


def test_a_model_that_stops_at_once(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    silent = shutil.copytree(model, tmp_path / "silent")
    shutil.copytree(model.with_name("tiny-assistant"), tmp_path / "silent-assistant")
    vocabulary = json.loads((model / "config.json").read_text())["text_config"]["vocab_size"]
    (silent / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(vocabulary))}))
    assert run(["verify", str(silent), "--quant", "f32"]) == 0
    assert "no speed to measure" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (None, "cannot be read (No such file or directory); --prompts takes a text file"),
        (b"", "has no prompts; write one per line"),
        (b" \n\r\n", "has no prompts; write one per line"),
        (b"good\nb\xe4d\n", "is not UTF-8 text (byte 0xe4 at offset 6); convert it first"),
    ],
)
def test_a_bad_file_gets_one_line(
    model: Path, tmp_path: Path, content: bytes | None, cause: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    assert run(["verify", str(model), "--prompts", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"paceline: error: {path}: {cause}")
    assert len(err.splitlines()) == 1


def test_a_folder_is_no_prompt_file(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", str(model), "--prompts", str(tmp_path)]) == 2
    assert f"{tmp_path}: cannot be read (Is a directory)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["no-such-model"], "no-such-model"),
        (["tiny-python", "--max-tokens", "1"], "greater than or equal to 2"),
        (["tiny-python", "--quant", "q3"], "q3"),
        ([], "MODEL"),
    ],
)
def test_bad_settings_get_one_line(arguments: list[str], cause: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert cause in err
    assert len(err.splitlines()) == 1
