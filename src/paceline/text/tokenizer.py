"""Tokenizer: a thin, typed wrapper of a checkpoint's `tokenizer.json`, or of what a GGUF file has for it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from paceline.errors import CheckpointError, PromptError, translated
from paceline.text.detokenizer import BYTE_TOKEN, Detokenizer, byte_level_bytes
from paceline.text.tokenizer_file import MAX_TOKENS, read_tokenizer, steps_of
from paceline.text.tokenizer_gguf import read_vocabulary
from paceline.vocabulary import CURE, Vocabulary

SAMPLE = "A b\n\t é日🚴"  # tokenized when a file is opened: one that makes the library panic does so then


class Tokenizer:
    """A model's vocabulary. Several threads may use it.

    Args:
        backend: the tokenizer itself.
        bos_id: the token that starts a text, None if the model has none.
        longest: no token stands for more characters of a text than this; None if nothing is known.
    """

    def __init__(self, backend: tokenizers.Tokenizer, bos_id: int | None = None, longest: int | None = None) -> None:
        # Stored truncation or padding is meant for training, and would silently change prompts.
        backend.no_truncation()
        backend.no_padding()
        backend.post_processor = None  # adds what templates hold already
        self._backend, self._longest = backend, longest
        if not backend.decoder:
            raise CheckpointError("tokenizer.json: has no decoder; use the model's own tokenizer")
        self._decoder: dict[str, Any] = json.loads(backend.decoder.__getstate__())
        self.bos_id = bos_id
        self.special_ids = frozenset(i for i, t in backend.get_added_tokens_decoder().items() if t.special)
        self.detokenizer()  # raises here if the decoder is not supported

    @classmethod
    def open(
        cls,
        source: Path | Vocabulary,
        settings: Mapping[str, Any],
        bos_id: int | None = None,
        vocab_size: int | None = None,
    ) -> Tokenizer:
        """Open a `tokenizer.json`, or make a tokenizer of a GGUF file's vocabulary.

        Args:
            source: the file, or the vocabulary.
            settings: the content of `tokenizer_config.json`; its `add_bos_token: false` switches the bos token off.
            bos_id: the bos token of the model's settings.
            vocab_size: of the model; all token ids lie below.

        Raises:
            CheckpointError: the file is missing or damaged, holds what is not supported, or has tokens beyond the
                model's vocabulary; or a setting is of another kind.
        """
        limit = vocab_size or MAX_TOKENS
        if bos_id is not None and (type(bos_id) is not int or not 0 <= bos_id < limit):
            raise CheckpointError(f"bos_token_id is {bos_id!r}; it must be a token id below {limit}, or null")
        add_bos = settings.get("add_bos_token")
        if add_bos is not None and type(add_bos) is not bool:
            raise CheckpointError(f"tokenizer_config.json: add_bos_token is {add_bos!r}; it must be true or false")
        longest: int | None
        if isinstance(source, Vocabulary):
            path, cure = source.path, CURE
            backend, longest = read_vocabulary(source, vocab_size)
        else:
            path, cure = source, "download it again"
            backend, longest = _from_file(path, vocab_size)
        with translated(CheckpointError, f"{path}: is not a valid tokenizer ({{reason}}); {cure}"):
            tokenizer = cls(backend, None if add_bos is False else bos_id, longest)
            tokenizer.decode(tokenizer.encode(SAMPLE))
        return tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of tokens with a text; the model's tables may be larger."""
        return int(self._backend.get_vocab_size())

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        """Token ids of a text. Special tokens written out in it (`<|turn>`) become those tokens.

        Args:
            text: a rendered chat template, or the raw text that the model is to continue.
            bos: put the bos token in front, unless the text starts with it already.

        Raises:
            PromptError: the text is not valid Unicode (it holds half a surrogate pair).
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise PromptError(
                f"the prompt is not valid text at character {error.start} ({text[error.start]!r}); convert it to UTF-8"
            ) from error
        with translated(PromptError, "the prompt cannot be tokenized ({reason}); change it"):
            # Unlike `encode`, this lets other threads run meanwhile.
            [encoding] = self._backend.encode_batch_fast([text], add_special_tokens=False)
        ids: list[int] = encoding.ids
        if bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            return [self.bos_id, *ids]
        return ids

    def fewest_tokens(self, text: str) -> int:
        """A lower bound of the number of tokens of a text, from its length alone; 0 if nothing is known."""
        return -(-len(text) // self._longest) if self._longest else 0

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of tokens, with special tokens written out if `special`.

        Raises:
            PromptError: a number is no token id.
        """
        with translated(PromptError, "the tokens cannot be decoded ({reason}); change them"):
            return str(self._backend.decode(list(ids), skip_special_tokens=not special))

    def token_id(self, text: str) -> int | None:
        """The id of a string in the vocabulary."""
        with translated(PromptError, "the text cannot be looked up ({reason}); change it"):
            found: int | None = self._backend.token_to_id(text)
        return found

    def token_text(self, token: int) -> str | None:
        """A token's string in the vocabulary, which is not always the text it decodes to."""
        if not 0 <= token <= 0xFFFFFFFF:
            return None
        with translated(PromptError, "the token cannot be looked up ({reason}); change it"):
            found: str | None = self._backend.id_to_token(token)
        return found

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token, special tokens written out; they may be part of a character."""
        text = self.token_text(token)
        if text is None:
            return b""
        if match := BYTE_TOKEN.fullmatch(text):
            return bytes([int(match[1], 16)])
        if token not in self.special_ids and self._decoder["type"] == "ByteLevel":
            return byte_level_bytes(text)
        decoder = self.detokenizer(special=True)
        return (decoder.push(token) + decoder.finish()).encode()

    def dumps(self) -> str:
        """The content of a `tokenizer.json`."""
        return str(self._backend.to_str())

    def detokenizer(self, *, special: bool = False, marks: Mapping[int, str] | None = None) -> Detokenizer:
        """A new streaming detokenizer; its strings join to what `decode` gives.

        Args:
            special: write special tokens out.
            marks: replacement texts of special tokens by id; the others give no text.
        """
        if marks:
            hidden = self.special_ids - marks.keys()
            return Detokenizer(self._decoder, lambda token: marks.get(token) or self.token_text(token), hidden)
        return Detokenizer(self._decoder, self.token_text, frozenset() if special else self.special_ids)


def _from_file(path: Path, vocab_size: int | None) -> tuple[tokenizers.Tokenizer, int | None]:
    text, content = read_tokenizer(path, vocab_size)
    with translated(CheckpointError, f"{path}: is not a valid tokenizer ({{reason}}); download it again"):
        backend = tokenizers.Tokenizer.from_str(text)
        for token in content.get("added_tokens") or []:
            if (found := backend.token_to_id(token["content"])) != token["id"]:  # numbered anew by the library
                raise ValueError(f"{token['content']!r} has the id {token['id']} and another, {found}")
        return backend, _longest(content)


def _longest(content: Mapping[str, Any]) -> int | None:
    """The most characters of a text that one token can stand for; None where there is no bound."""
    normalizers = steps_of("normalizer", content.get("normalizer"))
    added = content.get("added_tokens") or []
    shrinks = any(
        step["type"] != "Replace" or len(step["content"]) < len(step["pattern"]["String"]) for step in normalizers
    )
    if shrinks or any(token.get("lstrip") or token.get("rstrip") for token in added):  # these take spaces along
        return None
    return max(map(len, [*content["model"]["vocab"], *(token["content"] for token in added)]))
