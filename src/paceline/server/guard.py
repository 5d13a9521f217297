"""Who may come in, and with how much: keys, names of this host, sizes of requests. Plain ASGI, before all else."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from paceline.server.wire import error_response

MOST_BODY_SECONDS = 60.0  # between two pieces of a body
OPEN_PATHS = frozenset({"/", "/health"})  # the page holds nothing, and a balancer has no key


class Guard:
    """Lets requests through that have a key, a name of this host, and a body of bounded size.

    Args:
        app: what is guarded.
        keys: accepted; none for no check.
        hosts: names by which this server may be called; none for any. A page elsewhere that points a name of its own
            at this machine is refused by this.
        most_bytes: of a body.
    """

    def __init__(self, app: ASGIApp, keys: Iterable[str], hosts: Iterable[str], most_bytes: int) -> None:
        self._app = app
        self._keys = [_digest(key.encode()) for key in keys]
        self._hosts = frozenset(hosts)
        self._most_bytes = most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if self._hosts and _host(headers) not in self._hosts:
            message = "this server answers to its own names only; start it with --host to be called by others"
            await error_response(403, message)(scope, receive, send)
        elif self._keys and scope["path"] not in OPEN_PATHS and not self._has_key(headers):
            message = "a valid API key is missing; send it as Authorization: Bearer KEY"
            headers_out = {"www-authenticate": "Bearer"}
            await error_response(401, message, code="invalid_api_key", headers=headers_out)(scope, receive, send)
        elif _length(headers) > self._most_bytes:
            await error_response(413, self._too_large)(scope, receive, send)
        else:
            await self._app(scope, self._counted(receive), send)

    def _has_key(self, headers: Headers) -> bool:
        """Whether a key matches, in a time that depends neither on which one nor on how much of it is right."""
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer":
            given = headers.get("x-api-key", "")
        digest = _digest(given.strip().encode("latin-1"))  # as it came: headers are bytes
        found = False
        for key in self._keys:
            found |= hmac.compare_digest(digest, key)
        return found

    def _counted(self, receive: Receive) -> Receive:
        """Count what comes: a body in chunks does not say its length."""
        seen, whole = 0, False

        async def counted() -> Message:
            nonlocal seen, whole
            try:
                async with asyncio.timeout(None if whole else MOST_BODY_SECONDS):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, "the request's body did not come; send it faster") from None
            seen += len(message.get("body", b""))
            whole = whole or not message.get("more_body")
            if seen > self._most_bytes:
                raise HTTPException(413, self._too_large)
            return message

        return counted

    @property
    def _too_large(self) -> str:
        return f"the request is larger than {self._most_bytes} bytes; send less, or start the server with --max-body"


def _digest(key: bytes) -> bytes:
    """Of equal length for all keys, so that a comparison tells nothing of theirs."""
    return hashlib.sha256(key).digest()


def _host(headers: Headers) -> str:
    host = headers.get("host", "")
    return host[: host.index("]") + 1] if host.startswith("[") and "]" in host else host.partition(":")[0].lower()


def _length(headers: Headers) -> int:
    value = headers.get("content-length", "0")
    digits = value.isascii() and value.isdigit()
    return int(value[:18]) if digits else 0
