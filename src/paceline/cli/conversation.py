"""The conversation of `paceline chat`: messages, settings and commands, independent of the terminal."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from textwrap import shorten
from types import TracebackType
from typing import TYPE_CHECKING

from paceline.errors import PromptError, SettingsError
from paceline.files import atomic_file
from paceline.sampling_params import PARAMETERS, SamplingParams, check_sampling_params

if TYPE_CHECKING:
    from paceline import Engine, Stream
    from paceline.engine.engine import DraftTokens
    from paceline.types import Event, Statistics

    Message = dict[str, str]  # role and content


HELP = """\
/clear             delete all messages; the system prompt stays
/system [TEXT]     show or set the system prompt; none removes it
/undo              remove the last message and its answer
/retry             answer the last message again, with a new seed
/save FILE         write the conversation to a file
/load FILE         continue a conversation from a file
/set [NAME VALUE]  show or change settings, such as temperature
/stats             tokens, speed and acceptance rate of this session
/help              this list
/quit              end; so does Ctrl-D
//text             a message that starts with a slash
Enter sends. Esc Enter starts a new line; so does Enter after \\ or within ```.
Ctrl-C stops an answer and keeps its text so far."""


class Turn:
    """A message and its answer, while streaming. A context manager: at its end, both enter the conversation."""

    def __init__(self, conversation: Conversation, before: list[Message], message: str, stream: Stream) -> None:
        self._conversation, self._before, self._message = conversation, before, message
        self.stream = stream
        self.text = ""
        self.finish: str | None = None

    def __iter__(self) -> Iterator[Event]:
        for event in self.stream:
            self.text += event.text
            self.finish = event.finish
            yield event

    def __enter__(self) -> Turn:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stream.close()
        if self.stream.statistics.tokens:
            self._conversation.statistics.append(self.stream.statistics)
        if (self.text or self.finish) and not isinstance(error, Exception):
            said = [{"role": "user", "content": self._message}, {"role": "assistant", "content": self.text}]
            self._conversation.turns = self._before + said


@dataclass(frozen=True)
class Reply:
    """The result of an input line: a text to show, a turn to run, or the end."""

    text: str = ""
    turn: Turn | None = None
    end: bool = False


@dataclass
class Conversation:
    """Messages, settings, and commands. Commands that raise a `PacelineError` change nothing."""

    engine: Engine
    sampling: SamplingParams
    max_tokens: int = 1024
    stop: tuple[str, ...] = ()
    draft_tokens: DraftTokens | None = None  # None: the engine's setting
    system: str = ""
    turns: list[Message] = field(default_factory=list)
    statistics: list[Statistics] = field(default_factory=list)  # one per answer of this session

    @property
    def messages(self) -> list[Message]:
        return self._system() + self.turns

    def handle(self, line: str) -> Reply:
        """Run a command, or start the answer to a message."""
        line = line.rstrip()
        if not line.strip():
            return Reply()
        if not line.startswith("/") or line.startswith("//"):
            return Reply(turn=self._ask(self.turns, line.removeprefix("/"), self.sampling))
        name, *rest = line[1:].split(maxsplit=1) or [""]
        if name not in COMMANDS:
            raise SettingsError(f"unknown command /{name}; /help lists them, and //{name} sends it as a message")
        return COMMANDS[name](self, rest[0] if rest else "")

    def help(self, _: str) -> Reply:
        return Reply(HELP)

    def quit(self, _: str) -> Reply:
        return Reply(end=True)

    def clear(self, _: str) -> Reply:
        self.turns = []
        return Reply("all messages are deleted")

    def set_system(self, text: str) -> Reply:
        if not text:
            return Reply(self.system or "no system prompt")
        self.system = "" if text == "none" else text
        return Reply("the system prompt is set" if self.system else "the system prompt is removed")

    def undo(self, _: str) -> Reply:
        before, message = self._last()
        self.turns = before
        return Reply(f"removed: {shorten(message, 60)}")

    def retry(self, _: str) -> Reply:
        before, message = self._last()
        note = "" if self.sampling.temperature else "temperature is 0, so the answer is the same (see /set)"
        return Reply(note, self._ask(before, message, replace(self.sampling, seed=None)))

    def save(self, name: str) -> Reply:
        path = _path(name, "/save")
        text = json.dumps(self.messages, ensure_ascii=False, indent=1) + "\n"
        try:
            with atomic_file(path) as file:
                file.write(text.encode("utf-8", "replace"))
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise PromptError(f"{path}: cannot be written ({reason}); name another file") from error
        return Reply(f"{len(self.messages)} messages written to {path}")

    def load(self, name: str) -> Reply:
        path = _path(name, "/load")
        messages = read_messages(path)
        with_system = messages[:1] and messages[0]["role"] == "system"
        self.system = messages.pop(0)["content"] if with_system else ""
        self.turns = messages
        return Reply(f"{len(self.messages)} messages loaded from {path}")

    def set(self, rest: str) -> Reply:
        from paceline.engine.engine import check_draft_tokens

        name, _, word = rest.partition(" ")
        name = name.replace("-", "_")
        if not name:
            return Reply("\n".join(f"{name:<18} {value}" for name, value in self._settings().items()))
        if name not in self._settings():
            raise SettingsError(f"there is no setting {name!r}; use one of {', '.join(self._settings())}")
        value = _value(name, word.strip())
        if name == "draft_tokens":
            self.draft_tokens = check_draft_tokens(value)  # type: ignore[arg-type]
        elif name == "max_tokens":
            self.max_tokens = _check_max_tokens(value)
        else:
            changed = replace(self.sampling, **{name: value})  # type: ignore[arg-type]
            self.sampling = check_sampling_params(changed, self.engine.backend.info.vocab_size)
        return Reply(f"{name} is {self._settings()[name]}")

    def stats(self, _: str) -> Reply:
        return Reply("\n".join(totals(self.statistics)))

    def _system(self) -> list[Message]:
        return [{"role": "system", "content": self.system}] if self.system else []

    def _settings(self) -> dict[str, object]:
        depth = self.engine.draft_tokens if self.draft_tokens is None else self.draft_tokens
        return {
            **{name: "auto" if (value := getattr(self.sampling, name)) is None else value for name in PARAMETERS},
            "max_tokens": self.max_tokens,
            "draft_tokens": depth,
        }

    def _last(self) -> tuple[list[Message], str]:
        """The last message of the user, and the messages before it."""
        asked = [place for place, message in enumerate(self.turns) if message["role"] == "user"]
        if not asked:
            raise PromptError("there is no message yet; send one first")
        return self.turns[: asked[-1]], self.turns[asked[-1]]["content"]

    def _ask(self, before: list[Message], message: str, sampling: SamplingParams) -> Turn:
        asked = [*self._system(), *before, {"role": "user", "content": message}]
        stream = self.engine.stream(
            asked, sampling=sampling, max_tokens=self.max_tokens, stop=self.stop, draft_tokens=self.draft_tokens
        )
        return Turn(self, before, message, stream)


COMMANDS: dict[str, Callable[[Conversation, str], Reply]] = {
    name: getattr(Conversation, name)
    for name in ("help", "clear", "undo", "retry", "save", "load", "set", "stats", "quit")
} | {"system": Conversation.set_system}


def progress(statistics: Statistics) -> str:
    return (
        f"{statistics.tokens} tokens, {statistics.tokens_per_second:.1f} tokens/s, "
        f"acceptance length {statistics.acceptance_length:.2f}"
    )


def summary(statistics: Statistics) -> str:
    """One line about an answer."""
    return f"{progress(statistics)}, prompt {statistics.cached_tokens} of {statistics.prompt_tokens} cached"


def totals(answers: list[Statistics]) -> list[str]:
    """Statistics of all answers together."""
    tokens, rounds = sum(s.tokens for s in answers), sum(s.rounds for s in answers)
    timed, seconds = sum(max(0, s.tokens - 1) for s in answers), sum(s.seconds for s in answers)
    cached, prompt = sum(s.cached_tokens for s in answers), sum(s.prompt_tokens for s in answers)
    lines = [
        f"{len(answers)} answers, {tokens} tokens, {timed / seconds if seconds else 0:.1f} tokens/s, "
        f"acceptance length {timed / rounds if rounds else 0:.2f}, {cached} of {prompt} prompt tokens cached"
    ]
    accepted = [sum(depth) for depth in zip_longest(*(s.accepted_at_depth for s in answers), fillvalue=0)]
    for depth, count in enumerate(accepted, start=1):
        share = count / max(1, rounds)
        lines.append(f"draft {depth:>2} accepted in {share:>4.0%} of rounds {'█' * round(20 * share)}")
    return lines


def read_messages(path: Path) -> list[Message]:
    """Read messages from a file; raises `PromptError`."""
    try:
        messages = json.loads(path.read_bytes())
    except OSError as error:
        raise PromptError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{path}: is not a JSON file ({error}); give one that /save wrote") from error
    if not isinstance(messages, list) or not all(_is_message(place, message) for place, message in enumerate(messages)):
        raise PromptError(f"{path}: is not a conversation; give a list of messages with role and content")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _is_message(place: int, message: object) -> bool:
    if not isinstance(message, dict) or not isinstance(message.get("content"), str):
        return False
    return message.get("role") in ("user", "assistant", *["system"] * (place == 0))


def _path(name: str, command: str) -> Path:
    if not name:
        raise SettingsError(f"{command} needs a file name")
    try:
        path = Path(name).expanduser().resolve()  # replace the target of a link, not the link
    except (OSError, ValueError, RuntimeError) as error:
        raise PromptError(f"{name!r} cannot be a file name ({error})") from error
    if path.exists() and not path.is_file():
        raise PromptError(f"{path}: is not a file; name another")
    return path


def _value(name: str, word: str) -> float | str | None:
    """The value of a setting; its range is not checked here."""
    if word == "auto" and name in ("seed", "draft_tokens"):
        return None if name == "seed" else word
    try:
        return PARAMETERS[name].kind(word) if name in PARAMETERS else int(word)
    except ValueError:
        raise SettingsError(f"{name} cannot be {word!r}; give a number") from None


def _check_max_tokens(count: object) -> int:
    if not isinstance(count, int) or count < 1:
        raise SettingsError(f"max_tokens is {count}; it must be at least 1")
    return count
