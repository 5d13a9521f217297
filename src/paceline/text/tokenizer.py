"""Tokenizer: a thin, typed wrapper of a checkpoint's `tokenizer.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from paceline.errors import CheckpointError, PromptError
from paceline.text.detokenizer import BYTE_OF_CHARACTER, BYTE_TOKEN, Detokenizer


class Tokenizer:
    """A model's vocabulary.

    Args:
        backend: the tokenizer itself.
        bos_id: the token that starts a text, None if the model has none.
    """

    def __init__(self, backend: tokenizers.Tokenizer, bos_id: int | None = None) -> None:
        # Stored truncation or padding is meant for training, and would silently change prompts.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        if not backend.decoder:
            raise CheckpointError("tokenizer.json: has no decoder; use the model's own tokenizer")
        self._decoder: dict[str, Any] = json.loads(backend.decoder.__getstate__())
        self.bos_id = bos_id
        self.special_ids = frozenset(i for i, t in backend.get_added_tokens_decoder().items() if t.special)
        self.detokenizer()  # raises here if the decoder is not supported

    @classmethod
    def open(cls, path: Path, settings: Mapping[str, Any], bos_id: int | None = None) -> Tokenizer:
        """Open a `tokenizer.json`.

        Args:
            path: the file.
            settings: the content of `tokenizer_config.json`; its `add_bos_token: false` switches the bos token off.
            bos_id: the bos token of the model's settings.

        Raises:
            CheckpointError: the file is missing, damaged, or has an unsupported decoder.
        """
        if not path.is_file():
            raise CheckpointError(f"{path}: is missing; download it")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare exceptions
            raise CheckpointError(f"{path}: is not a valid tokenizer ({error}); download it again") from error
        return cls(backend, None if settings.get("add_bos_token") is False else bos_id)

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
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        if bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            return [self.bos_id, *ids]
        return ids

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of tokens, with special tokens written out if `special`."""
        return str(self._backend.decode(list(ids), skip_special_tokens=not special))

    def token_id(self, text: str) -> int | None:
        """The id of a string in the vocabulary."""
        return self._backend.token_to_id(text)

    def token_text(self, token: int) -> str | None:
        """A token's string in the vocabulary, which is not always the text it decodes to."""
        return self._backend.id_to_token(token)

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token, special tokens written out; they may be part of a character."""
        text = self.token_text(token)
        if text is None:
            return b""
        if match := BYTE_TOKEN.fullmatch(text):
            return bytes([int(match[1], 16)])
        if token not in self.special_ids and self._decoder["type"] == "ByteLevel":
            return bytes(BYTE_OF_CHARACTER[character] for character in text)
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
