"""Keys, host names, body sizes: what is refused before anything of a request is read."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import httpx
import pytest

import tiny_server
from lorakit.errors import RequestError
from lorakit.serve.auth import Keys, is_loopback
from lorakit.serve.monitor import OPEN_PATHS
from lorakit.serve.request import EngineOptions
from lorakit.serve.run import ListenOptions
from lorakit.serve.service import ServeOptions, Service
from lorakit.serve.start import ServeSettings, check

KEYS = Keys(api="s3cret", admin="root")
BODY = {"model": "tiny", "prompt": "ab", "max_tokens": 2}


def guarded(service: Service, **options: Any) -> Service:
    """The same engine behind other guards."""
    return Service(service.engine, service.prompts, options=replace(service.options, **options))


def ask(
    service: Service, path: str, headers: Mapping[str, str] | None = None, **post: Any
) -> httpx.Response:
    async def once() -> httpx.Response:
        async with tiny_server.asking(service) as client:
            if post:
                return await client.post(path, headers=headers, **post)
            return await client.get(path, headers=headers)

    return asyncio.run(once())


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_with_a_key_only_health_and_the_page_s_files_are_open(service: Service) -> None:
    closed = guarded(service, keys=KEYS)
    for path in OPEN_PATHS:
        assert ask(closed, path).status_code == 200, path
    for path in ("/v1/models", "/metrics", "/lorakit/stats", "/lorakit/adapters", "/v1/nothing"):
        for headers in ({}, bearer("wrong"), bearer("root"), {"Authorization": "s3cret"}):
            response = ask(closed, path, headers)
            assert response.status_code == 401, path
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
    assert ask(closed, "/v1/models", bearer("s3cret")).status_code == 200
    assert ask(closed, "/v1/completions", bearer("s3cret"), json=BODY).status_code == 200
    assert ask(closed, "/v1/completions", json=BODY).status_code == 401


def test_loading_needs_the_admin_key_and_not_the_other(service: Service) -> None:
    body = {"lora_name": "x", "lora_path": "nowhere"}
    closed = guarded(service, keys=KEYS)
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        assert ask(closed, path, json=body).status_code == 401
        assert ask(closed, path, bearer("s3cret"), json=body).status_code == 401
        # Without an admin key both are off, whatever is sent.
        for headers in ({}, bearer(""), bearer("None")):
            off = ask(service, path, headers, json=body)
            assert (off.status_code, off.json()["error"]["code"]) == (403, "admin_off")
    let_in = ask(closed, "/v1/load_lora_adapter", bearer("root"), json=body)
    assert let_in.status_code == 400


def test_a_foreign_name_is_refused_where_names_are_checked(service: Service) -> None:
    local = guarded(service, host_names=frozenset({"localhost", "models.internal"}))
    for host in ("localhost:8000", "127.0.0.1:8000", "[::1]:8000", "models.internal", "LOCALHOST"):
        assert ask(local, "/v1/models", {"Host": host}).status_code == 200, host
    for host in ("evil.example", "localhost.evil.example:8000", "10.0.0.7", ""):
        response = ask(local, "/v1/models", {"Host": host})
        assert response.status_code == 421, host
        assert response.json()["error"]["code"] == "wrong_host"
    anyone = guarded(service, host_names=None)
    assert ask(anyone, "/v1/models", {"Host": "evil.example"}).status_code == 200


def test_a_body_is_json_and_not_too_long(service: Service) -> None:
    small = guarded(service, max_body_bytes=200)
    path = "/v1/completions"
    assert ask(small, path, json=BODY).status_code == 200
    long = ask(small, path, json={**BODY, "prompt": "a" * 300})
    assert (long.status_code, long.json()["error"]["code"]) == (413, "body_too_large")

    async def parts() -> Any:
        for _ in range(10):
            yield b" " * 50

    kind = {"Content-Type": "application/json"}
    assert ask(small, path, kind, content=parts()).status_code == 413
    for wrong in ({"Content-Type": "text/plain"}, {}):
        response = ask(small, path, wrong, content=b"{}")
        assert response.status_code == 415
    form = ask(small, path, data={"a": "b"})
    assert form.status_code == 415


def test_every_answer_has_a_request_id_and_a_log_line(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("lorakit.serve")
    logger.propagate = True
    with caplog.at_level(logging.INFO, logger="lorakit.serve"):
        response = ask(
            service, "/v1/completions", {"X-Request-ID": "abc-1"}, json={**BODY, "model": "sql"}
        )
        bad = ask(service, "/v1/completions", {"X-Request-ID": "no\tid"}, json={})
        ask(service, "/health")
    assert response.headers["x-request-id"] == "abc-1"
    assert len(bad.headers["x-request-id"]) == 32
    first, second = [record.__dict__["facts"] for record in caplog.records]
    assert first["request_id"] == "abc-1"
    assert first["adapter"] == "sql"
    assert first["prompt_tokens"] == 2
    assert first["status"] == 200
    assert second["status"] == 400
    assert "prompt" not in first


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.1", "::1", "localhost"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)
    check(ServeSettings(model="m", listen=ListenOptions(host=host)))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", ""])
def test_beyond_this_machine_only_with_a_key_or_when_it_is_meant(host: str) -> None:
    assert not is_loopback(host)
    settings = ServeSettings(model="m", listen=ListenOptions(host=host))
    with pytest.raises(RequestError, match="everybody"):
        check(settings)
    check(replace(settings, keys=Keys(api="k")))
    check(replace(settings, without_key=True))


def test_settings_that_cannot_be_are_refused_before_the_model_is_loaded(tmp_path) -> None:
    with pytest.raises(RequestError, match="the same"):
        check(ServeSettings(model="m", keys=Keys(api="k", admin="k")))
    with pytest.raises(RequestError, match="directory of adapters"):
        check(ServeSettings(model="m", engine=EngineOptions(adapters_dir=tmp_path / "none")))
    with pytest.raises(RequestError, match="--pin"):
        check(ServeSettings(model="m", pinned=("sql",)))


def test_options_have_safe_defaults() -> None:
    options = ServeOptions(name="m")
    assert options.keys == Keys(api=None, admin=None)
    assert ListenOptions().host == "127.0.0.1"
    assert options.max_body_bytes <= 1 << 20
