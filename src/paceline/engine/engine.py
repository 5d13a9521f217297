"""The engine users hold: prompts in, streams of events out."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace
from numbers import Integral
from types import TracebackType
from typing import Any, Literal

from paceline.backends.base import Backend
from paceline.config import DrafterConfig, TargetConfig
from paceline.decode.draft_length import Costs, State, next_request, useless
from paceline.decode.rules import RULES, Rule
from paceline.decode.sampling_params import MOST_LOGPROBS, Grammar, check_sampling_params
from paceline.engine.scheduler import Scheduler
from paceline.engine.sequence import Sequence
from paceline.errors import ContextError, PromptError, SettingsError
from paceline.text.chat import ChatTemplate
from paceline.text.stops import check_stops
from paceline.text.tokenizer import Tokenizer
from paceline.types import Event, Generation, SamplingParams, Statistics

MAX_DRAFT_TOKENS = 15  # a verification is at most 16 rows

Prompt = str | Items[int] | Items[Mapping[str, Any]]
"""Text, token ids, or a conversation: messages with `role` and `content`."""

DraftTokens = int | Literal["auto"]
"""Tokens drafted a round, 0 (plain decoding) to 15, or as many as pay."""


@dataclass
class Experience:
    """What an engine learns about drafting from one request for the next."""

    measure: Callable[[], Costs]
    costs: Costs | None = None
    state: State = field(default_factory=State)
    warned: bool = False

    def priced(self) -> Costs:
        """Costs of rounds, measured when first asked for."""
        if self.costs is None:
            self.costs = self.measure()
        return self.costs


@dataclass(frozen=True)
class Request:
    """Settings of one generation; see `Engine.stream`."""

    sampling: SamplingParams | None = None
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    draft_tokens: DraftTokens | None = None
    acceptance_rule: str = "coupled"
    logprobs: int | None = None
    grammar: Grammar | None = None  # that the text must follow; used up by one generation
    marks: Mapping[int, str] = field(default_factory=dict)  # what to write for special tokens; others give no text


@dataclass(frozen=True)
class Engine:
    """A loaded model pair, ready to generate. Made by `paceline.load`.

    The text depends on the prompt, the sampling settings and the seed alone: bit for bit the same whatever drafter is
    used, however many tokens are drafted, however the prompt is cut into chunks, and on any number of threads.
    """

    backend: Backend
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    target_config: TargetConfig
    drafter_config: DrafterConfig | None
    stop_ids: frozenset[int]
    sampling: SamplingParams  # the checkpoint's own, for requests that say nothing
    quant: str
    threads: int
    weight_bytes: int  # the target's packed matrices; per-layer-embedding tables are mapped and not counted
    draft_tokens: DraftTokens
    scheduler: Scheduler
    experience: Experience
    notify: Callable[[str], None] = lambda _: None

    def stream(
        self,
        prompt: Prompt,
        *,
        sampling: SamplingParams | None = None,
        max_tokens: int = 256,
        stop: Items[str] = (),
        draft_tokens: DraftTokens | None = None,
        acceptance_rule: str = "coupled",
        logprobs: int | None = None,
        raw: bool = False,
    ) -> Stream:
        """Start a generation; iterate over the result for what each round adds.

        Args:
            prompt: text (one user turn of the chat template, or as it stands if `raw`), a conversation, or token ids.
            sampling: how tokens are drawn; None for the checkpoint's own settings (`engine.sampling`). Without a seed
                in it a new one is taken, which the result reports.
            max_tokens: tokens to generate at most, from 1.
            stop: strings that end the text, which is cut before them.
            draft_tokens: tokens drafted a round, 0 (plain decoding) to 15, or "auto" for as many as pay; None for the
                engine's setting.
            acceptance_rule: "coupled" (the text does not depend on the drafter) or "rejection" (exact in distribution
                only; more drafts are accepted at high temperatures).
            logprobs: report each token's log-probability and that many alternatives, 0 to 100; None for no report.
            raw: text goes to the model as it is, after its beginning-of-text token.

        Raises:
            PromptError: the prompt is empty, too long for the context, or not valid text.
            SettingsError: a setting out of range.
        """
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        request = Request(sampling, max_tokens, stops, draft_tokens, acceptance_rule, logprobs)
        return Stream(self, self.sequence(self.encode(prompt, raw=raw), request))

    def generate(self, prompt: Prompt, **settings: Any) -> Generation:
        """Generate to the end; see `stream` for the arguments and errors."""
        with self.stream(prompt, **settings) as stream:
            events = list(stream)
            assert stream.sequence.finish is not None
            pieces = [piece for event in events for piece in event.pieces]
            return Generation(
                "".join(event.text for event in events),
                tuple(stream.sequence.generated),
                stream.sequence.finish,
                stream.statistics,
                stream.sampling,
                tuple(piece.logprobs for piece in pieces if piece.logprobs),
            )

    def sequence(self, tokens: list[int], request: Request) -> Sequence:
        """A new sequence for the scheduler.

        Args:
            tokens: a prompt, as `encode` gives it.
            request: settings.

        Raises:
            PromptError: the prompt is too long for the context.
            SettingsError: a setting out of range.
        """
        count, depth = request.logprobs, request.draft_tokens
        if request.max_tokens < 1:
            raise SettingsError(f"max_tokens is {request.max_tokens}; it must be at least 1")
        if count is not None and not 0 <= count <= MOST_LOGPROBS:
            raise SettingsError(f"logprobs is {count}; it must be between 0 and {MOST_LOGPROBS}")
        self.check_length(tokens)
        depth = check_draft_tokens(self.draft_tokens if depth is None else depth)
        auto = depth == "auto" and self.backend.can_draft
        return Sequence(
            tokens=list(tokens),
            rule=self.rule(request.acceptance_rule, request.sampling),
            draft_tokens=None if depth == "auto" else depth,
            max_tokens=request.max_tokens,
            limit=self.backend.context,
            stop_ids=self.stop_ids,
            detokenizer=self.tokenizer.detokenizer(marks=request.marks),
            stops=check_stops(request.stop),
            logprobs=count,
            grammar=request.grammar,
            costs=self.experience.priced() if auto else None,
            control=next_request(self.experience.state),
        )

    def check_length(self, tokens: list[int]) -> None:
        """Raise `ContextError` if a prompt does not fit the context."""
        if len(tokens) >= self.backend.context:
            raise ContextError(
                f"the prompt has {len(tokens)} tokens and the context holds {self.backend.context}; "
                "shorten it, or load with a longer context if the model allows one"
            )

    def learn(self, sequence: Sequence) -> None:
        """Keep what a sequence's rounds have shown, and say so once if the drafter hardly ever guesses right."""
        experience, control = self.experience, sequence.control
        if sequence.costs and not sequence.reading:
            experience.state = control
            if useless(control) and not experience.warned:
                experience.warned = True
                self.notify(
                    f"hardly any draft is accepted ({control.accepted} of {control.drafted}), so drafting rests; is "
                    "this the drafter of another model, or has the model been fine-tuned? (the text is not affected)"
                )

    def rule(self, name: str, sampling: SamplingParams | None) -> Rule:
        """The acceptance rule of that name, with settings that are checked and have a seed."""
        if name not in RULES:
            raise SettingsError(f"unknown acceptance rule {name!r}; use {' or '.join(RULES)}")
        chosen = check_sampling_params(sampling or self.sampling, self.backend.vocab_size)
        if chosen.seed is None and chosen.temperature > 0:
            chosen = replace(chosen, seed=secrets.randbits(53))  # whole in every JSON reader
        return RULES[name](chosen, self.backend)

    def encode(self, prompt: Prompt, *, raw: bool = False) -> list[int]:
        """Token ids of a prompt, as `stream` would run them."""
        if isinstance(prompt, str):
            if raw:
                tokens = self.tokenizer.encode(prompt, bos=True)
            else:
                tokens = self._encode_chat([{"role": "user", "content": prompt}])
        else:
            tokens = self._encode_items(list(prompt))
        return self._checked(tokens)

    def encode_text(self, rendered: str) -> list[int]:
        """Token ids of a prompt with all its special tokens written out, as a chat template gives it."""
        return self._checked(self.tokenizer.encode(rendered))

    def _checked(self, tokens: list[int]) -> list[int]:
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


