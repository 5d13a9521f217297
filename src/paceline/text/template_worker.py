"""Renders one chat template. A script that `paceline.text.chat` runs as a process of its own.

Templates are downloaded code. Jinja's sandbox keeps them from Python's objects but limits neither time nor memory, so
they run where both can be limited, with the helpers that transformers provides
(https://huggingface.co/docs/transformers/chat_templating_writing).

Requests come as lines of JSON on standard input, and each is answered by one line. The first holds the template:
`{"source": ...}`, answered by `{"variables": [...]}`, the names it uses. Each later line holds the variables of one
rendering, answered by `{"text": ...}`. A failure is answered by `{"error": reason}`, a limit that was reached by
`{"limit": reason}`. The process ends at the end of its input.
"""

from __future__ import annotations

import json
import signal
import sys
from datetime import datetime
from typing import Any, NoReturn

MEMORY, TEXT, SECONDS = (int(limit) for limit in sys.argv[1:4])  # bytes, characters, and seconds of one request
MAX_REASON = 10_000  # characters; the reader shortens it further
sys.path += [folder for folder in sys.argv[4:] if folder not in sys.path]  # where the parent finds Jinja

import jinja2  # noqa: E402
import jinja2.meta  # noqa: E402
from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: E402


class Limit(Exception):
    """A rendering is larger than allowed."""


def main() -> None:
    _limit_resources()
    template: jinja2.Template | None = None
    for line in sys.stdin.buffer:
        if hasattr(signal, "alarm"):  # ends this process even if its parent is gone
            signal.alarm(SECONDS + 1)
        answer: dict[str, Any]
        try:
            request = json.loads(line.decode("utf-8", "surrogatepass"))
            if template is None:
                template, names = _compile(request["source"])
                answer = {"variables": names}
            else:
                answer = {"text": _render(template, request)}
            encoded = _encoded(answer)
        except MemoryError:
            encoded = _encoded({"limit": f"it needs more than {MEMORY >> 20} MB of memory"})
        except Limit as error:
            encoded = _encoded({"limit": str(error)})
        except BaseException as error:
            encoded = _encoded({"error": _reason(error)})
        sys.stdout.buffer.write(encoded)
        sys.stdout.buffer.flush()
        if hasattr(signal, "alarm"):
            signal.alarm(0)


def _limit_resources() -> None:
    try:
        import resource

        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    except (ImportError, OSError, ValueError):  # not on this system: the limit on time remains
        pass


def _compile(source: str) -> tuple[jinja2.Template, list[str]]:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    template = environment.from_string(source)
    return template, sorted(jinja2.meta.find_undeclared_variables(environment.parse(source)))


def _render(template: jinja2.Template, variables: dict[str, Any]) -> str:
    pieces, size = [], 0
    for piece in template.generate(variables):
        pieces.append(piece)
        size += len(piece)
        if size > TEXT:
            raise Limit(f"it writes more than {TEXT} characters")
    return "".join(pieces)


def _encoded(answer: dict[str, Any]) -> bytes:
    # Half a surrogate pair in a message stays what it is.
    return (json.dumps(answer, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")


def _reason(error: BaseException) -> str:
    try:
        text = str(error) or type(error).__name__
        if isinstance(error, jinja2.TemplateSyntaxError):
            text = f"line {error.lineno}: {error.message}"
    except Exception:
        text = type(error).__name__
    return text if len(text) <= MAX_REASON else text[: MAX_REASON // 2] + " ... " + text[-MAX_REASON // 2 :]


def _to_json(value: object, ensure_ascii: bool = False, indent: int | None = None, sort_keys: bool = False) -> str:
    # Jinja's own filter escapes <, > and & for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


if __name__ == "__main__":
    main()
