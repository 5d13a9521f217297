"""Tokenizers made of GGUF files give the ids of those that the files were made of."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers

from paceline.checkpoint import Checkpoint, target_tensors
from paceline.checkpoint.config_json import target_config
from paceline.checkpoint.location import ASSETS
from paceline.errors import CheckpointError
from paceline.text import Tokenizer
from paceline.vocabulary import Strings, Vocabulary
from tests.fixtures import checkpoints, text_samples
from tests.fixtures.gguf_files import write_gguf
from tests.fixtures.real_gguf import real_gguf
from tests.fixtures.sentencepiece_bpe import SentencePieceBpe

TEXTS = [
    *text_samples.CORPUS,
    "",
    " ",
    "\n\n\n   \t",
    "<|turn>user\nHi<turn|>",
    "added word",
    "x<eos>y",
    "日本🚴é\x00",
    "▁▁ ▁",
]


def strings(texts: list[str]) -> Strings:
    encoded = [text.encode() for text in texts]
    places = np.cumsum([0, *(8 + len(text) for text in encoded)])
    return Strings(b"".join(len(text).to_bytes(8, "little") + text for text in encoded), places)


def of_file(folder: Path, tokenizer: tokenizers.Tokenizer, **more: Any) -> Checkpoint:
    shapes = target_tensors(target_config(checkpoints.TARGET))
    weights = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    path = write_gguf(folder / "m.gguf", checkpoints.TARGET, weights, tokenizer=tokenizer, **more)
    return Checkpoint.open(path)


def opened(checkpoint: Checkpoint, **settings: Any) -> Tokenizer:
    return Tokenizer.open(checkpoint.tokenizer, checkpoint.tokenizer_config, **settings)


def bundled() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(ASSETS / "tiny-python" / "tokenizer.json"))


@pytest.mark.parametrize(
    ("kind", "pre"), [(text_samples.gemma_like, ""), (text_samples.byte_level, ""), (bundled, "tiny-python")]
)
def test_the_same_ids_as_the_original(kind: Callable[[], tokenizers.Tokenizer], pre: str, tmp_path: Path) -> None:
    original = Tokenizer(tokenizers.Tokenizer.from_str(kind().to_str()))
    found = opened(of_file(tmp_path, kind(), pre=pre), bos_id=2)
    assert found.special_ids == original.special_ids
    assert found.vocab_size == original.vocab_size
    for text in TEXTS:
        ids = found.encode(text)
        assert ids == original.encode(text)
        assert found.decode(ids) == original.decode(ids)
        assert found.fewest_tokens(text) <= len(ids)
    assert found.encode("a", bos=True)[0] == 2
    for token in range(found.vocab_size):
        assert found.token_bytes(token) == original.token_bytes(token)


def test_what_a_file_says_of_its_tokens(tmp_path: Path) -> None:
    def change(writer: Any) -> None:
        writer.add_chat_template("{{ bos_token }}x")
        writer.add_float32("general.sampling.temp", 0.7)
        writer.add_int32("general.sampling.top_k", 64)
        writer.add_float32("general.sampling.top_p", 0.95)
        writer.add_array("tokenizer.ggml.suppress_tokens", [7, 8])

    checkpoint = of_file(tmp_path, text_samples.gemma_like(), change=change)
    assert checkpoint.tokenizer_config["bos_token"] == "<bos>"
    assert checkpoint.tokenizer_config["chat_template"] == "{{ bos_token }}x"
    assert checkpoint.target_config().bos_id == 2
    assert checkpoint.target_config().stop_ids == (1, 5)  # <turn|> too, which the file does not name
    sampling = checkpoint.sampling()
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.7, 64, 0.95)
    assert sampling.suppressed == (7, 8)


def test_a_file_without_settings_of_sampling_is_greedy(tmp_path: Path) -> None:
    assert of_file(tmp_path, text_samples.gemma_like()).sampling().temperature == 0


def test_a_file_without_tokenizer(tmp_path: Path) -> None:
    shapes = target_tensors(target_config(checkpoints.TARGET))
    weights = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    checkpoint = Checkpoint.open(write_gguf(tmp_path / "m.gguf", checkpoints.TARGET, weights))
    assert not checkpoint.has_tokenizer
    with pytest.raises(CheckpointError, match=r"m.gguf: has no tokenizer; take another file"):
        _ = checkpoint.tokenizer


def test_first_token_of_early_files(tmp_path: Path) -> None:
    """They say that there is none, and Gemma 4 without it never ends."""
    checkpoint = of_file(
        tmp_path,
        text_samples.gemma_like(),
        change=lambda writer: writer.add_key_value("tokenizer.ggml.add_bos_token", False, gguf.GGUFValueType.BOOL),
    )
    assert opened(checkpoint, bos_id=2).encode("a", bos=True)[0] == 2


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SMALL = ["<pad>", "<eos>", "<bos>", "<unk>", "<|tool_call>", "<div>", *BYTES]
SMALL += ["  ", "▁", *"abcde", "ab", "▁a", "abc", "bc", "aa", "aaa"]
TYPES = [3, 3, 3, 3, 4, 4, *[6] * 256, 4, *[1] * 12]


def small(**changes: Any) -> Vocabulary:
    scores = [-1000.0] * 263 + [-float(i) for i in range(len(SMALL) - 263)]
    given = {"tokens": SMALL, "types": TYPES, "scores": scores, "merges": None, "model": "llama", "pre": ""} | changes
    tokens, merges, types = given["tokens"], given["merges"], given["types"]
    return Vocabulary(
        path=Path("m.gguf"),
        model=given["model"],
        pre=given["pre"],
        tokens=strings(tokens),
        types=None if types is None else np.array(types, np.int64),
        scores=None if given["scores"] is None else np.array(given["scores"], np.float64),
        merges=None if merges is None else strings(merges),
    )


def random_texts(count: int) -> Iterator[str]:
    dice = random.Random(0)
    parts = [*"abcde", " ", "  ", "   ", "<div>", "<eos>", "<|tool", "▁", "é", "z", "ab", "aaaa", "\n", "🚴", "\0"]
    for _ in range(count):
        yield "".join(dice.choices(parts, k=dice.randrange(16)))


def test_merges_follow_from_scores() -> None:
    """Of pieces that overlap, the one of the higher score wins; text of user-defined pieces is never merged."""
    tokenizer = Tokenizer.open(small(), {})
    reference = SentencePieceBpe(SMALL, small().scores.tolist(), TYPES)
    for text in random_texts(3000):
        text = text.replace("<eos>", "")  # which SentencePiece does not look for in texts
        assert [SMALL[i] for i in tokenizer.encode(text)] == [SMALL[i] for i in reference.encode(text)], text


def test_runs_of_spaces_are_written_plainly() -> None:
    """llama.cpp's conversion does so; merges have the sign that stands for a space."""
    tokenizer = Tokenizer.open(small(merges=["▁ ▁"]), {})
    assert [tokenizer.token_text(i) for i in tokenizer.encode("a   a")] == ["a", "▁▁", "▁", "a"]
    assert tokenizer.decode(tokenizer.encode("a   a")) == "a   a"


