"""Lines that say how far the work is, where there is no terminal."""

from __future__ import annotations

import errno
import io
import sys

import pytest

from lorakit.cli import console
from lorakit.progress import progress


def test_a_line_at_the_end_says_what_was_done(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("training", 3) as bar:
        for _ in range(3):
            bar.advance()
    assert capsys.readouterr().err == "training: 3/3  0 s  done\n"


def test_a_log_that_takes_no_more_does_not_end_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, "stderr", Full())
    with progress("training", 2) as bar:
        bar.advance()
    console.note("saved")
    console.warn("careful")
