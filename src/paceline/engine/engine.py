"""The engine users hold: prompts in, streams of events out."""

from __future__ import annotations

import secrets
import threading
import weakref
from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace
from functools import cached_property
from numbers import Integral
from typing import Any, Literal

from paceline.backends.base import Backend
from paceline.background import Background
from paceline.config import DrafterConfig, TargetConfig
from paceline.decode.constraints import Grammar
from paceline.decode.draft_length import MAX_DEPTH
from paceline.decode.logprobs import MAX_LOGPROBS
from paceline.engine.acceptance_monitor import AcceptanceMonitor
from paceline.engine.draft_control import DraftControl
from paceline.engine.scheduler import Scheduler
from paceline.engine.sequence import Deliver, Sequence
from paceline.engine.stream import Stream
from paceline.errors import ContextError, PromptError, SettingsError
from paceline.sampling_params import check_sampling_params
from paceline.text.chat import ChatTemplate
from paceline.text.grammar import Grammars
from paceline.text.stops import check_stops
from paceline.text.tokenizer import Tokenizer
from paceline.types import GREEDY, MAX_DRAFT, Generation, SamplingParams

Prompt = str | Items[int] | Items[Mapping[str, Any]]
"""Text, token ids, or a conversation: messages with `role` and `content`."""

DraftTokens = int | Literal["auto"]
"""Tokens drafted a round, 0 (plain decoding) to 15, or as many as pay."""


@dataclass(frozen=True)
class Request:
    """Settings of one generation; see `Engine.stream`."""

    params: SamplingParams | None = None
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    draft_tokens: DraftTokens | None = None
    logprobs: int | None = None
    grammar: Grammar | None = None  # that the text must follow; used up by one generation
    marks: Mapping[int, str] = field(default_factory=dict)  # text to write for special tokens; others give none
    situations: tuple[str, ...] = ()  # that may cost acceptance, as `acceptance_monitor` names them