def test_special_tokens_are_those_of_gemma() -> None:
    """llama.cpp types <|tool_call> as text so that it prints it."""
    tokenizer = Tokenizer.open(small(), {})
    assert tokenizer.special_ids == {0, 1, 2, 3, 4}
    assert tokenizer.decode(tokenizer.encode("<|tool_call><div>a")) == "<div>a"


def test_ollamas_llama_with_merges_is_bpe() -> None:
    tokenizer = Tokenizer.open(small(merges=["b c", "a bc"], scores=list(range(len(SMALL)))), {})
    assert [SMALL[i] for i in tokenizer.encode("abc ab")] == ["abc", "▁", "a", "b"]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another kind": ({"model": "bert"}, "of the kind 'bert'; only 'gemma4', 'llama' and 'gpt2'"),
    "no types": ({"types": None}, "which tokens are special"),
    "no merges and no scores": ({"scores": None}, "neither merges nor scores"),
    "scores without meaning": ({"scores": [-1000.0] * len(SMALL)}, "neither merges nor scores"),
    "a score that is none": ({"scores": [float("nan")] * len(SMALL)}, "neither merges nor scores"),
    "a token twice": ({"tokens": [*SMALL[:-1], "a"]}, "two of its tokens are the same"),
    "no tokens": ({"tokens": [], "types": [], "scores": []}, "it has 0 tokens"),
    "a byte is missing": ({"tokens": [x if x != "<0x41>" else "y" for x in SMALL]}, "no token for the byte 65"),
    "bytes of another kind": ({"model": "gpt2", "pre": "gpt-2", "merges": []}, "no token for the byte"),
    "a long token": ({"tokens": [*SMALL[:-1], "x" * 5000]}, "longer than 4096"),
    "an empty special token": ({"tokens": ["", *SMALL[1:]]}, "special token 0 is empty or longer than 256 bytes"),
    "a long special token": ({"tokens": ["<" * 257, *SMALL[1:]]}, "special token 0 is empty or longer than 256 bytes"),
    "merges of nothing": ({"merges": ["never seen"]}, "is not of two tokens|out of vocabulary"),
    "merges that give nothing": ({"merges": ["a d"]}, "gives no token|out of vocabulary"),
    "a merge of one": ({"merges": ["ab"]}, "is not of two tokens"),
    "a merge of none": ({"merges": [""]}, "is not of two tokens"),
    "a merge of three": ({"merges": ["a b", "a b c", "ab"]}, "is not of two tokens"),
    "a merge of a space": ({"merges": [" "]}, "is not of two tokens|out of vocabulary"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    changes, match = REFUSED[name]
    with pytest.raises(CheckpointError, match=match) as caught:
        Tokenizer.open(small(**changes), {})
    assert str(caught.value).startswith("m.gguf: ")
    assert "\n" not in str(caught.value)


def test_a_vocabulary_larger_than_the_model() -> None:
    assert Tokenizer.open(small(), {}, vocab_size=len(SMALL)).vocab_size == len(SMALL)
    with pytest.raises(CheckpointError, match=r"has 275 tokens, and the model's vocabulary ends before 274"):
        Tokenizer.open(small(), {}, vocab_size=len(SMALL) - 1)


def test_text_that_is_not_utf8() -> None:
    vocabulary = small()
    broken = Strings(vocabulary.tokens._data.replace(b"abc", b"a\xffc"), vocabulary.tokens._places)
    with pytest.raises(CheckpointError, match="has no valid tokenizer"):
        Tokenizer.open(replace(vocabulary, tokens=broken), {})


def test_unknown_ways_of_splitting_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="splits texts as 'qwen2'; only 'gpt-2' is supported"):
        opened(of_file(tmp_path, text_samples.byte_level(), pre="qwen2"))


