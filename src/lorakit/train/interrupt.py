"""Ctrl-C and SIGTERM: finish the step, save, and say how to go on."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from lorakit.errors import WorkError

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class TrainingPaused(WorkError):  # noqa: N818 - asked for, and nothing is lost
    """The run was asked to stop, and saved a checkpoint first."""

    exit_code = 130


class Interrupt:
    """Notes the first SIGINT or SIGTERM inside its block; a second one stops at once.

    Args:
        insists: whether a second one stops. A launcher passes on what the terminal has sent to its
            processes already, and kills those that do not come to an end in time.

    Attributes:
        requested: whether a signal came.
    """

    def __init__(self, *, insists: bool = True) -> None:
        self.requested = False
        self._insists = insists
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupt:
        # Only the main thread may set handlers; elsewhere signals are not ours to take.
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if self._insists:
            self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
