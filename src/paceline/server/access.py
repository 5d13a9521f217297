"""Access control: API keys, allowed Host headers, and the limits of request bodies, as ASGI middleware."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from paceline.server.bodies import Arrival, Bodies
from paceline.server.http import error_response
from paceline.server.memory import give_back

LARGE_BODY = 256 << 10  # bytes; after such a request free memory is given back
HOST = re.compile(r"(\[[0-9a-f:.]{2,45}\](?=:|\Z)|[a-z0-9._-]{1,253}?)\.?(?::[0-9]{1,5})?")
OPEN_PATHS = frozenset({"/", "/health"})  # the page holds no data, and load balancers have no key


class AccessMiddleware:
    """Rejects requests without a valid key, with another Host header, or with too large a body.

    Who asks is noted in `request.state.client`: a digest of the key if there are keys, else the address.

    Args:
        app: the application to protect.
        keys: accepted API keys; none disables the check.
        hosts: allowed Host headers without the port; none allows any. This stops DNS rebinding, by which a web page
            reaches a server on the loopback interface.
        bodies: the limits of bodies.
    """

    def __init__(self, app: ASGIApp, keys: Iterable[str], hosts: Iterable[str], bodies: Bodies) -> None:
        self._app = app
        self._keys = [_digest(key.encode()) for key in keys]
        self._hosts = frozenset(host.lower() for host in hosts)
        self._bodies = bodies

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
        elif _length(headers) > self._bodies.max_bytes:
            await error_response(413, self._bodies.too_large)(scope, receive, send)
        else:
            address = (scope.get("client") or ("",))[0]
            client = _given_key(headers).hex() if self._keys else str(address)
            scope.setdefault("state", {})["client"] = client[:64]
            arrival = Arrival(self._bodies, receive)
            try:
                await self._app(scope, arrival, send)
            finally:
                if arrival.size > LARGE_BODY:
                    asyncio.get_running_loop().run_in_executor(None, give_back)

    def _has_key(self, headers: Headers) -> bool:
        """Whether a key matches, compared in constant time."""
        digest = _given_key(headers)
        return sum(hmac.compare_digest(digest, key) for key in self._keys) > 0


def _given_key(headers: Headers) -> bytes:
    """Digest of the key in a request."""
    kind, _, given = headers.get("authorization", "").partition(" ")
    if kind.lower() != "bearer":
        given = headers.get("x-api-key", "")
    return _digest(given.strip().encode("latin-1"))  # the bytes as sent


def _digest(key: bytes) -> bytes:
    """Digests have equal length, so a comparison reveals nothing about the length of a key."""
    return hashlib.sha256(key).digest()


def _host(headers: Headers) -> str:
    """The name or address in the Host header; empty if it is not exactly one with an optional port."""
    match = HOST.fullmatch(headers.get("host", "").lower())
    return match[1] if match else ""


def _length(headers: Headers) -> int:
    value = headers.get("content-length", "0")
    digits = value.isascii() and value.isdigit()
    return int(value[:18]) if digits else 0
