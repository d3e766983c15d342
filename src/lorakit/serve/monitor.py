"""What watches the server: health, metrics, and the page with what it shows."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from fastapi.responses import FileResponse, JSONResponse, Response

from lorakit.serve.request import AdapterInfo
from lorakit.serve.service import Service

PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page/stream.js": ("stream.js", "text/javascript; charset=utf-8"),
    "/page/page.css": ("page.css", "text/css; charset=utf-8"),
    "/favicon.ico": ("favicon.svg", "image/svg+xml"),
}
# Everybody may ask for these; everything else needs the key, where there is one.
OPEN_PATHS = frozenset({"/health", *PAGE})
QUIET_PATHS = frozenset({"/health", "/metrics", "/lorakit/stats", *PAGE})
_WEB = Path(__file__).parent / "web"
# The page runs its own script, asks its own server, and is nobody's frame.
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def monitor_routes(service: Service) -> APIRouter:
    """/health, /metrics, the page, and what the page asks for under /lorakit.

    Args:
        service: is watched.
    """
    router = APIRouter()

    # Balancers ask with either.
    @router.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> JSONResponse:
        if service.engine.failure is not None:
            return JSONResponse({"status": "failed"}, status_code=503)
        if service.draining:
            return JSONResponse({"status": "draining"}, status_code=503)
        return JSONResponse({"status": "ok"})

    @router.get("/metrics")
    async def metrics() -> Response:
        text = await asyncio.to_thread(service.metrics.text)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @router.get("/lorakit/stats")
    async def stats() -> dict[str, Any]:
        return _plain(asdict(service.engine.stats()))

    @router.get("/lorakit/adapters")
    async def adapters() -> dict[str, Any]:
        infos = await asyncio.to_thread(service.engine.pool.list)
        return {"base": service.options.name, "adapters": [summary(info) for info in infos]}

    @router.get("/lorakit/adapters/{name}")
    async def adapter(name: str) -> dict[str, Any]:
        info = await service.info(name)
        return {**summary(info), "key": info.key, "passport": dict(info.passport)}

    for path, (file, kind) in PAGE.items():
        router.add_api_route(path, _file_route(file, kind), methods=["GET"])
    return router


def summary(info: AdapterInfo) -> dict[str, Any]:
    """One line of the page's list of adapters."""
    passport = info.passport
    spec = passport.get("spec")
    return {
        "name": info.name,
        "state": info.state,
        "pinned": info.pinned,
        "r": info.r,
        "alpha": spec.get("alpha") if isinstance(spec, Mapping) else None,
        "num_params": passport.get("num_params"),
        "problem": info.problem,
    }


def _file_route(name: str, kind: str) -> Any:
    async def file() -> FileResponse:
        return FileResponse(_WEB / name, media_type=kind, headers=_PAGE_HEADERS)

    return file


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {key: dict(v) if isinstance(v, Mapping) else v for key, v in values.items()}
