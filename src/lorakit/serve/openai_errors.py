"""Every error as OpenAI's clients expect it: {"error": {message, type, param, code}}."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from lorakit.errors import LorakitError, RequestError
from lorakit.serve.logs import facts_of, log

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer that is not a success.

    Args:
        status: the HTTP status.
        message: what is wrong and what to do, for a person.
        code: for a program.
        param: the key of the body that is wrong.
        headers: sent with the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """The answer's JSON."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, kind),
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        """The answer."""
        return JSONResponse(self.body(), status_code=self.status, headers=self.headers)


def from_lorakit(error: LorakitError, *, code: str | None = None) -> ApiError:
    """An error of the package as an answer.

    `where` is left out: on a server it names its files, and callers need not know them.

    Args:
        error: a RequestError is the caller's fault, all others ours.
        code: for a program.
    """
    parts = [error.what]
    for label in ("expected", "found", "remedy"):
        value = {"expected": error.expected, "found": error.found, "remedy": error.remedy}[label]
        if value:
            parts.append(f"{label}: {' '.join(value.split())}")
    status = 400 if isinstance(error, RequestError) else 500
    return ApiError(status, "; ".join(parts), code=code)


def from_validation(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a body."""
    first: dict[str, Any] = dict(error.errors()[0])
    path = [str(part) for part in first.get("loc", ()) if part != "body"]
    if first.get("type") == "json_invalid":
        reason = first.get("ctx", {}).get("error", "")
        return ApiError(400, f"the body is not JSON: {reason}", code="invalid_json")
    message = str(first.get("msg", "")).removeprefix("Value error, ")
    if first.get("type") == "extra_forbidden":
        return ApiError(
            400, f"unknown key {path[-1]!r}", code="unknown_parameter", param=".".join(path)
        )
    where = ".".join(path)
    return ApiError(
        400,
        f"{where}: {message}" if where else message,
        code="missing_required_parameter" if first.get("type") == "missing" else None,
        param=where or None,
    )


async def answer_api_error(_: Request, error: Exception) -> JSONResponse:
    """FastAPI's handler of ApiError."""
    assert isinstance(error, ApiError)
    return error.response()


async def answer_lorakit_error(_: Request, error: Exception) -> JSONResponse:
    """FastAPI's handler of LorakitError."""
    assert isinstance(error, LorakitError)
    return from_lorakit(error).response()


async def answer_validation_error(_: Request, error: Exception) -> JSONResponse:
    """FastAPI's handler of a body that does not fit its schema."""
    assert isinstance(error, RequestValidationError)
    return from_validation(error).response()


async def answer_http_error(request: Request, error: Exception) -> JSONResponse:
    """FastAPI's handler of its own HTTP errors: no such path, no such method."""
    assert isinstance(error, HTTPException)
    message = str(error.detail)
    if error.status_code == 404:
        message = f"there is no {request.url.path} here"
    if error.status_code == 405:
        message = f"{request.url.path} does not take {request.method}"
    headers = dict(error.headers or {})
    return ApiError(error.status_code, message, headers=headers).response()


async def answer_unexpected(request: Request, error: Exception) -> JSONResponse:
    """The handler of everything else: the log has the details, the client a number to quote."""
    number = facts_of(request.scope).get("request_id", "")
    log(
        "unexpected error",
        {"request_id": number, "error": f"{type(error).__name__}: {error}"},
        level=logging.ERROR,
    )
    return ApiError(500, f"the server failed; its log says why (request {number})").response()
