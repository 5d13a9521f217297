"""What a `tokenizer.json` may hold, checked before the tokenizers library reads it.

The library believes its files: some make it panic, abort the process, or match regular expressions for ever. So only
the parts that Gemma's tokenizers and byte-level BPE consist of are let through
(https://github.com/huggingface/tokenizers, `tokenizers/src`).
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from paceline.errors import CheckpointError, translated
from paceline.text.detokenizer import BYTE_OF_CHARACTER

MAX_BYTES = 256 << 20
MAX_TOKENS = 1 << 22  # ids, where the model's vocabulary is not known
MAX_STEPS, MAX_PATTERN, MAX_TOKEN = 8, 64, 4096  # steps of a sequence; characters

# Regular expressions are matched by backtracking, for which files can hold the worst case: only these are matched.
BUNDLED_EXPRESSION = r"[\r\n]+[ \t]*| ?[\p{L}_]+|\p{N}{1,3}| ?[^\s\p{L}\p{N}_]+|[ \t]+(?=\S)|\s+"
EXPRESSIONS = frozenset(
    {
        BUNDLED_EXPRESSION,
        # GPT-2
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    }
)
KNOWN = {
    "normalizer": ("NFC", "Replace"),
    "pre_tokenizer": ("ByteLevel", "Split"),
    "post_processor": ("ByteLevel", "TemplateProcessing"),
    "decoder": ("ByteFallback", "ByteLevel", "Fuse", "Replace"),
}
STEPS = {
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "post_processor": "processors",
    "decoder": "decoders",
}


def read_tokenizer(path: Path, vocab_size: int | None) -> tuple[str, Mapping[str, Any]]:
    """Read a `tokenizer.json`; returns its text, and its content without the merges.

    Args:
        path: the file.
        vocab_size: of the model; token ids lie below. None if it is not known.

    Raises:
        CheckpointError: it cannot be read, is not valid, or holds a part that is not supported.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: is missing; download it")
    with translated(CheckpointError, f"{path}: is not a valid tokenizer ({{reason}}); download it again"):
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise ValueError(f"it is larger than {MAX_BYTES >> 20} MiB")
        text = raw.decode()
        content = _parsed(text)
        for part in STEPS:
            _check_steps(part, content.get(part))
        _check_model(content["model"], vocab_size or MAX_TOKENS)
        _check_added(content.get("added_tokens") or [], vocab_size or MAX_TOKENS)
        _check_bytes(content)
    return text, content


def _parsed(text: str) -> dict[str, Any]:
    collects = gc.isenabled()
    gc.disable()  # half the time of a large file: it is all kept, and there are no cycles
    try:
        content: dict[str, Any] = json.loads(text, object_pairs_hook=_object)
    finally:
        if collects:
            gc.enable()
    content["model"].pop("merges", None)  # the largest part, which the library checks
    return content


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has a key twice")
    return found


def steps_of(part: str, value: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The steps of a part of a tokenizer.json, whether it is one, a sequence, or none."""
    if value is None:
        return []
    return list(value[STEPS[part]]) if value["type"] == "Sequence" else [value]


def _check_steps(part: str, value: Any) -> None:
    steps = steps_of(part, value)
    if len(steps) > MAX_STEPS:
        raise ValueError(f"its {part} has {len(steps)} steps; {MAX_STEPS} are supported")
    for step in steps:
        kind = step["type"]
        if kind not in KNOWN[part]:
            raise ValueError(f"its {part} is {kind!r}; only {', '.join(KNOWN[part])} are supported")
        if kind == "Replace":
            _check_replace(part, step)
        if kind == "Split":
            _check_split(step)


def _check_replace(part: str, step: Mapping[str, Any]) -> None:
    pattern, content = step["pattern"].get("String"), step["content"]
    # A longer text for each match, several times over, would make gigabytes of a prompt.
    if not (isinstance(pattern, str) and isinstance(content, str) and len(content) <= len(pattern) <= MAX_PATTERN):
        raise ValueError(f"its {part} replaces by an expression or by a longer text, which is not supported")
    if not pattern:
        raise ValueError(f"its {part} replaces nothing")


def _check_split(step: Mapping[str, Any]) -> None:
    kind, pattern = next(iter(step["pattern"].items()))
    if kind == "Regex" and pattern not in EXPRESSIONS:
        raise ValueError(f"its pre_tokenizer splits by the expression {pattern!r}, which is not supported")
    if kind == "String" and not 0 < len(pattern) <= MAX_PATTERN:
        raise ValueError(f"its pre_tokenizer splits by {pattern!r}")
    if step["behavior"] == "Removed":
        raise ValueError("its pre_tokenizer removes text")


def _check_model(model: Mapping[str, Any], limit: int) -> None:
    if model["type"] != "BPE":
        raise ValueError(f"its model is {model['type']!r}; only BPE is supported")
    for setting in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(setting):
            raise ValueError(f"its model has {setting}, which is not supported")
    _check_ids(model["vocab"].values(), limit)
    if len(set(model["vocab"].values())) != len(model["vocab"]):
        raise ValueError("two of its tokens have the same id")
    if any(len(token) > MAX_TOKEN for token in model["vocab"]):
        raise ValueError(f"a token is longer than {MAX_TOKEN} characters")


def _check_added(added: list[Mapping[str, Any]], limit: int) -> None:
    _check_ids((token["id"] for token in added), limit)
    if len({token["id"] for token in added}) != len(added):
        raise ValueError("two of its added tokens have the same id")
    if any(not 0 < len(token["content"]) <= MAX_TOKEN for token in added):
        raise ValueError(f"an added token has no text, or more than {MAX_TOKEN} characters")


def _check_ids(ids: Iterable[object], limit: int) -> None:
    odd = next((i for i in ids if type(i) is not int or not 0 <= i < limit), None)
    if odd is not None:
        raise ValueError(f"a token has the id {odd!r}, and the vocabulary ends before {limit}")


def _check_bytes(content: Mapping[str, Any]) -> None:
    """Every text must have tokens: those of single bytes, in one spelling or the other."""
    vocab, kinds = (
        content["model"]["vocab"],
        [step["type"] for step in steps_of("pre_tokenizer", content["pre_tokenizer"])],
    )
    if "ByteLevel" in kinds:
        missing = next((byte for character, byte in BYTE_OF_CHARACTER.items() if character not in vocab), None)
    elif content["model"].get("byte_fallback"):
        missing = next((byte for byte in range(256) if f"<0x{byte:02X}>" not in vocab), None)
    else:
        raise ValueError("it has neither byte-level nor byte-fallback tokens, which is not supported")
    if missing is not None:
        raise ValueError(f"it has no token for the byte {missing}")
