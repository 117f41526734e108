"""The middleware that checks every request first: host name, API key, size and duration of the body."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress

from fastapi import Request
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pastalm.server.errors import Refused, error_reply
from pastalm.server.metrics import Metrics
from pastalm.server.page import PAGE
from pastalm.server.settings import Settings

_OPEN = frozenset({*PAGE, "/health"})
"""Paths that need no key: the page, which asks the user for it, and the health check."""


class Gate:
    """ASGI middleware that refuses requests before they reach a path, and counts all of them.

    settings: the key, the accepted host names, and the limits on bodies.
    metrics: where requests are counted.
    paths: known paths; others are counted as "other".
    """

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics, paths: frozenset[str]) -> None:
        self._app, self._settings, self._metrics, self._paths = app, settings, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                label = path if path in self._paths else "other"
                self._metrics.requests.labels(label, message["status"]).inc()
            await send(message)

        headers = dict(scope["headers"])
        refused = None
        if not self._accepts_host(scope, headers.get(b"host", b"")):
            message = "this server is not called by this Host: use localhost, or name it with --allowed-host"
            refused = Refused(message, status=403, code="host_not_allowed")
        elif path not in _OPEN and not self._has_key(headers.get(b"authorization", b"")):
            refused = Refused(
                "this server needs its API key: send Authorization: Bearer KEY",
                status=401,
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if refused is not None:
            await (await error_reply(Request(scope), refused))(scope, receive, counted)
            return
        await self._app(scope, self._bounded(receive), counted)

    def _has_key(self, header: bytes) -> bool:
        key = self._settings.api_key
        return key is None or hmac.compare_digest(_sent_key(header), key.encode())

    def _accepts_host(self, scope: Scope, host: bytes) -> bool:
        """Whether the Host header is accepted. On loopback without a key only local names are: a web page can make its
        own host name resolve to this machine (DNS rebinding), and would then be of the same origin."""
        here = (scope.get("server") or ("",))[0]
        if self._settings.api_key is not None or "*" in self._settings.hosts or not (host and is_loopback(here)):
            return True
        name = _hostname(host.decode("latin-1"))
        return is_loopback(name) or name in map(str.lower, self._settings.hosts)

    def _bounded(self, receive: Receive) -> Receive:
        """`receive` that raises HTTPException if the body is too large or too slow."""
        received, whole = 0, False
        settings = self._settings

        async def bounded() -> Message:
            nonlocal received, whole
            if whole:
                return await receive()
            try:
                async with asyncio.timeout(settings.client_timeout):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, "the body does not come: send it whole") from None
            received += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if received > settings.max_body:
                raise HTTPException(413, f"the body is larger than {settings.max_body} bytes: send less")
            return message

        return bounded


def owner(scope: Scope) -> str:
    """On whose behalf a request is: a hash of the API key that it sends, "" without one."""
    key = _sent_key(dict(scope["headers"]).get(b"authorization", b""))
    return hashlib.sha256(key).hexdigest() if key else ""


def _sent_key(header: bytes) -> bytes:
    """The key in an Authorization header; empty if there is none."""
    scheme, _, key = header.partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" else b""


def _hostname(host: str) -> str:
    """A Host header without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower().removesuffix(".")


def is_loopback(name: str) -> bool:
    """Whether a name or address always means this machine."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