def mixed_text(tokens: list[str], dice: random.Random) -> list[str]:
    """Lines of prose, code and random tokens of every script: over 100 KB."""
    root = Path(__file__).parents[2]
    files = [root / "README.md", root / "docs" / "architecture.md", *sorted((root / "src" / "paceline").glob("*.py"))]
    lines = [line for path in files for line in path.read_text().splitlines(keepends=True)]
    words = [token.replace("▁", " ") for token in tokens if not token.startswith("<")]
    while sum(len(line.encode()) for line in lines) < 100_000 or len(lines) < 3000:
        lines.append("".join(dice.choices(words, k=dice.randrange(1, 12))))
    rare = ["😊", "\U00012000", "\x00", "\t\t", " " * 40, "\n" * 35, "<table>", "<end_of_turn", "Å\u030a", "ﬁ"]
    return lines + [f"{a}x{b}" for a in rare for b in rare]


def test_the_real_vocabulary() -> None:
    checkpoint = Checkpoint.open(real_gguf())
    vocabulary = checkpoint.tokenizer
    assert isinstance(vocabulary, Vocabulary)
    tokenizer = opened(checkpoint, bos_id=2, vocab_size=262144)
    assert tokenizer.encode("The capital of France is", bos=True) == [2, 818, 5279, 529, 7001, 563]
    tokens, types = list(vocabulary.tokens), vocabulary.types.tolist()
    assert {tokens[i] for i in tokenizer.special_ids} == {t for t, kind in zip(tokens, types, strict=True) if kind == 3}
    reference = SentencePieceBpe(tokens, vocabulary.scores.tolist(), types)
    lines = mixed_text([t for t, kind in zip(tokens, types, strict=True) if kind == 1], random.Random(0))
    assert sum(len(line.encode()) for line in lines) > 100_000
    different = [line for line in lines if tokenizer.encode(line) != reference.encode(line)]
    assert different == []
    for line in lines:
        assert tokenizer.decode(tokenizer.encode(line)) == line.replace("▁", " ")
