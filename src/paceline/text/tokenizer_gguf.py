"""Makes a tokenizer of a GGUF file's vocabulary.

Three kinds are known: BPE with byte fallback (Gemma 4: `gemma4`, and `llama` with merges), SentencePiece's BPE (Gemma
3: `llama` with scores, from which the merges follow), and byte-level BPE (`gpt2`). What is let through is what
`tokenizer_file` lets through of a tokenizer.json.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Sequence

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from paceline.errors import CheckpointError, translated
from paceline.text.detokenizer import BYTE_OF_CHARACTER
from paceline.text.tokenizer_file import BUNDLED_EXPRESSION, MAX_TOKEN, MAX_TOKENS
from paceline.vocabulary import CURE, Vocabulary

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # what stands for a space in tokens
UNKNOWN_TOKEN = "<unk>"
# Special whatever a file says: llama.cpp types some as text so that it prints them, and bad conversions others.
SPECIAL = frozenset(
    (
        *("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>'),
        *("<eos>", "<|turn>", "<turn|>", "<start_of_turn>", "<end_of_turn>"),
    )
)


def read_vocabulary(vocabulary: Vocabulary, vocab_size: int | None) -> tuple[tokenizers.Tokenizer, int]:
    """A tokenizer, and the most characters of a text that one of its tokens can stand for.

    Args:
        vocabulary: of a GGUF file.
        vocab_size: of the model; token ids lie below. None if it is not known.

    Raises:
        CheckpointError: the kind is not known, or the vocabulary is damaged or does not fit the model.
    """
    with (
        translated(CheckpointError, f"{vocabulary.path}: has no valid tokenizer ({{reason}}); {CURE}"),
        _no_collection(),
    ):
        if vocabulary.model not in ("gemma4", "llama", "gpt2"):
            raise ValueError(f"of the kind {vocabulary.model!r}; only 'gemma4', 'llama' and 'gpt2' are supported")
        byte_level = vocabulary.model == "gpt2"
        # Conversions write runs of spaces, which are tokens of their own, plainly; merges have the sign for them.
        tokens = [
            token.replace(" ", SPACE) if not byte_level and token.isspace() else token for token in vocabulary.tokens
        ]
        ids = _checked_ids(tokens, vocab_size or MAX_TOKENS, byte_level)
        if vocabulary.types is None:
            raise ValueError("it does not say which tokens are special")
        types: list[int] = vocabulary.types.tolist()
        from_scores = vocabulary.merges is None
        merges = _scored_merges(vocabulary, tokens, types) if from_scores else _listed_merges(vocabulary)
        model = models.BPE(
            ids,
            merges,
            unk_token=None if byte_level or UNKNOWN_TOKEN not in ids else UNKNOWN_TOKEN,
            fuse_unk=not byte_level,
            byte_fallback=not byte_level,
        )
        backend = tokenizers.Tokenizer(model)
        _add_steps(backend, vocabulary, byte_level)
        _add_tokens(backend, tokens, types, from_scores)
    return backend, max(map(len, tokens))


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Without garbage collection, which takes as long again: it is all kept, and there are no cycles."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _checked_ids(tokens: list[str], limit: int, byte_level: bool) -> dict[str, int]:
    if not 0 < len(tokens) <= limit:
        raise ValueError(f"it has {len(tokens)} tokens, and the model's vocabulary ends before {limit}")
    ids = dict(zip(tokens, range(len(tokens)), strict=True))
    if len(ids) != len(tokens):
        raise ValueError("two of its tokens are the same")
    if max(map(len, tokens)) > MAX_TOKEN:
        raise ValueError(f"a token is longer than {MAX_TOKEN} characters")
    # every text must have tokens: those of single bytes
    names = BYTE_OF_CHARACTER if byte_level else {f"<0x{byte:02X}>": byte for byte in range(256)}
    missing = next((byte for name, byte in names.items() if name not in ids), None)
    if missing is not None:
        raise ValueError(f"it has no token for the byte {missing}")
    return ids


def _listed_merges(vocabulary: Vocabulary) -> list[tuple[str, ...]]:
    """The library refuses merges that are not of two tokens, or that give none."""
    return [tuple(merge.split(" ", 1)) for merge in vocabulary.merges or ()]


def _scored_merges(vocabulary: Vocabulary, tokens: list[str], types: list[int]) -> list[tuple[str, ...]]:
    """What SentencePiece does at each step, as merges: of neighbours that make a token, those of the highest score."""
    scores = vocabulary.scores
    if scores is None or not np.isfinite(scores).all() or scores.min() == scores.max():
        raise ValueError("it has neither merges nor scores of its tokens")
    normal = {token for token, kind in zip(tokens, types, strict=True) if kind == NORMAL}
    merges: list[tuple[str, ...]] = []
    for index in np.argsort(-scores, kind="stable").tolist():
        token = tokens[index]
        if types[index] == NORMAL:
            for cut in range(len(token) - 1, 0, -1):
                if token[:cut] in normal and token[cut:] in normal:
                    merges.append((token[:cut], token[cut:]))
    return merges


def _add_steps(backend: tokenizers.Tokenizer, vocabulary: Vocabulary, byte_level: bool) -> None:
    if not byte_level:
        backend.normalizer = normalizers.Replace(" ", SPACE)
        backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
        return
    backend.decoder = decoders.ByteLevel()
    if vocabulary.pre in ("gpt-2", "gpt2"):
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif vocabulary.pre == "tiny-python":
        split = pre_tokenizers.Split(Regex(BUNDLED_EXPRESSION), behavior="isolated")
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    else:
        raise ValueError(f"it splits texts as {vocabulary.pre!r}; only 'gpt-2' is supported")


def _add_tokens(backend: tokenizers.Tokenizer, tokens: Sequence[str], types: list[int], from_scores: bool) -> None:
    """Tokens that are found in a text as they are, before all else.

    With a vocabulary of SentencePiece's, those that are text are found after spaces have their sign, as there: they
    are runs of spaces too.
    """
    added, numbers = [], []
    for number, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        special = kind in (UNKNOWN, CONTROL) or token in SPECIAL
        if special or kind == USER_DEFINED:
            if not token:
                raise ValueError(f"the special token {number} is empty")
            added.append(AddedToken(token, special=special, normalized=from_scores and not special))
            numbers.append(number)
    backend.add_tokens(added)
    for token, number in zip(added, numbers, strict=True):
        if backend.token_to_id(token.content) != number:
            raise ValueError(f"the token {token.content!r} has the id {number} and another")
