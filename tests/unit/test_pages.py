"""The verbs that train ask for large pages before torch is there."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lorakit import pages


def test_a_value_that_is_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv(pages._VARIABLE, "0")
    pages.use_huge_pages()
    assert pages.os.environ[pages._VARIABLE] == "0"
    monkeypatch.delenv(pages._VARIABLE)
    pages.use_huge_pages()
    assert pages.os.environ[pages._VARIABLE] == "1"


def test_elsewhere_nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.delenv(pages._VARIABLE, raising=False)
    pages.use_huge_pages()
    assert pages._VARIABLE not in pages.os.environ


def test_the_module_does_not_import_torch() -> None:
    code = "import lorakit.pages, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
