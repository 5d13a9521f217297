"""The corpus: the Python standard library's own source, as installed with the running interpreter.

Tests, installed packages and generated tables are left out. About one file in twenty is held out: neither the
tokenizer nor the models ever see it.
"""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tools.tiny_python.tokenizer import BOS, EOS, MODEL_HEADER, USER_HEADER

from paceline.errors import PacelineError

TEST_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib-dynload"}
TABLES = ("encodings/cp", "encodings/iso", "encodings/mac_", "encodings/koi8", "pydoc_data/topics")
HELD_OUT_SHARE = 20  # one file in so many
CHAT_SHARE = 0.25  # of the training sequences


@dataclass(frozen=True)
class Sources:
    """File contents by path relative to the standard library."""

    training: dict[str, str]
    held_out: dict[str, str]


def standard_library() -> Sources:
    """Read the running interpreter's standard library and split it by a hash of the path."""
    root = Path(sysconfig.get_path("stdlib"))
    training: dict[str, str] = {}
    held_out: dict[str, str] = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        tested = any(part in TEST_FOLDERS or part.startswith(("test_", "config-")) for part in Path(name).parts)
        if tested or name.startswith(TABLES):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if len(text) > 200:
            digest = hashlib.sha256(name.encode()).digest()
            (held_out if digest[0] % HELD_OUT_SHARE == 0 else training)[name] = text
    if not training:
        raise PacelineError(f"{root} holds no Python source; run with an interpreter that ships its standard library")
    return Sources(training, held_out)


@dataclass(frozen=True)
class Corpus:
    """All training files as one stream of tokens, each followed by the end token."""

    tokens: NDArray[np.int64]  # [N]
    line_starts: NDArray[np.int64]  # offsets in `tokens` at which a line begins
    user_header: list[int]
    model_header: list[int]

    @classmethod
    def encode(cls, files: dict[str, str], tokenizer: Tokenizer) -> Corpus:
        def ids(text: str) -> list[int]:
            return list(tokenizer.encode(text, add_special_tokens=False).ids)

        encoded = tokenizer.encode_batch(list(files.values()), add_special_tokens=False)
        tokens = np.concatenate([np.array([*file.ids, EOS], dtype=np.int64) for file in encoded])
        breaks = np.array([i for i in range(tokenizer.get_vocab_size()) if "\n" in tokenizer.decode([i])])
        starts = np.flatnonzero(np.isin(tokens[:-1], breaks)) + 1
        return cls(tokens, starts, [BOS, *ids(USER_HEADER)], ids(MODEL_HEADER))

    def batch(self, generator: np.random.Generator, sequences: int, length: int) -> torch.Tensor:
        """[sequences, length + 1] tokens: stretches of source after `<bos>`, a share of them in the chat format."""
        rows = [
            self.chat(generator, length + 1) if generator.random() < CHAT_SHARE else self.plain(generator, length + 1)
            for _ in range(sequences)
        ]
        return torch.from_numpy(np.stack(rows))

    def plain(self, generator: np.random.Generator, length: int) -> NDArray[np.int64]:
        start = generator.integers(len(self.tokens) - length)
        return np.concatenate(([BOS], self.tokens[start : start + length - 1]))

    def chat(self, generator: np.random.Generator, length: int) -> NDArray[np.int64]:
        """The user's turn is the beginning of a stretch of source, the model's turn its continuation."""
        start = generator.choice(self.line_starts)
        start = min(int(start), len(self.tokens) - length)
        stretch = self.tokens[start : start + length]
        cut = int(generator.integers(4, length // 3))
        parts = (self.user_header, stretch[:cut], self.model_header, stretch[cut:])
        return np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])[:length]
