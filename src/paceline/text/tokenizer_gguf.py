"""Makes a tokenizer of a GGUF file's vocabulary.

Three kinds are known: BPE with byte fallback (Gemma 4: `gemma4`, and `llama` with merges), SentencePiece's BPE (Gemma
3: `llama` with scores, from which the merges follow), and byte-level BPE (`gpt2`). What is let through is what
`tokenizer_file` lets through of a tokenizer.json.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from paceline.errors import CheckpointError, translated
from paceline.text.detokenizer import BYTE_OF_CHARACTER
from paceline.text.tokenizer_file import BUNDLED_EXPRESSION, MAX_TOKEN, MAX_TOKENS
from paceline.vocabulary import CURE, Vocabulary

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # what stands for a space in tokens
UNKNOWN_TOKEN = "<unk>"
MAX_FOUND = 256  # bytes of a token that is looked for in texts
BYTE_FALLBACK, BYTE_LEVEL = ("gemma4", "llama"), "gpt2"
Merges = list[tuple[str, str]]
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
    with _valid(vocabulary), _no_collection():
        byte_level = vocabulary.model == BYTE_LEVEL
        tokens = _read_tokens(vocabulary, vocab_size or MAX_TOKENS)
        ids = {token: number for number, token in enumerate(tokens)}
        if len(ids) != len(tokens):
            raise ValueError("two of its tokens are the same")
        # every text must have tokens: those of single bytes
        names = BYTE_OF_CHARACTER if byte_level else {f"<0x{byte:02X}>": byte for byte in range(256)}
        missing = next((byte for name, byte in names.items() if name not in ids), None)
        if missing is not None:
            raise ValueError(f"it has no token for the byte {missing}")
        special, as_text = _added(vocabulary, tokens)
        from_scores = vocabulary.merges is None
        model = models.BPE(
            ids,
            _scored_merges(vocabulary, tokens) if from_scores else _listed_merges(vocabulary),
            unk_token=None if byte_level or UNKNOWN_TOKEN not in ids else UNKNOWN_TOKEN,
            fuse_unk=not byte_level,
            byte_fallback=not byte_level,
        )
        backend = tokenizers.Tokenizer(model)
        _add_steps(backend, vocabulary, byte_level)
        added = {token: AddedToken(tokens[token], special=True, normalized=False) for token in special}
        # With a vocabulary of SentencePiece's, those that are text are found after spaces have their sign, as there.
        added |= {token: AddedToken(tokens[token], special=False, normalized=from_scores) for token in as_text}
        backend.add_tokens([added[token] for token in sorted(added)])
        odd = next((token for token in added if backend.token_to_id(tokens[token]) != token), None)
        if odd is not None:
            raise ValueError(f"the token {tokens[odd]!r} has the id {odd} and another")
    return backend, max(map(len, tokens))


@contextlib.contextmanager
def _valid(vocabulary: Vocabulary) -> Iterator[None]:
    with translated(CheckpointError, f"{vocabulary.path}: has no valid tokenizer ({{reason}}); {CURE}"):
        if vocabulary.model not in (*BYTE_FALLBACK, BYTE_LEVEL):
            raise ValueError(f"of the kind {vocabulary.model!r}; only 'gemma4', 'llama' and 'gpt2' are supported")
        yield


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


def _read_tokens(vocabulary: Vocabulary, limit: int) -> list[str]:
    tokens = list(vocabulary.tokens)
    if not 0 < len(tokens) <= limit:
        raise ValueError(f"it has {len(tokens)} tokens, and the model's vocabulary ends before {limit}")
    if max(map(len, tokens)) > MAX_TOKEN:
        raise ValueError(f"a token is longer than {MAX_TOKEN} characters")
    if vocabulary.model == BYTE_LEVEL:
        return tokens
    # Conversions write runs of spaces, which are tokens of their own, plainly; merges have the sign for them.
    return [token if token[:1] != " " or token.strip(" ") else SPACE * len(token) for token in tokens]


def _added(vocabulary: Vocabulary, tokens: list[str]) -> tuple[list[int], list[int]]:
    """Ids of the tokens that are found in a text before all else: special ones, and others."""
    if vocabulary.types is None:
        raise ValueError("it does not say which tokens are special")
    kinds = vocabulary.types
    typed = np.isin(kinds, (UNKNOWN, CONTROL, USER_DEFINED))
    found = {int(token) for token in np.flatnonzero(typed)}
    found |= {token for text in SPECIAL if (token := vocabulary.tokens.find(text)) is not None}
    odd = next((token for token in sorted(found) if not 0 < len(tokens[token].encode()) <= MAX_FOUND), None)
    if odd is not None:
        raise ValueError(f"the special token {odd} is empty or longer than {MAX_FOUND} bytes")
    special = [token for token in found if tokens[token] in SPECIAL or kinds[token] != USER_DEFINED]
    return sorted(special), sorted(found.difference(special))


def _by_score(vocabulary: Vocabulary) -> list[int]:
    """Normal tokens, those of the highest score first: SentencePiece joins the neighbours that make such a token."""
    scores, types = vocabulary.scores, vocabulary.types
    if scores is None or not np.isfinite(scores).all() or scores.min() == scores.max():
        raise ValueError("it has neither merges nor scores of its tokens")
    order = np.argsort(-scores, kind="stable")
    normal: list[int] = order[types[order] == NORMAL].tolist() if types is not None else []
    return normal


def _listed_merges(vocabulary: Vocabulary) -> Merges:
    """The library refuses merges that are not of two tokens, or that give none."""
    if not vocabulary.merges:
        return []
    text = vocabulary.merges.joined("\0")
    marks = np.frombuffer(text.encode(), np.uint8)
    marks = marks[(marks == ord(" ")) | (marks == 0)]
    if len(marks) % 2 == 0 or (marks[::2] != ord(" ")).any() or marks[1::2].any():
        raise ValueError("a merge is not of two tokens")
    parts = text.replace(" ", "\0").split("\0")
    return list(zip(parts[::2], parts[1::2], strict=True))


def _scored_merges(vocabulary: Vocabulary, tokens: list[str]) -> Merges:
    """All pairs of normal tokens that make one, in the order of that one; of equal ones the longest left part first."""
    order = [tokens[token] for token in _by_score(vocabulary)]
    normal = set(order)
    return [
        (token[:cut], token[cut:])
        for token in order
        for cut in range(len(token) - 1, 0, -1)
        if token[:cut] in normal and token[cut:] in normal
    ]


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
