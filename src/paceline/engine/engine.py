"""The engine users hold: prompts in, streams of events out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass
from numbers import Integral
from types import TracebackType
from typing import Any

from paceline.backends.base import Backend
from paceline.config import DrafterConfig, TargetConfig
from paceline.decode.sampling import Greedy
from paceline.engine.sequence import Sequence
from paceline.engine.step import step
from paceline.errors import PromptError, SettingsError
from paceline.text.chat import ChatTemplate
from paceline.text.tokenizer import Tokenizer
from paceline.types import Event, Generation, Statistics

MAX_DRAFT_TOKENS = 15  # a verification is at most 16 rows

Prompt = str | Items[int] | Items[Mapping[str, Any]]
"""Text, token ids, or a conversation: messages with `role` and `content`."""


@dataclass(frozen=True)
class Engine:
    """A loaded model pair, ready to generate. Made by `paceline.load`.

    Greedy decoding: the text is the target's most likely continuation, bit for bit the same whatever drafter is used,
    however many tokens are drafted, however the prompt is cut into chunks, and on any number of threads.
    """

    backend: Backend
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    target_config: TargetConfig
    drafter_config: DrafterConfig | None
    stop_ids: frozenset[int]
    quant: str
    threads: int
    weight_bytes: int  # the target's packed matrices; per-layer-embedding tables are mapped and not counted
    draft_tokens: int
    prompt_chunk: int

    def stream(
        self, prompt: Prompt, *, max_tokens: int = 256, draft_tokens: int | None = None, raw: bool = False
    ) -> Stream:
        """Start a generation; iterate over the result for what each round adds.

        Args:
            prompt: text (one user turn of the chat template, or as it stands if `raw`), a conversation, or token ids.
            max_tokens: tokens to generate at most, from 1.
            draft_tokens: tokens drafted a round, 0 (plain decoding) to 15; None for the engine's setting.
            raw: text goes to the model as it is, after its beginning-of-text token.

        Raises:
            PromptError: the prompt is empty, too long for the context, or not valid text.
            SettingsError: a number out of range.
        """
        tokens = self.encode(prompt, raw=raw)
        depth = check_draft_tokens(self.draft_tokens if draft_tokens is None else draft_tokens)
        if max_tokens < 1:
            raise SettingsError(f"max_tokens is {max_tokens}; it must be at least 1")
        if len(tokens) >= self.backend.context:
            raise PromptError(
                f"the prompt has {len(tokens)} tokens and the context holds {self.backend.context}; "
                "shorten it, or load with a longer context if the model allows one"
            )
        return Stream(self, tokens, max_tokens, depth)

    def generate(
        self, prompt: Prompt, *, max_tokens: int = 256, draft_tokens: int | None = None, raw: bool = False
    ) -> Generation:
        """Generate to the end; see `stream` for the arguments and errors."""
        with self.stream(prompt, max_tokens=max_tokens, draft_tokens=draft_tokens, raw=raw) as stream:
            text = "".join(event.text for event in stream)
            assert stream.sequence.finish is not None
            return Generation(text, tuple(stream.sequence.generated), stream.sequence.finish, stream.statistics)

    def encode(self, prompt: Prompt, *, raw: bool = False) -> list[int]:
        """Token ids of a prompt, as `stream` would run them."""
        if isinstance(prompt, str):
            if raw:
                tokens = self.tokenizer.encode(prompt, bos=True)
            else:
                tokens = self._encode_chat([{"role": "user", "content": prompt}])
        else:
            tokens = self._encode_items(list(prompt))
        if not tokens:
            raise PromptError("the prompt is empty; give at least one token")
        beyond = next((token for token in tokens if not 0 <= token < self.backend.vocab_size), None)
        if beyond is not None:
            raise PromptError(f"token {beyond} is outside the model's vocabulary of {self.backend.vocab_size}")
        return tokens

    def _encode_items(self, items: list[Any]) -> list[int]:
        ids = [int(item) for item in items if isinstance(item, Integral) and not isinstance(item, bool)]
        messages = [item for item in items if isinstance(item, Mapping)]
        if ids and messages:
            raise PromptError("the prompt mixes token ids and messages; give one or the other")
        if len(ids) + len(messages) != len(items):
            odd = next(item for item in items if isinstance(item, bool) or not isinstance(item, Integral | Mapping))
            raise PromptError(f"the prompt holds {odd!r}, which is neither a token id nor a message")
        return self._encode_chat(messages) if messages else ids

    def _encode_chat(self, messages: list[Mapping[str, Any]]) -> list[int]:
        if self.chat_template is None:
            raise PromptError("the model has no chat template; use raw text (--raw)")
        return self.tokenizer.encode(self.chat_template.render(messages))


def check_draft_tokens(count: int) -> int:
    """Return the number if it can be a draft length, else raise `SettingsError`."""
    if not 0 <= count <= MAX_DRAFT_TOKENS:
        raise SettingsError(f"draft_tokens is {count}; it must be between 0 and {MAX_DRAFT_TOKENS}")
    return count


class Stream:
    """A generation in flight: iterate for events; `statistics` is valid at any time.

    Holds a cache slot until it ends, or is closed.
    """

    def __init__(self, engine: Engine, tokens: list[int], max_tokens: int, draft_tokens: int) -> None:
        self._engine = engine
        self.sequence = Sequence(
            slot=engine.backend.open_slot(),
            tokens=tokens,
            sampling=Greedy(),
            draft_tokens=draft_tokens,
            max_tokens=max_tokens,
            limit=engine.backend.context,
            stop_ids=engine.stop_ids,
            detokenizer=engine.tokenizer.detokenizer(),
        )
        self._open = True

    @property
    def statistics(self) -> Statistics:
        return self.sequence.statistics

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        while self._open:
            (event,) = step(self._engine.backend, [self.sequence], self._engine.prompt_chunk)
            if event:
                if event.finish:
                    self.close()
                return event
        raise StopIteration

    def close(self) -> None:
        """Stop generating and give the cache slot back. May be called again."""
        if self._open:
            self._open = False
            self.sequence.finish = self.sequence.finish or "cancelled"
            self._engine.backend.close_slot(self.sequence.slot)

    def __del__(self) -> None:
        # A stream that was left before its end gives its slot back too.
        if getattr(self, "_open", False):
            self.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
