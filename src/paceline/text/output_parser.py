"""What a model writes in its turn, told apart as it comes: content, thoughts, and calls of functions.

Gemma 4 sets thoughts as `<|channel>thought\\n...<channel|>` and calls as
`<|tool_call>call:NAME{key:value}<tool_call|>`, with `<|"|>` around strings. These are special tokens, which a
detokenizer does not show; here each is written as one character that no text contains (one of Unicode's
noncharacters), so nothing has to be searched for or held back.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

CHANNEL, CHANNEL_END, CALL, CALL_END, QUOTE = (chr(code) for code in range(0xFDD0, 0xFDD5))
MARKS = {
    "<|channel>": CHANNEL,
    "<channel|>": CHANNEL_END,
    "<|tool_call>": CALL,
    "<tool_call|>": CALL_END,
    '<|"|>': QUOTE,
}


def marks_of(token_id: Callable[[str], int | None]) -> dict[int, str]:
    """What a vocabulary's special tokens are written as; see `Tokenizer.token_id`."""
    ids = {token_id(name): mark for name, mark in MARKS.items()}
    return {token: mark for token, mark in ids.items() if token is not None}


def begins_in_thought(prompt: str) -> bool:
    """Whether a rendered prompt ends inside of a thought, which the model then goes on with."""
    return prompt.rfind("<|channel>") > prompt.rfind("<channel|>")


@dataclass(frozen=True)
class Part:
    """A piece of an answer. A call's name comes first, then its arguments in JSON, bit by bit."""

    kind: Literal["content", "thought", "call", "arguments"]
    text: str


class AnswerReader:
    """Tells an answer's parts apart as its text comes.

    Args:
        in_thought: the prompt has opened a thought already.
    """

    def __init__(self, in_thought: bool = False) -> None:
        self._state: Callable[[str], Part | None] = self._thought if in_thought else self._content
        self._held = ""
        self._arguments = ArgumentReader()

    def push(self, text: str) -> list[Part]:
        """The parts that became certain with this text; neighbours of a kind are joined."""
        parts: list[Part] = []
        for character in text:
            part = self._state(character)
            if part is None or not (part.text or part.kind == "call"):
                continue
            if parts and parts[-1].kind == part.kind != "call":
                part = Part(part.kind, parts.pop().text + part.text)
            parts.append(part)
            if part.kind == "call":
                parts.append(Part("arguments", "{"))
        return parts

    @property
    def in_content(self) -> bool:
        """Whether what comes now is content."""
        return self._state == self._content

    @property
    def in_thought(self) -> bool:
        """Whether what comes now is a thought, or its heading."""
        return self._state in (self._thought, self._channel_name)

    def finish(self) -> list[Part]:
        """The model has ended its turn: a call that it left open is closed."""
        if self._state == self._call_arguments and (rest := self._arguments.finish()):
            return [Part("arguments", rest)]
        return []

    def _content(self, character: str) -> Part | None:
        if character == CHANNEL:
            self._enter(self._channel_name)
        elif character == CALL:
            self._enter(self._call_name)
        elif character not in MARKS.values():
            return Part("content", character)
        return None

    def _channel_name(self, character: str) -> Part | None:
        if character == CHANNEL_END:
            self._enter(self._content)
        elif character == "\n":
            self._enter(self._thought)
        return None

    def _thought(self, character: str) -> Part | None:
        if character == CHANNEL_END:  # with what is held: line breaks in front of it are not part of the thought
            self._enter(self._content)
        elif character == "\n":
            self._held += character
        elif character not in MARKS.values():
            text, self._held = self._held + character, ""
            return Part("thought", text)
        return None

    def _call_name(self, character: str) -> Part | None:
        if character == CALL_END:  # not a call after all
            text = self._held
            self._enter(self._content)
            return Part("content", text)
        if character != "{":
            self._held += character if character not in MARKS.values() else ""
            return None
        name = self._held.strip().removeprefix("call:")
        self._arguments = ArgumentReader()
        self._enter(self._call_arguments)
        return Part("call", name)

    def _call_arguments(self, character: str) -> Part | None:
        if character == CALL_END:
            rest = self._arguments.finish()
            self._enter(self._content)
            return Part("arguments", rest)
        return Part("arguments", self._arguments.push(character))

    def _enter(self, state: Callable[[str], Part | None]) -> None:
        self._state, self._held = state, ""


