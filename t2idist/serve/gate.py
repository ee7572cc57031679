"""What every request must pass before the API sees it: whose it is, where it comes from, and how large it is."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
import json
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

OPEN_PATHS = ("/", "/page.js", "/page.css", "/healthz", "/openapi.json")
"""Need no token: they hold nothing of the model."""
MAX_JSON_BYTES = 1 << 20
UPLOAD_PATH = "/translate"
DRAIN_SECONDS = 3.0
HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


@dataclass(frozen=True)
class GateConfig:
    """Who may use the server."""

    host: str
    """Address that it listens on."""
    token_sha256: str | None
    """Hash of the token, so that nobody finds the token where this is written; None: no token is needed."""
    upload_bytes: int
    """Largest image file."""


def is_loopback(host: str) -> bool:
    """Return whether an address, or the name localhost, is reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def hash_of(token: str) -> str:
    """Return the hash by which a token is known."""
    return hashlib.sha256(token.encode()).hexdigest()


class TooLarge(Exception):
    """Raised where a body is read that is larger than allowed."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"the request is larger than {_size(limit)}, the most that is read")


class Gate:
    """ASGI middleware: answers what must not be answered by the app with one sentence, and sets headers.

    On loopback the Host header must name loopback, or a page of another site could reach this server under a name of
    its own (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, config: GateConfig) -> None:
        self._app, self._config = app, config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        limit = self._config.upload_bytes if scope["path"] == UPLOAD_PATH else MAX_JSON_BYTES
        refusal = self._refusal(scope, headers, limit)
        if refusal is not None:
            await _answer(*refusal, receive, send)
            return
        if scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}  # uvicorn sends the headers only
        body = _Body(receive, limit)

        async def send_with_headers(message: Message) -> None:
            if body.too_large:
                return
            if message["type"] == "http.response.start":
                given = {name.lower() for name, _ in message["headers"]}
                added = [(n.encode(), v.encode()) for n, v in HEADERS.items() if n.encode() not in given]
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        with contextlib.suppress(TooLarge):  # the app may also answer it, as a body that does not parse
            await self._app(scope, body.receive, send_with_headers)
        if body.too_large:
            await _answer(413, str(TooLarge(limit)), receive, send)

    def _refusal(self, scope: Scope, headers: Mapping[str, str], limit: int) -> tuple[int, str] | None:
        """Return status and sentence for a request that is not answered; None if it is."""
        host = headers.get("host", "")
        if is_loopback(self._config.host) and not self._names_loopback(host):
            return 421, f"the Host header is {host[:100]!r}; this server answers under {self._config.host} only"
        origin = headers.get("origin")
        if origin is not None and _split(origin).netloc != host:
            return 403, f"the request comes from a page of {origin[:100]!r}, not from this server's page"
        if scope["path"] not in OPEN_PATHS and not self._has_token(headers):
            return 401, "this server needs its token, as the header Authorization: Bearer TOKEN"
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > limit:
            return 413, str(TooLarge(limit))
        is_json = media_type(headers) == "application/json"
        if scope["method"] == "POST" and scope["path"] != UPLOAD_PATH and not is_json:
            return 415, "the body must be JSON, with the header Content-Type: application/json"
        return None

    def _names_loopback(self, host: str) -> bool:
        name = _split(f"//{host}").hostname or ""
        return is_loopback(name) or name == self._config.host

    def _has_token(self, headers: Mapping[str, str]) -> bool:
        if self._config.token_sha256 is None:
            return True
        scheme, _, token = headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(hash_of(token.strip()), self._config.token_sha256)
        return scheme.lower() == "bearer" and same


class _Body:
    """The body of a request, of which no more than `limit` bytes reach the app, whatever Content-Length said."""

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive, self._limit, self._bytes = receive, limit, 0

    @property
    def too_large(self) -> bool:
        return self._bytes > self._limit

    async def receive(self) -> Message:
        message = await self._receive()
        self._bytes += len(message.get("body", b""))
        if self.too_large:
            raise TooLarge(self._limit)
        return message


async def _answer(status: int, sentence: str, receive: Receive, send: Send) -> None:
    """Answer a request, then drop what its client still sends for a while: many read nothing until they have sent."""
    body = json.dumps({"error": sentence}).encode()
    headers = {**HEADERS, "content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_SECONDS):
            while (await receive()).get("more_body", False):
                pass
    await send({"type": "http.response.body", "body": b""})


def media_type(headers: Mapping[str, str]) -> str:
    """Return the media type of a body, such as image/png, without its parameters."""
    return headers.get("content-type", "").partition(";")[0].strip().lower()


def _split(url: str) -> SplitResult:
    """Split a URL; an invalid one, such as http://[, has no parts."""
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")


def _size(limit: int) -> str:
    return f"{limit >> 20} MB" if limit >= 1 << 20 else f"{limit} bytes"
