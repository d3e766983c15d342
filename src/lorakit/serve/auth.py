"""Who may ask: the API key, the separate admin key, the names this server answers to, body sizes.

Plain ASGI middlewares: they see the request before anything of it is read, and leave streams and
the notice of a client that has gone untouched.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Collection
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorakit.serve.openai_errors import ApiError

ADMIN_PATHS = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter"})


def is_loopback(host: str) -> bool:
    """Whether a server bound to this address can be reached from its own machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True, kw_only=True, slots=True)
class Keys:
    """The keys; None for none.

    Attributes:
        api: what every request but the open paths must carry, as `Authorization: Bearer KEY`.
        admin: what loading and unloading must carry instead; without it both are off.
    """

    api: str | None = None
    admin: str | None = None


class KeyGuard:
    """Lets a request in only with its key; open paths need none.

    Args:
        app: what is guarded.
        keys: the keys.
        open_paths: exact paths for everybody: the health check, the page's files.
    """

    def __init__(self, app: ASGIApp, *, keys: Keys, open_paths: Collection[str]) -> None:
        self._app = app
        self._keys = keys
        self._open = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI's entry."""
        error = self._refusal(scope) if scope["type"] == "http" else None
        if error is not None:
            await error.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        path = scope["path"]
        given = _bearer(Headers(scope=scope))
        if path in ADMIN_PATHS:
            return self._admin_refusal(given)
        if path in self._open or self._keys.api is None:
            return None
        return None if _same(given, self._keys.api) else _unauthorized("API key")

    def _admin_refusal(self, given: str) -> ApiError | None:
        if self._keys.admin is None:
            return ApiError(
                403,
                "loading and unloading adapters is off: the server was started without an admin "
                "key (--admin-key, or LORAKIT_ADMIN_KEY)",
                code="admin_off",
            )
        return None if _same(given, self._keys.admin) else _unauthorized("admin key")


def _bearer(headers: Headers) -> str:
    kind, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if kind.lower() == "bearer" else ""


def _same(given: str, expected: str) -> bool:
    # In a time that does not tell how much of the key was right.
    return hmac.compare_digest(given.encode(), expected.encode())


def _unauthorized(which: str) -> ApiError:
    return ApiError(
        401,
        f"this needs the {which}: send the header Authorization: Bearer KEY",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


class HostGuard:
    """Refuses requests under a foreign name, where a loopback server would answer a web page.

    A page on the web can make its own name point to 127.0.0.1 (DNS rebinding) and then talk to a
    local server without a key; its requests carry that page's name in Host.

    Args:
        app: what is guarded.
        names: host names this server answers to; None for all.
    """

    def __init__(self, app: ASGIApp, *, names: Collection[str] | None) -> None:
        self._app = app
        self._names = None if names is None else {name.lower() for name in names}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI's entry."""
        if scope["type"] == "http" and self._names is not None:
            host = _without_port(Headers(scope=scope).get("host", ""))
            if host.lower() not in self._names and not is_loopback(host):
                error = ApiError(
                    421, f"this server does not answer to the name {host!r}", code="wrong_host"
                )
                await error.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if host.count(":") == 1 else host


class BodyLimit:
    """Refuses bodies that are too long, and bodies that are not JSON.

    The content type matters: a form of a foreign web page can post text/plain without asking.

    Args:
        app: what is guarded.
        max_bytes: of one body.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI's entry."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        length = headers.get("content-length", "0")
        error = None
        if kind != "application/json":
            error = ApiError(
                415,
                f"the body must be JSON: send the header Content-Type: application/json "
                f"(found {kind or 'none'})",
                code="unsupported_media_type",
            )
        elif length.isdecimal() and int(length) > self._max_bytes:
            error = self._too_long()
        if error is not None:
            await error.response()(scope, receive, send)
            return
        body = await self._read(receive)
        if body is None:
            await self._too_long().response()(scope, receive, send)
            return
        unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replayed() -> Message:
            # After the body comes the notice that the client has gone: that one is still live.
            return unread.pop() if unread else await receive()

        await self._app(scope, replayed, send)

    async def _read(self, receive: Receive) -> bytes | None:
        """The whole body; None where it is too long. A client that goes leaves an empty one."""
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return b""
            body += message.get("body", b"")
            if len(body) > self._max_bytes:
                return None
            if not message.get("more_body", False):
                return bytes(body)

    def _too_long(self) -> ApiError:
        return ApiError(
            413, f"the body is longer than {self._max_bytes:,} bytes", code="body_too_large"
        )
