"""Streamed deltas join to what decoding everything at once gives, whatever the tokens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from paceline.errors import CheckpointError
from paceline.text import Detokenizer, Tokenizer
from tests.fixtures.text_samples import byte_level, gemma_like

KINDS = {"gemma": gemma_like, "bytes": byte_level}

TEXT = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from(" ▁\n<>ab🚴日é\N{REPLACEMENT CHARACTER}")))


def streamed(tokenizer: Tokenizer, ids: list[int], special: bool = False) -> list[str]:
    detokenizer = tokenizer.detokenizer(special=special)
    return [*(detokenizer.push(token) for token in ids), detokenizer.finish()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("special", [False, True])
@given(data=st.data())
def test_random_tokens_join_to_decode(kind: str, special: bool, data: st.DataObject) -> None:
    tokenizer = Tokenizer(KINDS[kind]())
    unknown_too = st.integers(0, tokenizer.vocab_size + 3)
    ids = data.draw(st.lists(unknown_too | _byte_tokens(tokenizer), max_size=40))
    assert "".join(streamed(tokenizer, ids, special)) == tokenizer.decode(ids, special=special)


def _byte_tokens(tokenizer: Tokenizer) -> st.SearchStrategy[int]:
    """Tokens of single bytes above ASCII, so that valid, broken and cut characters are common."""
    names = ["<0xE2>", "<0x96>", "<0x81>", "<0xF0>", "<0xED>", "<0xA0>", "â", "ĸ", "ģ", "ð", "í", "ł"]
    return st.sampled_from([token for name in names if (token := tokenizer.token_id(name)) is not None])


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXT)
def test_text_comes_back(kind: str, text: str) -> None:
    tokenizer = Tokenizer(KINDS[kind]())
    ids = tokenizer.encode(text)
    expected = tokenizer.decode(ids)
    assert "".join(streamed(tokenizer, ids)) == expected
    if kind == "bytes" and "<" not in text:  # Gemma's ▁ stands for a space, so only bytes come back one to one
        assert expected == text


DECODERS = {
    "gemma": decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
    "replace fused": decoders.Sequence([decoders.Fuse(), decoders.Replace("▁", "__")]),
    "bytes, then replace": decoders.Sequence([decoders.ByteLevel(), decoders.Replace("a", "bb")]),
    "byte level": decoders.ByteLevel(),
}
STRINGS = [
    "▁",
    "▁▁",
    "▁a",
    "a",
    "a▁",
    " ",
    "  b",
    "<0x20>",
    "<0xe2>",
    "<0x96>",
    "<0x81>",
    "<0x0>",
    "Ġa",
    "â",
    "Ģ",
    "日",
]


@pytest.mark.parametrize("name", DECODERS)
@given(ids=st.lists(st.integers(0, len(STRINGS) - 1), max_size=20))
def test_every_supported_decoder(name: str, ids: list[int]) -> None:
    backend = Backend(models.BPE({text: index for index, text in enumerate(STRINGS)}, []))
    backend.decoder = DECODERS[name]
    tokenizer = Tokenizer(backend)
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


def test_text_comes_as_soon_as_it_is_certain() -> None:
    tokenizer = Tokenizer(byte_level())
    ids = tokenizer.encode("ab é")
    deltas = streamed(tokenizer, ids)
    assert deltas[-1] == ""
    assert deltas[:-1] == [tokenizer.decode([token]) for token in ids[:-2]] + ["", "é"]


def test_a_byte_run_waits_for_its_end() -> None:
    tokenizer = Tokenizer(gemma_like())
    run = [tokenizer.token_id(name) for name in ("<0xE6>", "<0x97>", "<0xA5>")]
    a = tokenizer.token_id("a")
    assert streamed(tokenizer, [*run, a]) == ["", "", "", "日a", ""]
    assert streamed(tokenizer, run) == ["", "", "", "日"]


def test_special_tokens_are_hidden_unless_asked_for() -> None:
    tokenizer = Tokenizer(gemma_like())
    ids = tokenizer.encode("<|turn>a<turn|>")
    assert "".join(streamed(tokenizer, ids)) == "a"
    assert "".join(streamed(tokenizer, ids, special=True)) == "<|turn>a<turn|>"


def test_held_back_text_stays_bounded() -> None:
    """The cost of a token must not grow with the text before it: only an unfinished character is kept."""
    looked_up: list[int] = []

    def text(token: int) -> str:
        looked_up.append(token)
        return "▁word"

    detokenizer = Detokenizer(
        {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}]}, text
    )
    for token in range(1000):
        assert detokenizer.push(token) == " word"
    assert looked_up == list(range(1000))  # each token's text was asked for once


@pytest.mark.parametrize(
    "decoder",
    [
        {"type": "WordPiece", "prefix": "##", "cleanup": True},
        {"type": "Replace", "pattern": {"Regex": "a+"}, "content": "b"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        {"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "ByteFallback"}]},
        {
            "type": "Sequence",
            "decoders": [{"type": "Fuse"}, {"type": "Replace", "pattern": {"String": "ab"}, "content": "c"}],
        },
    ],
)
def test_unsupported_decoders_are_refused(decoder: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match="not supported"):
        Detokenizer(decoder, str)


def test_a_tokenizer_without_a_decoder_is_refused() -> None:
    with pytest.raises(CheckpointError, match="has no decoder"):
        Tokenizer(Backend(models.BPE({"a": 0}, [])))
