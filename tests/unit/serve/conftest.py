"""One tiny server for all tests of the HTTP side."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import tiny_server
from lorakit.serve.request import EngineOptions
from lorakit.serve.service import Service
from lorakit.serve.start import ServeSettings


@pytest.fixture(scope="session")
def served_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base with a chat template."""
    return tiny_server.write_base(tmp_path_factory.mktemp("serve") / "tiny")


@pytest.fixture(scope="session")
def served_adapters(served_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of adapters over it: sql, chat, broken."""
    return tiny_server.write_adapters(served_base, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="session")
def service(served_base: Path, served_adapters: Path) -> Iterator[Service]:
    """A running engine and what is behind the routes."""
    options = EngineOptions(adapters_dir=served_adapters, max_batch=4, max_queue=8)
    settings = ServeSettings(model=str(served_base), name="tiny", engine=options, max_tokens=100)
    with tiny_server.in_process(settings) as made:
        yield made


@pytest.fixture(scope="session")
def url(service: Service) -> Iterator[str]:
    """The same service on a real socket."""
    with tiny_server.serving(service) as address:
        yield address
