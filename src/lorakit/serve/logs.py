"""One log line per request and per event, as JSON or as text; prompts and keys are never in it."""

from __future__ import annotations

import datetime
import json
import logging
import re
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any, Literal, TextIO

from starlette.datastructures import Headers, MutableHeaders
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOGGER = logging.getLogger("lorakit.serve")
REQUEST_ID_HEADER = "x-request-id"
_SAFE_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")


class _JsonLines(logging.Formatter):
    """{"time", "level", "event", ...facts} on one line."""

    def format(self, record: logging.LogRecord) -> str:
        line = {"time": _time_of(record), "level": record.levelname.lower()}
        line |= {"event": record.getMessage(), **_facts_of(record)}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class _TextLines(logging.Formatter):
    """time level event key=value ..."""

    def format(self, record: logging.LogRecord) -> str:
        # A name from a request may hold line ends: repr keeps it on this line.
        facts = " ".join(f"{key}={_shown(value)}" for key, value in _facts_of(record).items())
        line = f"{_time_of(record)} {record.levelname.lower():<7} {record.getMessage()} {facts}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line.rstrip()


def start_logs(form: Literal["json", "text"], stream: TextIO | None = None) -> logging.Handler:
    """Send this package's and uvicorn's log lines to one stream; returns the handler.

    Args:
        form: JSON lines for machines, text for people.
        stream: by default stderr.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_JsonLines() if form == "json" else _TextLines())
    for name, level in (("lorakit.serve", logging.INFO), ("uvicorn.error", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.propagate = False
        logger.handlers = [handler]
    return handler


def log(event: str, facts: Mapping[str, Any] | None = None, *, level: int = logging.INFO) -> None:
    """Write one event.

    Args:
        event: what happened, in a few constant words.
        facts: what it happened to; None values are left out.
        level: of the logging module.
    """
    LOGGER.log(level, event, extra={"facts": dict(facts or {})})


class RequestLog:
    """Gives every request an id, and logs it with its status and time when it is over.

    A handler adds facts with `facts_of`. The id comes from the client's X-Request-ID if that is
    harmless, and goes back in the same header.

    Args:
        app: what is logged.
        quiet_paths: exact paths that are asked for all the time and logged only when they fail.
        responded: told the route and the status of every response.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        quiet_paths: frozenset[str],
        responded: Callable[[str, int], None],
    ) -> None:
        self._app = app
        self._quiet = quiet_paths
        self._responded = responded

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI's entry."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
        number = given if _SAFE_ID.fullmatch(given) else uuid.uuid4().hex
        facts: dict[str, Any] = {"request_id": number}
        scope.setdefault("state", {})["facts"] = facts
        status, started = 0, time.perf_counter()

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = number
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception:
            # The error handler further out answers with it.
            status = status or 500
            raise
        finally:
            # A client that went before the answer began: nginx's number for it.
            status = status or 499
            self._responded(_route_of(scope), status)
            if scope["path"] not in self._quiet or status >= 400:
                seconds = time.perf_counter() - started
                line = {"method": scope["method"], "path": scope["path"], "status": status}
                log("request", {**line, "seconds": round(seconds, 4), **facts})


def facts_of(scope: Scope) -> dict[str, Any]:
    """What the log line of this request will say; handlers add to it."""
    return scope.setdefault("state", {}).setdefault("facts", {})


def _route_of(scope: Scope) -> str:
    """The route's path as it was declared: what a client makes up must not become a label."""
    route = scope.get("route")
    return route.path if isinstance(route, Route) else "other"


def _facts_of(record: logging.LogRecord) -> dict[str, Any]:
    facts: Mapping[str, Any] = record.__dict__.get("facts", {})
    return {key: value for key, value in facts.items() if value is not None}


def _time_of(record: logging.LogRecord) -> str:
    moment = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _shown(value: object) -> str:
    text = str(value)
    return text if re.fullmatch(r"[\w./:+-]+", text) else repr(text)
