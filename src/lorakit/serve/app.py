"""The application: routes, guards, errors. It can be run by uvicorn or asked directly in a test."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

from lorakit.errors import LorakitError
from lorakit.serve import openai_errors as errors
from lorakit.serve.admin import admin_routes
from lorakit.serve.api import openai_routes
from lorakit.serve.auth import BodyLimit, HostGuard, KeyGuard
from lorakit.serve.logs import RequestLog
from lorakit.serve.monitor import OPEN_PATHS, QUIET_PATHS, monitor_routes
from lorakit.serve.service import Service


def create_app(service: Service) -> FastAPI:
    """The whole HTTP side.

    Args:
        service: the engine behind it; started and stopped by the caller.
    """
    options = service.options
    app = FastAPI(
        title="lorakit",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        # From the outside in; the log sees everything that is refused further in.
        middleware=[
            Middleware(RequestLog, quiet_paths=QUIET_PATHS, responded=service.metrics.responded),
            Middleware(HostGuard, names=options.host_names),
            Middleware(KeyGuard, keys=options.keys, open_paths=OPEN_PATHS),
            Middleware(BodyLimit, max_bytes=options.max_body_bytes),
        ],
        exception_handlers={
            errors.ApiError: errors.answer_api_error,
            LorakitError: errors.answer_lorakit_error,
            RequestValidationError: errors.answer_validation_error,
            HTTPException: errors.answer_http_error,
            Exception: errors.answer_unexpected,
        },
    )
    for router in (openai_routes(service), admin_routes(service), monitor_routes(service)):
        app.include_router(router)
    return app
