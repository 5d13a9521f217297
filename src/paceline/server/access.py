"""Access control: API keys, allowed Host headers, and the size of request bodies, as ASGI middleware."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from paceline.server.http import error_response

MAX_BODY_WAIT = 60.0  # seconds between two chunks of a body
OPEN_PATHS = frozenset({"/", "/health"})  # the page holds no data, and load balancers have no key


class AccessMiddleware:
    """Rejects requests without a valid key, with another Host header, or with too large a body.

    Args:
        app: the application to protect.
        keys: accepted API keys; none disables the check.
        hosts: allowed Host headers without the port; none allows any. This stops DNS rebinding, by which a web page
            reaches a server on the loopback interface.
        max_bytes: of a body.
    """

    def __init__(self, app: ASGIApp, keys: Iterable[str], hosts: Iterable[str], max_bytes: int) -> None:
        self._app = app
        self._keys = [_digest(key.encode()) for key in keys]
        self._hosts = frozenset(hosts)
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if self._hosts and _host(headers) not in self._hosts:
            message = "Host header not allowed; call the server by its own address, or start it with another --host"
            await error_response(403, message)(scope, receive, send)
        elif self._keys and scope["path"] not in OPEN_PATHS and not self._has_key(headers):
            message = "a valid API key is missing; send it as Authorization: Bearer KEY"
            headers_out = {"www-authenticate": "Bearer"}
            await error_response(401, message, code="invalid_api_key", headers=headers_out)(scope, receive, send)
        elif _length(headers) > self._max_bytes:
            await error_response(413, self._too_large)(scope, receive, send)
        else:
            await self._app(scope, self._limited(receive), send)

    def _has_key(self, headers: Headers) -> bool:
        """Whether a key matches, compared in constant time."""
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer":
            given = headers.get("x-api-key", "")
        digest = _digest(given.strip().encode("latin-1"))  # the bytes as sent
        return sum(hmac.compare_digest(digest, key) for key in self._keys) > 0

    def _limited(self, receive: Receive) -> Receive:
        """Count bytes as they arrive, since a chunked body has no content-length."""
        seen, whole = 0, False

        async def limited() -> Message:
            nonlocal seen, whole
            try:
                async with asyncio.timeout(None if whole else MAX_BODY_WAIT):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, "timeout while receiving the request body; send it faster") from None
            seen += len(message.get("body", b""))
            whole = whole or not message.get("more_body")
            if seen > self._max_bytes:
                raise HTTPException(413, self._too_large)
            return message

        return limited

    @property
    def _too_large(self) -> str:
        return f"the request is larger than {self._max_bytes} bytes; send less, or start the server with --max-body"


def _digest(key: bytes) -> bytes:
    """Digests have equal length, so a comparison reveals nothing about the length of a key."""
    return hashlib.sha256(key).digest()


def _host(headers: Headers) -> str:
    host = headers.get("host", "")
    return host[: host.index("]") + 1] if host.startswith("[") and "]" in host else host.partition(":")[0].lower()


def _length(headers: Headers) -> int:
    value = headers.get("content-length", "0")
    digits = value.isascii() and value.isdigit()
    return int(value[:18]) if digits else 0