class ArgumentReader:
    """Turns Gemma's notation of arguments into JSON as it comes: keys get quotes, strings JSON's own.

    It starts behind the opening brace and takes single characters. The result is valid JSON if the notation is valid;
    what a model leaves open at its end is closed.
    """

    def __init__(self) -> None:
        self._open = ["}"]  # the brackets that will close what is open
        self._in_key = True  # in an object, before the colon
        self._in_string = False
        self._word = ""  # a key, or a value without quotes
        self._quoted = False  # inside ordinary quotes, which models write now and then
        self._comma = ""  # before what comes next, if anything does
        self._whole = False  # the key or value at this place has come

    def push(self, character: str) -> str:
        """JSON that became certain."""
        if not self._open:
            return ""
        if self._in_string:
            self._in_string = character != QUOTE
            if character != QUOTE and character in MARKS.values():
                return ""
            return '"' if character == QUOTE else json.dumps(character, ensure_ascii=False)[1:-1]
        if not self._word.strip() and character in (QUOTE if self._in_key else QUOTE + "{["):
            return self._begin(character)
        if character in MARKS.values():
            return ""
        if not self._quoted and character in (",", ":" if self._in_key else ",", self._open[-1]):
            return self._end(character)
        if character == '"' and not self._word.endswith("\\") and (self._quoted or not self._word.strip()):
            self._quoted = not self._quoted
        self._word += character
        return ""

    def finish(self) -> str:
        """The end of JSON that was left open; nothing if it is whole."""
        text = '"' if self._in_string else ""
        self._whole = self._whole or self._in_string
        while self._open:
            text += self._end(self._open[-1])
        return text

    def _begin(self, character: str) -> str:
        self._word = ""
        if self._whole:  # a second value at one place: the first stands
            return ""
        comma, self._comma = self._comma, ""
        if character == QUOTE:
            self._in_string = self._whole = True
            return comma + '"'
        self._open.append("}" if character == "{" else "]")
        self._in_key = character == "{"
        return comma + character

    def _end(self, character: str) -> str:
        word, self._word = self._word.strip(), ""
        if character == ":":
            key = "" if self._whole else self._take(_key(word))
            self._in_key = self._whole = False
            return key + ":"
        text = self._last(word)
        if character == ",":
            self._comma = "," if self._whole or text else self._comma
            self._in_key, self._whole = self._open[-1] == "}", False
            return text
        self._open.pop()
        self._comma, self._in_key, self._whole = "", False, True
        return text + character

    def _last(self, word: str) -> str:
        """What stands at a place that ends: a key alone means null, as a key without a value does."""
        if self._whole:
            return ":null" if self._in_key else ""
        if self._in_key:
            return self._take(_key(word) + ":null") if word else ""
        if not word and self._open[-1] == "]":
            return ""
        return self._take(_value(word) if word else "null")

    def _take(self, text: str) -> str:
        comma, self._comma = self._comma, ""
        return comma + text


def _key(word: str) -> str:
    return json.dumps(word.strip().strip('"'), ensure_ascii=False)


def _value(word: str) -> str:
    """A value without Gemma's quotes: a number or constant as it is, anything else as a string."""
    word = word.strip()
    if not word:
        return ""
    try:
        json.loads(word, parse_constant=_refuse)
    except ValueError:
        return json.dumps(word, ensure_ascii=False)
    return word


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def gemma_notation(value: object) -> str:
    """A JSON value in Gemma's notation, special tokens written out: the inverse of `ArgumentReader`."""
    if isinstance(value, str):
        return f'<|"|>{value}<|"|>'
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{gemma_notation(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(gemma_notation, value)) + "]"
    return json.dumps(value)
