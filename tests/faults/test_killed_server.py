"""A server killed at any moment: its files are as before, and it starts again on the same port."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

import tiny_server

KILLED_SERVER = Path(__file__).with_name("killed_server.py")
ADMIN = {"Authorization": "Bearer root"}
# Whatever a client asked of a server that died, it must not wait longer for.
PATIENCE_S = 20.0


class Starter:
    """The process of killed_server.py; every server has the same port."""

    def __init__(self, directory: Path) -> None:
        self.base = tiny_server.write_base(directory / "base")
        self.adapters = tiny_server.write_adapters(self.base, directory / "adapters")
        self.stderr = directory / "stderr.txt"
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.process = subprocess.Popen(
            [sys.executable, str(KILLED_SERVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self) -> int:
        """Start a server; its process id."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        paths = {"base": str(self.base), "adapters": str(self.adapters)}
        order = {**paths, "port": self.port, "stderr": str(self.stderr)}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self) -> None:
        """Go on when it answers."""
        end = time.monotonic() + 60
        while True:
            try:
                assert httpx.get(f"{self.url}/health").json() == {"status": "ok"}
                return
            except httpx.TransportError:
                assert time.monotonic() < end, self.stderr.read_text()
                time.sleep(0.01)

    def answer(self, adapter: str) -> list[str]:
        """What it says now: two greedy answers."""
        body = {"model": adapter, "prompt": ["ab", "c"], "max_tokens": 12, "temperature": 0}
        found = httpx.post(f"{self.url}/v1/completions", json=body, timeout=PATIENCE_S).json()
        return [choice["text"] for choice in found["choices"]]

    def files(self) -> dict[str, str]:
        """What lies in the directory of adapters."""
        return {
            str(path): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(self.adapters.rglob("*"))
            if path.is_file()
        }


@pytest.fixture(scope="module")
def starter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Starter]:
    starter = Starter(tmp_path_factory.mktemp("killed"))
    yield starter
    starter.process.communicate()


def _kill(pid: int) -> None:
    """SIGKILL, and wait until the system has let go of its port."""
    os.kill(pid, signal.SIGKILL)
    with suppress(ProcessLookupError):
        while True:
            os.kill(pid, 0)
            time.sleep(0.001)


LONG: dict[str, Any] = {"max_tokens": 60, "ignore_eos": True, "n": 4, "prompt": "a"}


def _stream(url: str) -> None:
    body = {"model": "sql", "stream": True, **LONG}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=PATIENCE_S) as stream:
        for _ in stream.iter_bytes():
            pass


def _ask(url: str) -> None:
    httpx.post(f"{url}/v1/completions", json={"model": "chat", **LONG}, timeout=PATIENCE_S)


def _load(url: str) -> None:
    for verb, more in (("load", {"lora_path": "sql"}), ("unload", {})):
        body = {"lora_name": "sql-v2", **more}
        path = f"{url}/v1/{verb}_lora_adapter"
        httpx.post(path, json=body, headers=ADMIN, timeout=PATIENCE_S)


def _until_the_end(work: Callable[[str], None], url: str, ended: list[str]) -> None:
    try:
        while True:
            work(url)
    except httpx.TimeoutException:
        ended.append("waited in vain")
    except httpx.TransportError as error:
        ended.append(type(error).__name__)


def _keep_busy(url: str, ended: list[str]) -> list[threading.Thread]:
    """Clients of every kind, until the server is gone; each says how it ended."""
    clients = [
        threading.Thread(target=_until_the_end, args=(work, url, ended), daemon=True)
        for work in (_stream, _ask, _load)
    ]
    for client in clients:
        client.start()
    return clients


@pytest.mark.parametrize("count", [2, pytest.param(200, id="many", marks=pytest.mark.slow)])
def test_a_killed_server_leaves_its_files_and_starts_again(starter: Starter, count: int) -> None:
    before = starter.files()
    started = time.monotonic()
    pid = starter.start()
    starter.wait()
    startup_s = time.monotonic() - started
    wanted = {name: starter.answer(name) for name in ("sql", "chat", "tiny")}
    assert len({str(answer) for answer in wanted.values()}) == 3
    rng = random.Random(count)
    for number in range(count):
        if number % 4 == 3:
            # While it starts.
            _kill(pid)
            pid = starter.start()
            time.sleep(rng.uniform(0, startup_s))
            clients, ended = [], ["in the start"]
        else:
            ended: list[str] = []
            clients = _keep_busy(starter.url, ended)
            time.sleep(rng.uniform(0, 0.4))
        _kill(pid)
        for client in clients:
            client.join(PATIENCE_S + 5)
        assert len(ended) == max(1, len(clients))
        assert "waited in vain" not in ended
        assert starter.files() == before
        # The same port, at once.
        pid = starter.start()
        starter.wait()
        adapter = rng.choice(sorted(wanted))
        assert starter.answer(adapter) == wanted[adapter], (number, starter.stderr.read_text())
    _kill(pid)
    assert starter.files() == before
