"""The bundled pair: in the official format, and decoding it with its drafter pays and does not change the text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer
from tools.tiny_python.evaluate import acceptance, greedy, held_out_prompts
from tools.tiny_python.tokenizer import SPECIAL

import paceline.errors
from paceline.models.drafter import Drafter
from paceline.models.gemma4 import Target
from paceline.train.sequences import states
from tests.models.test_parity import logits_of, our_pair

TARGET = Path(paceline.errors.__file__).parent / "assets" / "tiny-python"
DRAFTER = TARGET.with_name("tiny-python-assistant")
SOURCE = '''\
"""Reading and writing of simple tables."""

import csv
import io
import os


class TableError(Exception):
    """Raised when a table cannot be read."""


class Table:
    """Rows of strings under named columns.

    The first row of a file holds the names. Rows that are too short are filled with empty strings.
    """

    def __init__(self, names, rows=()):
        self.names = list(names)
        self.rows = [list(row) for row in rows]

    def __len__(self):
        return len(self.rows)

    def __repr__(self):
        return '%s(%r, %r)' % (self.__class__.__name__, self.names, self.rows)

    def column(self, name):
        """Return all values of the column *name*."""
        if name not in self.names:
            raise TableError('no column %r' % name)
        index = self.names.index(name)
        return [row[index] for row in self.rows]

    def append(self, row):
        if len(row) > len(self.names):
            raise ValueError('row is too long')
        self.rows.append(list(row) + [''] * (len(self.names) - len(row)))


def read(path, encoding=None):
    """Read a table from the file *path*."""
    with open(path, encoding=encoding, newline='') as file:
        reader = csv.reader(file)
        try:
            names = next(reader)
        except StopIteration:
            raise TableError('file is empty') from None
        return Table(names, reader)
'''


@pytest.fixture(scope="module")
def pair() -> tuple[Target, Drafter]:
    return our_pair(TARGET, DRAFTER)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(TARGET / "tokenizer.json"))


@torch.no_grad()
def test_transformers_loads_it(pair: tuple[Target, Drafter], tokenizer: Tokenizer) -> None:
    target, drafter = pair
    reference, report = hf.Gemma4ForCausalLM.from_pretrained(TARGET, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values())
    # rounded to the model's dtype by transformers, to that of the file by us, whatever the model runs in
    scaled = reference.model.embed_tokens
    scaled.embed_scale = scaled.embed_scale.bfloat16().float()
    tokens = torch.tensor([tokenizer.encode(SOURCE).ids])
    theirs = reference(input_ids=tokens).logits
    assert (logits_of(target, states(target, tokens)) - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    assistant, report = hf.Gemma4AssistantForCausalLM.from_pretrained(DRAFTER, output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(assistant.masked_embedding.token_ordering, drafter.tokens.flatten())


def test_tokenizer(tokenizer: Tokenizer) -> None:
    assert [tokenizer.token_to_id(token) for token in SPECIAL] == list(range(len(SPECIAL)))
    for text in (SOURCE, "\ttab\r\n\n\n  'Grüße', 世界 \U0001f6b4 \x00\x7f", " ", ""):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text
    fast = hf.AutoTokenizer.from_pretrained(TARGET)
    assert fast(SOURCE)["input_ids"] == tokenizer.encode(SOURCE).ids
    turns = [{"role": "user", "content": "import os\n"}]
    text = fast.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == "<bos><|turn>user\nimport os\n<turn|>\n<|turn>model\n"


def test_size() -> None:
    assert sum(path.stat().st_size for folder in (TARGET, DRAFTER) for path in folder.iterdir()) < 40e6


def test_drafting_pays(pair: tuple[Target, Drafter], tokenizer: Tokenizer) -> None:
    """On source that nobody trained on: about two tokens a round or more, and the same text as without a drafter."""
    prompts = held_out_prompts(tokenizer, {"table.py": SOURCE}, 24, 32)
    assert len(prompts) > 20
    assert acceptance(*pair, prompts, 2).length > 1.8
    plain, _ = greedy(pair[0], None, prompts[12], 48, 0)
    drafted, _ = greedy(*pair, prompts[12], 48, 4)
    assert drafted[:48] == plain
