"""Streaming parser of a model's output: content, reasoning, and tool calls.

Gemma 4 writes reasoning as `<|channel>thought\\n...<channel|>` and calls as
`<|tool_call>call:NAME{key:value}<tool_call|>`, with `<|"|>` around strings. These are special tokens, which a
detokenizer does not show; here each is replaced by one of Unicode's noncharacters, which no text contains, so nothing
has to be searched for or held back.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
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
    """The replacement character of each special token id of a vocabulary; see `Tokenizer.token_id`."""
    ids = {token_id(name): mark for name, mark in MARKS.items()}
    return {token: mark for token, mark in ids.items() if token is not None}


def ends_in_reasoning(prompt: str) -> bool:
    """Whether a rendered prompt ends inside of reasoning, which the model then continues."""
    return prompt.rfind("<|channel>") > prompt.rfind("<channel|>")


@dataclass(frozen=True)
class OutputDelta:
    """A part of the output. A call starts with its name (`kind` "call"), followed by its arguments in JSON."""

    kind: Literal["content", "reasoning", "call", "arguments"]
    text: str
    call: int = -1  # which call of the output, from 0; -1 for content and reasoning


class OutputParser:
    """Parses the output text of a model.

    Args:
        in_reasoning: the prompt ends inside of reasoning.
    """

    def __init__(self, in_reasoning: bool = False) -> None:
        self._state: Callable[[str], OutputDelta | None] = self._reasoning if in_reasoning else self._content
        self._held = ""
        self._arguments = ArgumentConverter()
        self._calls = 0

    def push(self, text: str) -> list[OutputDelta]:
        """Add text; returns what it added to the output, adjacent deltas of a kind joined."""
        deltas: list[OutputDelta] = []
        for character in text:
            delta = self._state(character)
            if delta is None or not (delta.text or delta.kind == "call"):
                continue
            if deltas and deltas[-1].kind == delta.kind != "call":
                delta = replace(delta, text=deltas.pop().text + delta.text)
            deltas.append(delta)
            if delta.kind == "call":
                deltas.append(OutputDelta("arguments", "{", delta.call))
        return deltas

    @property
    def in_content(self) -> bool:
        """Whether the next text is content."""
        return self._state == self._content

    @property
    def in_reasoning(self) -> bool:
        """Whether the next text is reasoning, or its heading."""
        return self._state in (self._reasoning, self._channel_name)

    def finish(self) -> list[OutputDelta]:
        """Close a call that is still open at the end of the model's turn."""
        if self._state == self._call_arguments and (rest := self._arguments.finish()):
            return [self._arguments_delta(rest)]
        return []

    def _content(self, character: str) -> OutputDelta | None:
        if character == CHANNEL:
            self._enter(self._channel_name)
        elif character == CALL:
            self._enter(self._call_name)
        elif character not in MARKS.values():
            return OutputDelta("content", character)
        return None

    def _channel_name(self, character: str) -> OutputDelta | None:
        if character == CHANNEL_END:
            self._enter(self._content)
        elif character == "\n":
            self._enter(self._reasoning)
        return None

    def _reasoning(self, character: str) -> OutputDelta | None:
        if character == CHANNEL_END:  # and drop trailing line breaks, which are held
            self._enter(self._content)
        elif character == "\n":
            self._held += character
        elif character not in MARKS.values():
            text, self._held = self._held + character, ""
            return OutputDelta("reasoning", text)
        return None

    def _call_name(self, character: str) -> OutputDelta | None:
        if character == CALL_END:  # it was not a call
            text = self._held
            self._enter(self._content)
            return OutputDelta("content", text)
        if character != "{":
            self._held += character if character not in MARKS.values() else ""
            return None
        name = self._held.strip().removeprefix("call:")
        self._arguments = ArgumentConverter()
        self._enter(self._call_arguments)
        self._calls += 1
        return OutputDelta("call", name, self._calls - 1)

    def _call_arguments(self, character: str) -> OutputDelta | None:
        if character == CALL_END:
            rest = self._arguments.finish()
            self._enter(self._content)
            return self._arguments_delta(rest)
        return self._arguments_delta(self._arguments.push(character))

    def _arguments_delta(self, text: str) -> OutputDelta:
        return OutputDelta("arguments", text, self._calls - 1)

    def _enter(self, state: Callable[[str], OutputDelta | None]) -> None:
        self._state, self._held = state, ""


class ArgumentConverter:
    """Converts Gemma's notation of arguments to JSON, character by character from after the opening brace.

    The result is valid JSON if the notation is valid; whatever is still open at the end gets closed.
    """

    def __init__(self) -> None:
        self._open = ["}"]  # closing brackets of open objects and lists
        self._in_key = True  # in an object, before the colon
        self._in_string = False
        self._word = ""  # a key, or a value without quotes
        self._quoted = False  # inside of ordinary quotes, which models sometimes write
        self._comma = ""  # to be written before the next key or value
        self._whole = False  # the key or value at this place is complete

    def push(self, character: str) -> str:
        """Add a character; returns the JSON it adds."""
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
        """Close what is still open."""
        text = '"' if self._in_string else ""
        self._whole = self._whole or self._in_string
        while self._open:
            text += self._end(self._open[-1])
        return text

    def _begin(self, character: str) -> str:
        self._word = ""
        if self._whole:  # a second value at one place: keep the first
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
        """The value at a place that ends; a key without a value gets null."""
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
    """A value without Gemma's quotes: numbers and constants stay, anything else becomes a string."""
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
