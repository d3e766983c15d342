"""Signals: the first lets what is under way finish, the second cuts it off, the third just ends."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

import tiny_server
from lorakit.serve.request import EngineOptions
from lorakit.serve.run import ListenOptions, listen, run_server, url_of
from lorakit.serve.service import Service
from lorakit.serve.start import ServeSettings

# Seconds of answers, one after the other.
LONG = {"model": "tiny", "prompt": "a", "max_tokens": 200, "n": 16, "ignore_eos": True}


@pytest.fixture
def slow(served_base: Path) -> Iterator[Service]:
    settings = ServeSettings(
        model=str(served_base), name="tiny", engine=EngineOptions(max_batch=1), max_tokens=200
    )
    with tiny_server.in_process(settings) as made:
        yield made


@pytest.fixture(autouse=True)
def own_logs() -> Iterator[None]:
    """The server takes over two loggers; they are given back."""
    loggers = [logging.getLogger(name) for name in ("lorakit.serve", "uvicorn.error")]
    before = [(logger.handlers, logger.propagate, logger.level) for logger in loggers]
    yield
    for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def stopped_by(service: Service, client: Callable[[str], None]) -> float:
    """Run the server in this thread, the only one that hears signals; seconds until it ended."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    options = ListenOptions(port=0, drain_s=100)
    listening = listen(options)
    thread = threading.Thread(target=client, args=[url_of(listening)])
    start = time.monotonic()
    run_server(service, listening, options, on_ready=thread.start)
    seconds = time.monotonic() - start
    thread.join(20)
    assert not thread.is_alive()
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    return seconds


def send(number: int, service: Service) -> None:
    os.kill(os.getpid(), number)
    while not service.draining:
        time.sleep(0.01)
    time.sleep(0.25)  # a signal that waits is not counted twice


@pytest.mark.parametrize(
    ("first", "second"), [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGTERM)]
)
def test_the_second_signal_cuts_off_and_tells_the_clients(
    first: int, second: int, slow: Service, capfd: pytest.CaptureFixture[str]
) -> None:
    seen: dict[str, Any] = {}

    def client(url: str) -> None:
        waiting = threading.Thread(target=wait_for_whole_answer, args=[url])
        with httpx.stream("POST", f"{url}/v1/completions", json={**LONG, "stream": True}) as answer:
            lines = answer.iter_lines()
            seen["first"] = next(lines)
            waiting.start()
            while slow.engine.stats().waiting < 16:
                time.sleep(0.01)
            send(first, slow)
            # After the first signal answers go on, and nobody else comes in.
            with pytest.raises(httpx.ConnectError):
                httpx.get(f"{url}/health")
            seen["going on"] = next(line for line in lines if line)
            send(second, slow)
            seen["rest"] = [line for line in lines if line]
        waiting.join()

    def wait_for_whole_answer(url: str) -> None:
        answer = httpx.post(f"{url}/v1/completions", json={**LONG, "n": 1}, timeout=60)
        seen["whole"] = answer.status_code, answer.json()["error"]["code"]

    seconds = stopped_by(slow, client)
    assert seconds < 8
    assert seen["going on"].startswith("data: ")
    assert seen["rest"][-1] == "data: [DONE]"
    last = json.loads(seen["rest"][-2].removeprefix("data: "))
    assert last["error"]["code"] == "aborted"
    assert seen["whole"] == (503, "aborted")
    assert slow.num_cut_off >= 2
    errors = capfd.readouterr().err
    assert "second_signal='cuts them off'" in errors
    assert f"cut_off={slow.num_cut_off}" in errors


@pytest.mark.parametrize("signals", [2, 3])
def test_a_client_that_sends_half_a_request_does_not_hold_the_server(
    slow: Service, signals: int
) -> None:
    def client(url: str) -> None:
        place = urlsplit(url)
        assert place.hostname
        with socket.create_connection((place.hostname, place.port or 0)) as half:
            head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n"
            half.sendall(f"{head}Content-Type: application/json\r\n\r\n{{".encode())
            time.sleep(0.2)
            for _ in range(signals):
                send(signal.SIGTERM, slow)
            half.settimeout(10)
            try:
                while half.recv(4096):
                    pass
            except ConnectionResetError:
                pass

    # A second after the second signal, or at once with a third.
    assert stopped_by(slow, client) < 5