@dataclass(frozen=True)
class Engine:
    """A loaded model pair, ready to generate. Made by `paceline.load`.

    The text depends on the prompt, the sampling parameters and the seed alone: bit for bit the same whatever drafter is
    used, however many tokens are drafted, however the prompt is cut into chunks, and on any number of threads.

    Several threads may use one engine. All steps run on one thread of the engine's, where an interrupt (Ctrl-C) cannot
    reach them: it ends the waiting, and the generation that was waited for. A process forked after loading cannot use
    the engine and is told so; see `AsyncEngine` for asyncio.
    """

    backend: Backend
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    target_config: TargetConfig
    drafter_config: DrafterConfig | None
    stop_ids: frozenset[int]
    sampling: SamplingParams  # the checkpoint's, for requests that give none
    draft_tokens: DraftTokens
    scheduler: Scheduler
    background: Background = field(default_factory=lambda: Background("paceline-engine"))  # where all steps run
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def grammars(self) -> Grammars:
        """Compiles grammars for the model's tokenizer; needs the `server` extra."""
        with self._lock:
            return self._grammars

    @cached_property
    def _grammars(self) -> Grammars:
        return Grammars(self.tokenizer.dumps(), self.backend.info.vocab_size, self.stop_ids)

    def stream(
        self,
        prompt: Prompt,
        *,
        sampling: SamplingParams | None = None,
        max_tokens: int = 256,
        stop: str | Items[str] = (),
        draft_tokens: DraftTokens | None = None,
        logprobs: int | None = None,
        schema: Mapping[str, Any] | None = None,
        regex: str | None = None,
        grammar: str | None = None,
        raw: bool = False,
    ) -> Stream:
        """Start a generation; iterate over the result for what each round adds.

        Args:
            prompt: text (one user turn of the chat template, or as it stands if `raw`), a conversation, or token ids.
            sampling: sampling parameters; None for the checkpoint's (`engine.sampling`). Without a seed a new one is
                taken, which the result reports.
            max_tokens: tokens to generate at most, from 1.
            stop: strings that end the text, which is cut before them.
            draft_tokens: tokens drafted a round, 0 (plain decoding) to 15, or "auto" for as many as pay; None for the
                engine's setting.
            logprobs: report each token's log-probability and that many alternatives, 0 to 100; None for no report.
            schema: the text is one JSON value of this JSON schema; needs the `server` extra, as do the next two.
            regex: the text matches this regular expression as a whole.
            grammar: the text follows this grammar, in llguidance's dialect of Lark.
            raw: text goes to the model as it is, after its beginning-of-text token.

        Raises:
            PromptError: the prompt is empty, too long for the context, or not valid text.
            SettingsError: a setting out of range, or a schema, expression or grammar that cannot be followed.
        """
        follow = self._grammar(schema, regex, grammar)
        situations = ("raw_text",) if raw and isinstance(prompt, str) and self.chat_template else ()
        request = Request(
            sampling, max_tokens, check_stops(stop), draft_tokens, logprobs, follow, situations=situations
        )
        return Stream(self, self.encode(prompt, raw=raw), request)

    def _grammar(self, schema: Mapping[str, Any] | None, regex: str | None, lark: str | None) -> Grammar | None:
        given = [kind for kind in (schema, regex, lark) if kind is not None]
        if len(given) > 1:
            raise SettingsError("schema, regex and grammar exclude each other; give one")
        if schema is not None:
            return self.grammars.json_schema(dict(schema))
        if regex is not None:
            return self.grammars.regex(regex)
        return None if lark is None else self.grammars.lark(lark)

    def generate(self, prompt: Prompt, **settings: Any) -> Generation:
        """Generate to the end; see `stream` for the arguments and errors."""
        with self.stream(prompt, **settings) as stream:
            return stream.generation()

    def submit(
        self, tokens: list[int], request: Request, deliver: Deliver, *, owner: object = None, client: str = ""
    ) -> Sequence:
        """Queue a generation on this engine's scheduler, whose `tick` then delivers its events.

        Args:
            tokens: a prompt, as `encode` gives it.
            request: settings.
            deliver: called with each event, or with the exception that ended the generation.
            owner: the generation is cancelled when this object has gone.
            client: whom the queue counts it to.

        Raises:
            PromptError: the prompt is too long for the context.
            SettingsError: a setting out of range.
            BusyError: too many requests are waiting.
        """
        count, draft = request.logprobs, request.draft_tokens
        if request.max_tokens < 1:
            raise SettingsError(f"max_tokens is {request.max_tokens}; it must be at least 1")
        if count is not None and not 0 <= count <= MAX_LOGPROBS:
            raise SettingsError(f"logprobs is {count}; it must be between 0 and {MAX_LOGPROBS}")
        self.check_length(tokens)
        draft = check_draft_tokens(self.draft_tokens if draft is None else draft)
        sequence = Sequence(
            tokens=list(tokens),
            params=self._params(request.params),
            draft_tokens=None if draft == "auto" else draft,
            max_tokens=request.max_tokens,
            limit=self.backend.info.context,
            stop_ids=self.stop_ids,
            detokenizer=self.tokenizer.detokenizer(marks=request.marks),
            stops=request.stop,
            logprobs=count,
            grammar=request.grammar,
            situations=request.situations,
            deliver=deliver,
            owner=None if owner is None else weakref.ref(owner),
            client=client,
        )
        self.scheduler.submit(sequence)
        return sequence

    def warm_up(self) -> None:
        """Run a round of each draft length, of which the first on a device takes long, now instead of at a request."""
        endless = replace(GREEDY, suppressed=tuple(sorted(self.stop_ids)))
        longest = min(MAX_DEPTH, self.backend.info.context - 3) if self.backend.info.has_drafter else 0
        for length in range(longest + 1):
            self.generate([0], max_tokens=length + 2, sampling=endless, draft_tokens=length)

    @property
    def acceptance(self) -> AcceptanceMonitor | None:
        """What was observed of the drafter's first drafts."""
        return next((p.monitor for p in self.scheduler.proposers if isinstance(p, DraftControl)), None)

    def check_length(self, tokens: list[int]) -> None:
        """Raise `ContextError` if a prompt does not fit the context."""
        self._check_fits(len(tokens), f"the prompt has {len(tokens)}")

    def _check_fits(self, count: int, what: str) -> None:
        context = self.backend.info.context
        if count >= context:
            raise ContextError(
                f"{what} tokens and the context holds {context}; "
                "shorten it, or load with a longer context if the model allows one"
            )

    def _tokenize(self, text: str, *, bos: bool = False) -> list[int]:
        """Token ids of a text; what cannot fit is refused by its length, before any work."""
        fewest = self.tokenizer.fewest_tokens(text)
        self._check_fits(fewest, f"the prompt has at least {fewest}")
        return self.tokenizer.encode(text, bos=bos)

    def _params(self, given: SamplingParams | None) -> SamplingParams:
        """Sampling parameters that are checked and have a seed."""
        params = check_sampling_params(given or self.sampling, self.backend.info.vocab_size)
        if params.seed is None and params.temperature > 0:
            return replace(params, seed=secrets.randbits(53))  # exact in every JSON reader
        return params

    def encode(self, prompt: Prompt, *, raw: bool = False) -> list[int]:
        """Token ids of a prompt, as `stream` would run them."""
        if isinstance(prompt, str):
            if raw:
                tokens = self._tokenize(prompt, bos=True)
            else:
                tokens = self._encode_chat([{"role": "user", "content": prompt}])
        else:
            tokens = self._encode_items(list(prompt))
        return self._checked(tokens)

    def encode_text(self, rendered: str) -> list[int]:
        """Token ids of a prompt with all its special tokens written out, as a chat template gives it."""
        return self._checked(self._tokenize(rendered))

    def _checked(self, tokens: list[int]) -> list[int]:
        if not tokens:
            raise PromptError("the prompt is empty; give at least one token")
        beyond = next((token for token in tokens if not 0 <= token < self.backend.info.vocab_size), None)
        if beyond is not None:
            raise PromptError(f"token {beyond} is outside the model's vocabulary of {self.backend.info.vocab_size}")
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
        return self._tokenize(self.chat_template.render(messages))


def check_draft_tokens(count: DraftTokens) -> DraftTokens:
    """Return the setting if it can be a draft length, else raise `SettingsError`."""
    if count != "auto" and not (isinstance(count, int) and 0 <= count <= MAX_DRAFT):
        raise SettingsError(f"draft_tokens is {count!r}; it must be auto, or between 0 and {MAX_DRAFT}")
    return count
