"""From the engine's thread to the event loop and on to the client; a client that goes cancels."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from lorakit.serve.engine import Engine
from lorakit.serve.request import Event, FinishedEvent, GenerateRequest, OnEvent

# Proxies close what is silent for a minute.
_PING_S = 15.0
DONE = b"data: [DONE]\n\n"


class Answers:
    """Several requests that are one to the client: their events in the order they happen.

    Args:
        engine: answers.
        requests: one per choice, all started or none.
        on_finished: told of every end in the engine's thread, whether or not anybody still reads.
    """

    def __init__(
        self,
        engine: Engine,
        requests: Sequence[GenerateRequest],
        on_finished: Callable[[FinishedEvent], None],
    ) -> None:
        self._engine = engine
        self._requests = requests
        self._on_finished = on_finished
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._open = set(range(len(requests)))
        self._given_up = False
        self._peeked: list[tuple[int, Event]] = []

    async def start(self) -> None:
        """Submit them all.

        Raises:
            LorakitError: the engine refused one; those before it are cancelled.
        """
        loop = asyncio.get_running_loop()
        try:
            for index, request in enumerate(self._requests):
                # A schema is compiled on submission: not on the event loop.
                submitting = loop.run_in_executor(
                    None, self._engine.submit, request, self._sender(loop, index)
                )
                # The thread goes on when this task is cancelled: what it submits is cancelled then.
                submitting.add_done_callback(self._cancel_late)
                await asyncio.shield(submitting)
        except BaseException:
            self._given_up = True
            self.cancel()
            raise

    def _cancel_late(self, submitting: asyncio.Future[None]) -> None:
        if self._given_up and not submitting.cancelled() and submitting.exception() is None:
            self.cancel()

    def _sender(self, loop: asyncio.AbstractEventLoop, index: int) -> OnEvent:
        def send(event: Event) -> None:
            if isinstance(event, FinishedEvent):
                self._on_finished(event)
            loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        return send

    async def next_events(self) -> list[tuple[int, Event]]:
        """What has happened since: at least one (index, event); empty when all have finished."""
        events, self._peeked = self._peeked, []
        if events or not self._open:
            return events
        events = [await self._events.get()]
        while not self._events.empty():
            events.append(self._events.get_nowait())
        for index, event in events:
            if isinstance(event, FinishedEvent):
                self._open.discard(index)
        return events

    async def early_end(self, timeout_s: float) -> FinishedEvent | None:
        """The end of an answer that finishes within this time without a word, such as a refusal.

        Nothing is lost: `next_events` gives what was seen here.
        """
        with contextlib.suppress(TimeoutError):
            self._peeked = await asyncio.wait_for(self.next_events(), timeout_s)
        first = self._peeked[0][1] if self._peeked else None
        return first if isinstance(first, FinishedEvent) else None

    def cancel(self) -> int:
        """End what is still under way; returns how many that are."""
        still = list(self._open)
        for index in still:
            self._engine.cancel(self._requests[index].id)
        return len(still)


class Shape(Protocol):
    """How events look on the wire."""

    def opening(self) -> Iterable[dict[str, Any]]:
        """The chunks before the first token."""
        ...

    def chunks(self, index: int, event: Event) -> Iterable[dict[str, Any]]:
        """The chunks of one event."""
        ...

    def closing(self) -> Iterable[dict[str, Any]]:
        """The chunks after the last."""
        ...


async def client_gone(receive: Receive) -> None:
    """Return when the client has closed the connection; its body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


@contextlib.asynccontextmanager
async def watching(receive: Receive) -> AsyncIterator[asyncio.Task[None]]:
    """A task that is done when the client has gone."""
    task = asyncio.create_task(client_gone(receive))
    try:
        yield task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


class EventStream(Response):
    """Server-sent events of answers, until they are finished or the client has gone.

    Args:
        answers: started.
        shape: makes chunks of events.
    """

    media_type = "text/event-stream"

    def __init__(self, answers: Answers, shape: Shape) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        # Response counts the bytes of its body; a stream does not know them.
        del self.headers["content-length"]
        self._answers = answers
        self._shape = shape

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything; ASGI's entry."""
        try:
            async with watching(receive) as gone:
                await send(
                    {
                        "type": "http.response.start",
                        "status": self.status_code,
                        "headers": self.raw_headers,
                    }
                )
                await self._body(send, _encoded(self._shape.opening()))
                if await self._relay(send, gone):
                    await self._body(send, _encoded(self._shape.closing()) + DONE, more=False)
        finally:
            self._answers.cancel()

    async def _relay(self, send: Send, gone: asyncio.Task[None]) -> bool:
        """Send events as they come; False if the client went away meanwhile."""
        while True:
            following = asyncio.create_task(self._answers.next_events())
            try:
                while not following.done():
                    waiting = {following, gone}
                    done, _ = await asyncio.wait(
                        waiting, timeout=_PING_S, return_when=asyncio.FIRST_COMPLETED
                    )
                    if gone in done:
                        return False
                    if not done:
                        await self._body(send, b": waiting\n\n")
                events = await following
            finally:
                following.cancel()
            if not events:
                return True
            chunks = [chunk for i, event in events for chunk in self._shape.chunks(i, event)]
            await self._body(send, _encoded(chunks))

    @staticmethod
    async def _body(send: Send, data: bytes, *, more: bool = True) -> None:
        if data or not more:
            await send({"type": "http.response.body", "body": data, "more_body": more})


def _encoded(chunks: Iterable[dict[str, Any]]) -> bytes:
    lines = (
        f"data: {json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n"
        for chunk in chunks
    )
    return "".join(lines).encode()
