"""Warnings on the command line: ours in one line, each once."""

from __future__ import annotations

import warnings

import pytest

from lorakit.cli.main import _warnings_in_style
from lorakit.errors import LorakitWarning


def test_what_was_said_is_not_said_again(capsys: pytest.CaptureFixture[str]) -> None:
    with _warnings_in_style():
        warnings.simplefilter("always")
        for text in ("the first", "the second", "the first"):
            warnings.warn(text, LorakitWarning, stacklevel=1)
    assert capsys.readouterr().err.split("\n") == ["warning: the first", "warning: the second", ""]
