"""A `tokenizer.json` is a download: it loads and works, or it is refused with one line before the library reads it."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.checkpoint.location import ASSETS
from paceline.errors import CheckpointError, PacelineError, PromptError
from paceline.text import Tokenizer, tokenizer_file
from tests.fixtures.pairs import tiny_tokenizer
from tests.fixtures.text_samples import byte_level, gemma_like

KINDS = {"gemma": gemma_like, "bytes": byte_level, "tiny": tiny_tokenizer}
BUNDLED = ASSETS / "tiny-python" / "tokenizer.json"
Change = Callable[[dict[str, Any]], object]


def content_of(kind: str) -> dict[str, Any]:
    return json.loads(KINDS[kind]().to_str())


def opened(content: object, folder: Path, **settings: Any) -> Tokenizer:
    path = folder / "tokenizer.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return Tokenizer.open(path, {}, **settings)


def put(*steps: Any) -> Change:
    """Replaces what lies at a path of keys; the last step is the new value."""

    def change(content: dict[str, Any]) -> None:
        *path, key, value = steps
        for step in path:
            content = content[step]
        content[key] = value

    return change


REGEX = {"type": "Split", "pattern": {"Regex": "(a+)+b"}, "behavior": "Isolated", "invert": False}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
REFUSED = {
    "a map that asks for 8 GB": put("normalizer", {"type": "Precompiled", "precompiled_charsmap": "/////w=="}),
    "an expression that backtracks": put("pre_tokenizer", REGEX),
    "one within a sequence": put("pre_tokenizer", {"type": "Sequence", "pretokenizers": [REGEX]}),
    "one in the normalizer": put("normalizer", {**REPLACE, "pattern": {"Regex": "(a+)+b"}}),
    "a space becomes a megabyte": put("normalizer", {**REPLACE, "content": "a" * 1_000_000}),
    "nothing is replaced": put("normalizer", {**REPLACE, "pattern": {"String": ""}, "content": ""}),
    "removed text": put("pre_tokenizer", {**REGEX, "pattern": {"String": " "}, "behavior": "Removed"}),
    "a kind that is none": put("normalizer", {"type": ["NFC"]}),
    "a part of another type": put("pre_tokenizer", 7),
    "nested sequences": put(
        "normalizer", {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": []}]}
    ),
    "a thousand steps": put("normalizer", {"type": "Sequence", "normalizers": [REPLACE] * 1000}),
    "another model": put("model", {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}),
    "no model": put("model", None),
    "random merges": put("model", "dropout", 0.5),
    "a prefix": put("model", "continuing_subword_prefix", "###########"),
    "another decoder": put("decoder", {"type": "Strip", "content": " ", "start": 1, "stop": 0}),
    "no decoder": put("decoder", None),
    "a huge id": put("model", "vocab", "huge", 1 << 31),
    "an id beyond the vocabulary": put("model", "vocab", "beyond", 600),
    "a negative id": put("model", "vocab", "negative", -1),
    "a fraction": put("model", "vocab", "fraction", 1.5),
    "a truth value": put("model", "vocab", "truth", True),
    "an id twice": put("model", "vocab", "again", 7),
    "a huge added id": put("added_tokens", 0, "id", 1 << 31),
    "an added id of another type": put("added_tokens", 0, "id", "1"),
    "an added id twice": put("added_tokens", 0, "id", 1),
    "an added token without text": put("added_tokens", 0, "content", ""),
    "an added token numbered anew": put("added_tokens", 0, "content", "never seen"),
    "merges of nothing": put("model", "merges", [["never", "seen"]]),
    "merges of another type": put("model", "merges", 3),
    "a long token": put("model", "vocab", "x" * 5000, 599),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(kind: str, name: str, tmp_path: Path) -> None:
    content = content_of(kind)
    REFUSED[name](content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: ") as caught:
        opened(content, tmp_path, vocab_size=600)
    assert len(str(caught.value)) <= 500


def test_a_missing_byte_is_refused(tmp_path: Path) -> None:
    for kind, name in (("gemma", "<0x41>"), ("bytes", "ĸ")):
        content = content_of(kind)
        del content["model"]["vocab"][name]
        with pytest.raises(CheckpointError, match=r"no token for the byte|Token .* out of vocabulary"):
            opened(content, tmp_path)


@pytest.mark.parametrize("text", ['{"model": {"model": 1, "model": 2}}', "[" * 100_000, "[]", "1", '"\\ud800"', "NaN"])
def test_files_that_are_no_tokenizer(text: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: is not a valid tokenizer"):
        opened(text, tmp_path)


def test_a_large_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_file, "MAX_BYTES", 1000)
    with pytest.raises(CheckpointError, match="larger than"):
        opened(content_of("bytes"), tmp_path)


@pytest.mark.parametrize("bos_id", [-1, 600, 1 << 40, True, 2.0, "<bos>", [2]])
def test_a_bos_token_that_is_none(bos_id: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="bos_token_id"):
        opened(content_of("bytes"), tmp_path, bos_id=bos_id, vocab_size=600)


@pytest.mark.parametrize("value", [0, 1, "false", [], {}])
def test_add_bos_token_of_another_kind(value: object) -> None:
    with pytest.raises(CheckpointError, match="add_bos_token"):
        Tokenizer.open(BUNDLED, {"add_bos_token": value})


@pytest.mark.parametrize("kind", [*KINDS, "bundled"])
def test_what_is_let_through_works(kind: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer.open(BUNDLED, {}) if kind == "bundled" else opened(content_of(kind), tmp_path)
    assert tokenizer.decode(tokenizer.encode("def f(x):\n\treturn 'é'")) == "def f(x):\n\treturn 'é'"
    for token in range(tokenizer.vocab_size):
        tokenizer.token_bytes(token)


TOKENIZERS: dict[str, Tokenizer] = {}


@pytest.fixture(scope="module", autouse=True)
def _tokenizers(tmp_path_factory: pytest.TempPathFactory) -> None:
    for kind in KINDS:
        TOKENIZERS[kind] = opened(content_of(kind), tmp_path_factory.mktemp(kind))
    TOKENIZERS["bundled"] = Tokenizer.open(BUNDLED, {})


PIECES = st.one_of(
    st.characters(codec="utf-8"),
    st.sampled_from([*" \n\t▁aet<>é日🚴", "<|turn>", "<bos>", "added word", "    ", "the "]),
)
TEXT = st.lists(PIECES).map("".join) | st.builds(lambda piece, times: piece * times, PIECES, st.integers(0, 50))


@pytest.mark.parametrize("kind", [*KINDS, "bundled"])
@given(text=TEXT)
def test_encoding_agrees_with_the_library_and_its_bound(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text)
    assert ids == tokenizer._backend.encode(text, add_special_tokens=False).ids
    assert tokenizer.fewest_tokens(text) <= len(ids)
    assert (tokenizer.fewest_tokens(text) > 0) == bool(text)


def test_no_bound_where_tokens_take_spaces_along_or_text_shrinks(tmp_path: Path) -> None:
    greedy, composing = content_of("bytes"), content_of("bytes")
    greedy["added_tokens"][0]["lstrip"] = True
    composing["normalizer"] = {"type": "NFC"}
    for content in (greedy, composing):
        assert opened(content, tmp_path).fewest_tokens("x" * 10_000) == 0
    assert Tokenizer(byte_level()).fewest_tokens("x" * 10_000) == 0


def test_numbers_that_are_no_tokens() -> None:
    tokenizer = TOKENIZERS["gemma"]
    for number in (-1, 1 << 31, 1 << 40):
        assert tokenizer.token_text(number) is None
        assert tokenizer.token_bytes(number) == b""
    for number in (-1, 1 << 40):
        with pytest.raises(PromptError, match="cannot be decoded"):
            tokenizer.decode([number])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(300))
def test_mutated_files(seed: int, tmp_path: Path) -> None:
    """Values replaced, removed, doubled: a load that works, or one line."""
    dice = random.Random(seed)
    content = content_of(dice.choice(list(KINDS)))
    for _ in range(dice.choice((1, 1, 2, 4))):
        _mutate(content, dice)
    try:
        tokenizer = opened(content, tmp_path, vocab_size=600)
    except PacelineError:
        return
    for text in ("def f(x):\n", " é日🚴", "<|turn>added word", ""):
        tokenizer.decode(tokenizer.encode(text))
    for token in range(600):
        tokenizer.token_bytes(token)


def _mutate(content: dict[str, Any], dice: random.Random) -> None:
    values: list[Any] = [
        None,
        True,
        -1,
        0,
        1.5,
        1 << 31,
        1 << 64,
        "",
        "a",
        "\ud800",
        "x" * 9999,
        [],
        {},
        [[]],
        {"type": "NFC"},
    ]
    place: Any = content
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = dice.choice(keys)
        if isinstance(place[key], dict | list) and place[key] and dice.random() < 0.8:
            place = place[key]
            continue
        match dice.randrange(3):
            case 0:
                place[key] = copy.deepcopy(dice.choice(values))
            case 1:
                del place[key]
            case _ if isinstance(place, list):
                place.append(copy.deepcopy(place[key]))
            case _:
                place[str(dice.choice(values))[:50]] = place[key]
        return
