from __future__ import annotations

import asyncio
import logging
import threading
from pathlib import Path

import httpx
import pytest

from lorakit.errors import ConfigError, RequestError
from lorakit.serve.ray_app import RaySettings, app, replica_app


def test_settings_as_serve_run_gives_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LORAKIT_API_KEY", raising=False)
    words = {"model": "tiny", "adapters": str(tmp_path), "replicas": "2", "max_batch": "3"}
    made = RaySettings.model_validate({**words, "allow_host": "a.example,b.example"})
    settings = made.for_replica()
    assert (made.replicas, settings.engine.max_batch) == (2, 3)
    assert settings.engine.adapters_dir == tmp_path
    assert settings.host_names == ("a.example", "b.example")
    # Without a key foreign names are refused; with one they are not asked for.
    assert settings.listen.host == "127.0.0.1"
    monkeypatch.setenv("LORAKIT_API_KEY", "s3cret")
    with_key = made.for_replica()
    assert (with_key.keys.api, with_key.listen.host) == ("s3cret", "0.0.0.0")
    assert with_key.keys.admin is None


def test_a_setting_that_cannot_be_is_refused_before_anything_starts(tmp_path: Path) -> None:
    wrong = (
        ({"model": "tiny", "replica": "2"}, "did you mean 'replicas'"),
        ({"model": "tiny", "replicas": "two"}, "replicas="),
        ({"model": "tiny", "quantize": "int8"}, "nf4"),
        ({}, "needs model="),
    )
    for words, said in wrong:
        with pytest.raises(ConfigError) as caught:
            app(words)
        assert said in str(caught.value)
    with pytest.raises(RequestError, match="adapters is not there"):
        app({"model": "tiny", "adapters": str(tmp_path / "nowhere")})


def test_a_replica_answers_until_its_life_ends(
    served_base: Path, served_adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LORAKIT_API_KEY", raising=False)
    for name in ("lorakit.serve", "uvicorn.error"):
        logger = logging.getLogger(name)
        for what, now in (("handlers", logger.handlers), ("level", logger.level)):
            monkeypatch.setattr(logger, what, now)
        monkeypatch.setattr(logger, "propagate", logger.propagate)
    words = {"model": str(served_base), "adapters": str(served_adapters), "name": "one"}
    before = set(threading.enumerate())
    made = replica_app(RaySettings.model_validate(words).for_replica())
    engines = [t for t in threading.enumerate() if t not in before and t.name == "lorakit-engine"]
    assert [thread.is_alive() for thread in engines] == [True]

    async def life() -> None:
        there = httpx.ASGITransport(app=made)
        async with (
            made.router.lifespan_context(made),
            httpx.AsyncClient(transport=there, base_url="http://127.0.0.1", timeout=60) as client,
        ):
            assert (await client.get("/health")).json() == {"status": "ok"}
            body = {"prompt": "How many?", "max_tokens": 8, "temperature": 0}
            answers = [
                await client.post("/v1/completions", json={"model": name, **body})
                for name in ("one", "sql")
            ]
            base, adapted = (answer.json()["choices"][0]["text"] for answer in answers)
            assert base != adapted

    asyncio.run(life())
    assert [thread.is_alive() for thread in engines] == [False]
