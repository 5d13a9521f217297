"""The demo: on a tiny random pair, and its parts with made-up figures."""

import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from paceline.cli import demo
from paceline.cli.main import run
from paceline.types import Event, Generation, Statistics, TokenDelta
from tests.fixtures.checkpoints import write_drafter, write_target
from tests.fixtures.text_samples import gemma_like


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_target(tmp_path_factory.mktemp("demo") / "tiny")
    write_drafter(folder.with_name("tiny-assistant"))
    gemma_like().save(str(folder / "tokenizer.json"))
    return folder


def test_demo(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["demo", "-m", str(model), "--max-tokens", "12", "--quant", "bf16", "--draft-tokens", "2"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "class Server:" in out
    lines = out.splitlines()
    assert lines.index("Plain decoding") < next(i for i, line in enumerate(lines) if line.startswith("With drafts"))
    table = {line.rsplit("  ", 1)[0].strip(): line.rsplit("  ", 1)[-1].strip() for line in lines[-7:]}
    assert table["same text"] == "yes"
    assert set(table) >= {"plain", "with drafts", "speed-up", "acceptance length"}
    assert "alternating runs each" in lines[-1]


def test_demo_fails_if_the_texts_differ(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "_show", lambda *_: ("another text", (1, 2, 3)))
    assert run(["demo", "-m", str(model), "--max-tokens", "4", "--quant", "f32"]) == 1
    assert "NO" in capsys.readouterr().out


def test_demo_needs_a_drafter(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = shutil.copytree(model, tmp_path / "alone")
    assert run(["demo", "-m", str(alone), "--quant", "f32"]) == 2
    assert "give --drafter" in capsys.readouterr().err.splitlines()[-1]


def test_demo_needs_some_text(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["demo", "-m", str(model), "--quant", "f32", "--max-tokens", "1"]) == 2
    assert "greater than or equal to 2" in capsys.readouterr().err.splitlines()[-1]


def test_ctrl_c(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_show", interrupted)
    assert run(["demo", "-m", str(model), "--quant", "f32"]) == 130
    assert capsys.readouterr().err == ""


def made_up(tokens: tuple[int, ...], seconds: float, text: str = "x") -> Generation:
    statistics = Statistics(tokens=len(tokens), seconds=seconds, rounds=2)
    return Generation(text, tokens, "length", statistics)


def test_compare_takes_medians() -> None:
    same = (1, 2, 3, 4, 5)
    plain = [made_up(same, seconds) for seconds in (1, 2, 100)]
    drafted = [made_up(same, seconds) for seconds in (0.5, 1, 0.001)]
    comparison = demo.compare(plain, drafted, [("x", same)])
    assert (comparison.plain, comparison.drafted, comparison.speed_up) == (2, 8, 2)
    assert comparison.acceptance_length == 2
    assert comparison.same_text


@pytest.mark.parametrize("other", [("x", (1, 2)), ("y", (1, 2, 3))])
def test_compare_sees_differences(other: tuple[str, tuple[int, ...]]) -> None:
    same = made_up((1, 2, 3), 1)
    assert not demo.compare([same], [same], [("x", same.tokens), other]).same_text
    assert not demo.compare([same], [made_up(other[1], 1, other[0])], []).same_text


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
    console = Console(file=file, force_terminal=terminal, color_system="standard" if terminal else None)
    engine = SimpleNamespace(stream=Fake().stream)
    assert demo._show(console, engine, 2, 3) == ("[bold]ab" + "c\n", (7, 8, 9))
    coloured = "\x1b[32m[bold]a\x1b[0m\x1b[36mb\x1b[0mc\n\n"
    assert file.getvalue() == (coloured if terminal else "[bold]abc\n\n")
