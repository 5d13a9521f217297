from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import processors

from paceline.errors import CheckpointError, PacelineError, PromptError
from paceline.text import Tokenizer
from tests.fixtures.text_samples import gemma_like


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "tokenizer.json"
    gemma_like().save(str(path))
    return path


def test_special_tokens_in_the_text_are_tokens(path: Path) -> None:
    tokenizer = Tokenizer.open(path, {})
    ids = tokenizer.encode("<|turn>a")
    assert ids == [tokenizer.token_id("<|turn>"), tokenizer.token_id("a")]


@pytest.mark.parametrize(
    ("settings", "expected"), [({}, True), ({"add_bos_token": True}, True), ({"add_bos_token": False}, False)]
)
def test_bos(path: Path, settings: dict[str, object], expected: bool) -> None:
    tokenizer = Tokenizer.open(path, settings, bos_id=2)
    plain = tokenizer.encode("the")
    assert 2 not in plain
    assert tokenizer.encode("the", bos=True) == ([2, *plain] if expected else plain)
    assert tokenizer.encode("<bos>the", bos=True) == [2, *plain]  # never twice


def test_a_bos_of_the_tokenizer_itself_is_not_added(tmp_path: Path) -> None:
    """Rendered templates hold their own bos token, so what `tokenizer.json` would add is left out."""
    backend = Backend.from_str(gemma_like().to_str())
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.open(tmp_path / "tokenizer.json", {}, bos_id=2)
    assert 2 not in tokenizer.encode("the")
    assert tokenizer.encode("the", bos=True).count(2) == 1


def test_a_model_without_bos(path: Path) -> None:
    tokenizer = Tokenizer.open(path, {}, bos_id=None)
    assert tokenizer.encode("the", bos=True) == tokenizer.encode("the")


def test_stored_truncation_is_switched_off(tmp_path: Path) -> None:
    backend = Backend.from_str(gemma_like().to_str())
    backend.enable_truncation(1)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.open(tmp_path / "tokenizer.json", {})
    assert tokenizer.encode("a line of riders") == Tokenizer(gemma_like()).encode("a line of riders")
    assert len(tokenizer.encode("a line of riders")) > 1
    assert len(tokenizer.encode("a")) == 1


def test_half_a_surrogate_pair_is_no_text(path: Path) -> None:
    with pytest.raises(PromptError, match="character 1"):
        Tokenizer.open(path, {}).encode("a\ud800")


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff\xfe"])
def test_damaged_files(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        Tokenizer.open(path, {})
    assert isinstance(caught.value, PacelineError)
    assert str(path) in str(caught.value)
    assert "download it" in str(caught.value)
    assert "\n" not in str(caught.value)
