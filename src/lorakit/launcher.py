"""What a launcher of several processes (torchrun, accelerate) says in the environment."""

from __future__ import annotations

import atexit
import os
import sys
from contextlib import suppress

from lorakit.errors import RequestError, WorkError


class FailedElsewhereError(WorkError):
    """Another process failed and says why; this one ends without a word, with the same code."""


def num_launched() -> int:
    """How many processes a launcher says it has started; 1 without a launcher.

    Raises:
        RequestError: it says something that is no number.
    """
    return _number("WORLD_SIZE", 1) or 1


def speaks() -> bool:
    """Whether this process shows progress: the first of several does."""
    return num_launched() == 1 or _number("RANK", 0) == 0


def leave(exit_code: int) -> None:
    """End this process here where it is one of several; returns where it is alone.

    Python's own shutdown is left out, what was registered for it is not: a thread of gloo's may
    still hold the last tensor of a message, asks Python for it in the middle of the shutdown, and
    the process ends with SIGABRT behind a run that is whole (pytorch/pytorch#190489).
    """
    with suppress(RequestError, OSError):
        if num_launched() > 1:
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(exit_code)


def failed_elsewhere(rank: int, exit_code: int) -> FailedElsewhereError:
    """The error of a process that ends because another one failed."""
    error = FailedElsewhereError("another process failed", where=f"process {rank}")
    error.exit_code = exit_code
    return error


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    if text and not text.isdecimal():
        raise RequestError(
            "what the launcher says of its processes cannot be read",
            where=f"the environment, {name}",
            expected="a whole number",
            found=repr(text),
        )
    return int(text) if text else default
