"""Request bodies: how they arrive, and what is checked before they are parsed.

Parsing holds the interpreter's lock, and with it every stream. Its time is bounded by counting what a body consists of
before: strings of any length are cheap, objects, names and values are not.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Message, Receive

from paceline.errors import SettingsError, StoppingError

MAX_BODY_SECONDS = 60.0  # until the whole body has arrived
MOST = {"strings": 1 << 17, "named values": 1 << 15, "objects": 1 << 16, "lists": 1 << 16, "values": 1 << 20}
JSON_TYPE = re.compile(r"application/(?:[\w.-]+\+)?json")
REFERENCE = "#/components/schemas/{model}"

Model = TypeVar("Model", bound=BaseModel)


class Bodies:
    """The bodies that are being received.

    Args:
        max_bytes: of a body.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.stopping = False
        self.waits: set[asyncio.Timeout] = set()

    def stop(self) -> None:
        """Refuse all bodies that have not arrived yet, and those that are still to come."""
        self.stopping = True
        for wait in self.waits:
            wait.reschedule(0)

    @property
    def too_large(self) -> str:
        """What is said about a body beyond `max_bytes`."""
        return f"the request is larger than {self.max_bytes} bytes; send less, or start the server with --max-body"


class Arrival:
    """Receives the body of one request, within the limits of size and time.

    Args:
        bodies: what all requests have in common.
        receive: the ASGI function of the request.
    """

    def __init__(self, bodies: Bodies, receive: Receive) -> None:
        self.size = 0
        self._bodies, self._receive = bodies, receive
        self._end = asyncio.get_running_loop().time() + MAX_BODY_SECONDS
        self._whole = False

    async def __call__(self) -> Message:
        """The next message.

        Raises:
            HTTPException: the body is too large, or takes too long.
            StoppingError: the server stops, and the body has not arrived.
        """
        message = await (self._receive() if self._whole else self._in_time())
        self.size += len(message.get("body", b""))  # a chunked body has no content-length
        self._whole = self._whole or not message.get("more_body")
        if self.size > self._bodies.max_bytes:
            raise HTTPException(413, self._bodies.too_large)
        return message

    async def _in_time(self) -> Message:
        try:
            async with asyncio.timeout_at(0 if self._bodies.stopping else self._end) as wait:
                self._bodies.waits.add(wait)
                try:
                    return await self._receive()
                finally:
                    self._bodies.waits.discard(wait)
        except TimeoutError:
            if self._bodies.stopping:
                raise StoppingError("the server is stopping; try again later") from None
            raise HTTPException(408, f"the body took longer than {MAX_BODY_SECONDS:g} s; send it faster") from None


def check_structure(raw: bytes) -> None:
    """Refuse JSON of more parts than any honest request has, in time linear in its bytes.

    What is no valid JSON may pass, or be refused for its structure.

    Raises:
        SettingsError: it has too many strings, names, objects, lists or values.
    """
    # JSON has backslashes inside of strings only, and without pairs of them and escaped quotes, the rest delimit
    plain = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    counts = {"strings": plain.count(b'"') // 2}
    if counts["strings"] <= MOST["strings"]:
        outside = b"".join(plain.split(b'"')[::2])
        marks = {"named values": b":", "objects": b"{", "lists": b"[", "values": b","}
        counts |= {what: outside.count(mark) for what, mark in marks.items()}
    for what, count in counts.items():
        if count > MOST[what]:
            raise SettingsError(f"the body has {count} {what}, and at most {MOST[what]} are allowed; send less")


async def read_json(request: Request) -> bytes:
    """The body of a request that declares it as JSON. Nothing keeps it but the caller.

    Raises:
        SettingsError: it is declared as something else, or has too many parts.
        HTTPException, StoppingError: see `Arrival`.
    """
    # also a protection: web pages can send other types to any server without asking it
    if not JSON_TYPE.fullmatch(request.headers.get("content-type", "").partition(";")[0].strip().lower()):
        raise SettingsError("send JSON, with the header Content-Type: application/json")
    raw = b"".join([chunk async for chunk in request.stream()])
    check_structure(raw)
    return raw


def explain(error: ValidationError) -> tuple[str, str | None]:
    """What is wrong with a request, and the parameter it is about."""
    errors = error.errors(include_url=False, include_context=False, include_input=False)
    furthest = max(errors, key=lambda one: len(one["loc"]))  # of a union: the member that matched furthest
    if furthest["type"] == "json_invalid":
        return f"the body is not valid JSON ({furthest['msg'].removeprefix('Invalid JSON: ')})", None
    steps = [str(step)[:100] for step in furthest["loc"]]
    place = ".".join(step for step in steps if not set("[-") & set(step))
    return f"{place or 'the body'}: {furthest['msg']}", place or None


def declared(model: type[BaseModel]) -> dict[str, Any]:
    """How the API description says that a route takes a body."""
    schema = {"$ref": REFERENCE.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def component_schemas(models: tuple[type[BaseModel], ...]) -> Mapping[str, Any]:
    """The schemas that `declared` refers to, by name."""
    definitions: Mapping[str, Any] = models_json_schema(
        [(model, "validation") for model in models], ref_template=REFERENCE
    )[1]["$defs"]
    return definitions