def check_draft_tokens(count: DraftTokens) -> DraftTokens:
    """Return the setting if it can be a draft length, else raise `SettingsError`."""
    if count != "auto" and not (isinstance(count, int) and 0 <= count <= MAX_DRAFT_TOKENS):
        raise SettingsError(f"draft_tokens is {count!r}; it must be auto, or between 0 and {MAX_DRAFT_TOKENS}")
    return count


class Stream:
    """A generation in flight: iterate for events; `statistics` is valid at any time.

    Takes part in every step of its engine until it ends, or is closed: streams that are read in turn share the passes
    through the model. Where all cache slots are taken it waits.
    """

    def __init__(self, engine: Engine, sequence: Sequence) -> None:
        self._engine = engine
        self.sequence = sequence
        self._events: deque[Event] = deque()
        self._open = False
        engine.scheduler.submit(sequence, self._events.append)
        self._open = True

    @property
    def statistics(self) -> Statistics:
        return self.sequence.statistics

    @property
    def sampling(self) -> SamplingParams:
        """What tokens are drawn with, seed included."""
        return self.sequence.rule.sampling

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        while self._open and not self._events:
            self._engine.scheduler.tick()
        if not self._open:
            raise StopIteration
        event = self._events.popleft()
        if event.finish:
            self.close()
        return event

    def close(self) -> None:
        """Stop generating and give the cache slot back. May be called again."""
        if self._open:
            self._open = False
            self._engine.scheduler.cancel(self.sequence)
            self._engine.scheduler.sweep()
            self._engine.learn(self.sequence)

    def __del__(self) -> None:
        # A stream that was left before its end gives its slot back too.
        if getattr(self, "_open", False):
            self.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
