"""Listen, answer, and stop in order.

The first SIGTERM or Ctrl-C: no new requests, those under way are finished. The second: those are
cut off, and their clients told so. The third, or a second later: connections are closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Literal

import uvicorn

from lorakit.errors import RequestError
from lorakit.serve.app import create_app
from lorakit.serve.logs import log, start_logs
from lorakit.serve.service import Service

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# For clients that read, to be told that their answers were cut off.
_LAST_WORDS_S = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ListenOptions:
    """Where to listen and how to stop.

    Attributes:
        host: an address of this machine; a loopback one is for itself only.
        port: 0 takes a free one.
        drain_s: seconds that requests under way have after SIGTERM before they are cut off.
        log: the form of the log on stderr.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    drain_s: float = 30.0
    log: Literal["json", "text"] = "text"


def listen(options: ListenOptions) -> socket.socket:
    """A socket that is bound but not yet answered.

    Raises:
        RequestError: the address is not this machine's, or the port is taken.
    """
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        return socket.create_server((options.host, options.port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise RequestError(
            "cannot listen here",
            where=f"{options.host}, port {options.port}",
            found=str(error),
            remedy="choose another --port, or 0 for a free one",
        ) from error


def url_of(listening: socket.socket) -> str:
    """The address of a bound socket, as a browser takes it."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run_server(
    service: Service,
    listening: socket.socket,
    options: ListenOptions,
    *,
    on_ready: Callable[[], None],
) -> None:
    """Answer until SIGTERM or Ctrl-C, then finish what is under way; a second signal cuts it off.

    Args:
        service: its engine is started.
        listening: see `listen`; closed afterwards.
        options: how to stop and log.
        on_ready: called once, when requests are answered.
    """
    start_logs(options.log)
    config = uvicorn.Config(
        create_app(service),
        # Whatever else is installed: one event loop, and one parser, with its limit on headers.
        loop="asyncio",
        http="h11",
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        # Answers are cut off after drain_s; this is for clients that do not read the end.
        timeout_graceful_shutdown=math.ceil(options.drain_s) + 5,
        timeout_keep_alive=75,
        h11_max_incomplete_event_size=64 * 1024,
    )
    with listening:
        _Server(config, service, on_ready=on_ready, drain_s=options.drain_s).run([listening])
    log("stopped", {"cut_off": service.num_cut_off})


class _Server(uvicorn.Server):
    """uvicorn's server; a signal that was obeyed is over, and does not end the process again."""

    def __init__(
        self,
        config: uvicorn.Config,
        service: Service,
        *,
        on_ready: Callable[[], None],
        drain_s: float,
    ) -> None:
        super().__init__(config)
        self._service = service
        self._on_ready = on_ready
        self._drain_s = drain_s
        self._num_signals = 0
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        stats = self._service.engine.stats()
        under_way = stats.running + stats.waiting
        if under_way:
            facts = {"under_way": under_way, "at_most_s": self._drain_s}
            log("stopping", {**facts, "second_signal": "cuts them off"})
        deadline = asyncio.get_running_loop().call_later(self._drain_s, self._service.cut_off)
        try:
            await super().shutdown(sockets)
        finally:
            deadline.cancel()

    def _cut_off(self) -> None:
        self._service.cut_off()
        asyncio.get_running_loop().call_later(_LAST_WORDS_S, self._close)

    def _close(self) -> None:
        self.force_exit = True
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._service.draining = True
        self.should_exit = True
        self._num_signals += 1
        if self._num_signals > 1 and self._loop is not None:
            hurry = self._cut_off if self._num_signals == 2 else self._close
            self._loop.call_soon_threadsafe(hurry)
