"""What a GGUF file says beside the model itself, in the terms of the small files of a model folder: token ids, chat
template, sampling settings, and the vocabulary."""

from __future__ import annotations

from typing import Any

import numpy as np

from paceline.checkpoint.gguf import Gguf
from paceline.vocabulary import Vocabulary

TOKENIZER = "tokenizer.ggml."
# What ends a text, by the tokens' strings: what files say of it is often one of them only, or wrong.
STOPS = ("<eos>", "<turn|>", "<|tool_response>", "<end_of_turn>")
NAMED = ("bos", "eos", "unknown", "padding")  # tokens whose ids files give
SETTINGS = {"unknown": "unk", "padding": "pad"}  # as tokenizer_config.json calls them
MAX_STOPS = 64
SAMPLING = {"temp": "temperature", "top_p": "top_p", "min_p": "min_p"}


def read_vocabulary(file: Gguf) -> Vocabulary | None:
    """The vocabulary; None if the file has none.

    Raises:
        CheckpointError: a part of it is of another kind, or not as long as the list of tokens.
    """
    tokens = file.strings(f"{TOKENIZER}tokens")
    if tokens is None:
        return None
    types = file.array(f"{TOKENIZER}token_type", "iu", len(tokens))
    scores = file.array(f"{TOKENIZER}scores", "f", len(tokens))
    return Vocabulary(
        path=file.path,
        model=file.text(f"{TOKENIZER}model", ""),
        pre=file.text(f"{TOKENIZER}pre", ""),
        tokens=tokens,
        types=None if types is None else types.astype(np.int64),
        scores=None if scores is None else scores.astype(np.float64),
        merges=file.strings(f"{TOKENIZER}merges"),
    )


def token_settings(file: Gguf, vocabulary: Vocabulary | None) -> dict[str, Any]:
    """`eos_token_id` and `bos_token_id` of a `config.json`."""
    found: dict[str, Any] = {}
    bos = f"{TOKENIZER}bos_token_id"
    if bos in file.metadata:
        found["bos_token_id"] = file.integer(bos)
    stops = [file.integer(f"{TOKENIZER}{kind}_token_id", -1) for kind in ("eos", "eot")]
    listed = file.array(f"{TOKENIZER}eos_token_ids", "iu")
    stops += [] if listed is None else [int(token) for token in listed[:MAX_STOPS]]
    if vocabulary:
        stops += [token for text in STOPS if (token := vocabulary.tokens.find(text)) is not None]
    stops = sorted({token for token in stops if token != -1})
    return found | ({"eos_token_id": stops} if stops else {})


def tokenizer_settings(file: Gguf, vocabulary: Vocabulary | None) -> dict[str, Any]:
    """A `tokenizer_config.json`: strings of special tokens, for the chat template, and the template itself."""
    found: dict[str, Any] = {}
    for name in NAMED if vocabulary else ():
        token = file.integer(f"{TOKENIZER}{name}_token_id", -1)
        if vocabulary and 0 <= token < len(vocabulary.tokens):
            found[f"{SETTINGS.get(name, name)}_token"] = vocabulary.text(token)
    template = f"{TOKENIZER.split('.')[0]}.chat_template"
    if template in file.metadata:
        found["chat_template"] = file.text(template)
    # Gemma 4 is always given its first token: early files say otherwise, and models then never end.
    if file.text("general.architecture") == "gemma3":
        found["add_bos_token"] = file.flag(f"{TOKENIZER}add_bos_token", True)
    return found


def generation_settings(file: Gguf) -> dict[str, Any]:
    """A `generation_config.json`."""
    found: dict[str, Any] = {
        name: file.number(f"general.sampling.{key}")
        for key, name in SAMPLING.items()
        if f"general.sampling.{key}" in file.metadata
    }
    if "general.sampling.top_k" in file.metadata:
        found["top_k"] = file.integer("general.sampling.top_k")
    if found:
        found["do_sample"] = True
    suppressed = file.array(f"{TOKENIZER}suppress_tokens", "iu")
    if suppressed is not None:
        found["suppress_tokens"] = [int(token) for token in suppressed]
    return found
