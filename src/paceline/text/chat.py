"""Chat templates: conversations to prompts, with the Jinja template of a checkpoint.

Templates are downloaded code, so they run in Jinja's sandbox, with the helpers that transformers provides
(https://huggingface.co/docs/transformers/chat_templating_writing).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from paceline.errors import CheckpointError, PromptError

Message = Mapping[str, Any]
"""One turn: `role` ("system", "user", "assistant", "tool") and `content`, and other fields that the template uses."""


class ChatTemplate:
    """A model's chat template.

    Args:
        source: the Jinja template.
        special_tokens: strings the template refers to, such as `bos_token`.

    Raises:
        CheckpointError: the template is not valid Jinja.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(
                f"the chat template is not valid Jinja (line {error.lineno}: {error.message}); "
                "download chat_template.jinja again, or use --raw"
            ) from error
        self._variables = jinja2.meta.find_undeclared_variables(environment.parse(source))
        self._special_tokens = dict(special_tokens)

    @classmethod
    def open(cls, path: Path, settings: Mapping[str, Any]) -> ChatTemplate | None:
        """Open the template of a checkpoint, None if it has none.

        Args:
            path: where `chat_template.jinja` would be.
            settings: the content of `tokenizer_config.json`, which holds the template in older checkpoints.

        Raises:
            CheckpointError: the template is not valid.
        """
        source = _default_template(settings.get("chat_template"))
        if path.is_file():
            try:
                source = path.read_bytes().decode()
            except UnicodeDecodeError as error:
                raise CheckpointError(f"{path}: is not UTF-8 text; download it again") from error
        if source is None:
            return None
        return cls(source, _special_tokens(settings))

    def knows(self, name: str) -> bool:
        """Whether the template uses a variable."""
        return name in self._variables

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
            PromptError: the template rejects these messages or fails.
        """
        try:
            return self._template.render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
                **variables,
            )
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            ArithmeticError,
            LookupError,
            AttributeError,
            RecursionError,
        ) as error:
            reason = " ".join(str(error).split())
            raise PromptError(
                f"the model's chat template rejects the messages: {reason}; change them or use --raw"
            ) from error


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


def _to_json(value: object, ensure_ascii: bool = False, indent: int | None = None, sort_keys: bool = False) -> str:
    # Jinja's own filter escapes <, > and & for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
