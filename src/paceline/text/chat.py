"""Chat templates: conversations to prompts, with the Jinja template of a checkpoint.

Templates are downloaded code: they run in a process of their own, within limits on time, memory and size.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from paceline.background import Background
from paceline.errors import BackendError, CheckpointError, PromptError
from paceline.text.template_process import TemplateProcess, encoded_variables

MAX_SOURCE = 1 << 20  # characters of a template, and of all its special tokens together

Message = Mapping[str, Any]
"""One turn: `role` ("system", "user", "assistant", "tool") and `content`, and other fields that the template uses."""


class ChatTemplate:
    """A model's chat template. Several threads may use it.

    It starts a process and compiles the template there; the first use, or `check`, waits for that. The process ends
    with the object and before the interpreter does.

    Args:
        source: the Jinja template.
        special_tokens: strings the template refers to, such as `bos_token`.
        name: of the template, for messages.

    Raises:
        CheckpointError: the template or its tokens are too large.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], name: str = "the chat template") -> None:
        if max(len(source), sum(len(key) + len(text) for key, text in special_tokens.items())) > MAX_SOURCE:
            raise CheckpointError(
                f"{name} or its special tokens are larger than {MAX_SOURCE} characters; download it again"
            )
        self._special_tokens = dict(special_tokens)
        self._process = TemplateProcess(source, name)
        self._background = Background("chat template")  # all that is written and read is done here
        weakref.finalize(self, _end, self._process, self._background)
        self._background.post(self._process.start)

    @classmethod
    def open(
        cls, path: Path | None, settings: Mapping[str, Any], where: str = "tokenizer_config.json"
    ) -> ChatTemplate | None:
        """Open the template of a checkpoint, None if it has none.

        Args:
            path: of `chat_template.jinja`; None if there is no such file.
            settings: the content of `tokenizer_config.json`, which holds the template in older checkpoints.
            where: the file that the settings come from, for messages.

        Raises:
            CheckpointError: the template cannot be read or is too large; `check` tells whether it is valid.
        """
        source, name = _default_template(settings.get("chat_template")), f"the chat template in {where}"
        if path and path.is_file():
            name = f"{path}: the chat template"
            try:
                with path.open("rb") as file:
                    source = file.read(4 * MAX_SOURCE + 1).decode()
            except UnicodeDecodeError as error:
                raise CheckpointError(f"{path}: is not UTF-8 text; download it again") from error
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
        if source is None:
            return None
        return cls(source, _special_tokens(settings), name)

    def check(self) -> None:
        """Wait until the template is compiled.

        Raises:
            CheckpointError: it is not valid Jinja, or takes too long.
        """
        with contextlib.suppress(PromptError):  # no process can be started: raw text can be used all the same
            self._background.call(self._process.variables)

    def knows(self, name: str) -> bool:
        """Whether the template uses a variable.

        Raises:
            CheckpointError: the template is not valid.
            PromptError: the process for templates cannot be started.
        """
        return name in self._background.call(self._process.variables)

    def render(
        self,
        messages: Sequence[Message],
        /,
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: object,
    ) -> str:
        """The prompt for a conversation, with special tokens written out.

        Args:
            messages: the turns so far.
            add_generation_prompt: end with the opening of the model's turn.
            tools: function declarations as JSON schema objects.
            variables: further variables of the template, such as `enable_thinking`.

        Raises:
            PromptError: the template rejects these messages or fails, or they hold what JSON cannot.
            CheckpointError: the template is not valid.
        """
        given = {
            **variables,
            **self._special_tokens,
            "messages": list(messages),
            "tools": None if tools is None else list(tools),
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        line, process = encoded_variables(given), self._process
        return self._background.call(lambda: process.render(line))


def _end(process: TemplateProcess, background: Background) -> None:
    with contextlib.suppress(BackendError):  # in a forked child, whose parent goes on with the process
        background.post(process.end)
        process.close()


def _default_template(value: object) -> str | None:
    """`tokenizer_config.json` holds one template or a list of named ones."""
    if isinstance(value, str):
        return value
    named = [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []
    templates = [entry.get("template") for entry in named if entry.get("name") == "default"]
    return templates[0] if templates and isinstance(templates[0], str) else None


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Entries such as `"bos_token": "<bos>"`, or the same as `{"content": "<bos>"}`."""
    tokens = {}
    for name, value in settings.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            tokens[name] = text
    return tokens
