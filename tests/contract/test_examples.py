"""Every script in examples/ runs to its end, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
MAX_LINES = 60

# Importing torch and transformers takes far longer than an example: one process imports them, and
# every example runs in a fork of it, as `python examples/NAME.py` would run it.
_DRIVER = """
import os, runpy, sys
import torch, transformers
import lorakit.formats.peft, lorakit.adapters.fold
for script in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        sys.argv[:] = [script]
        printed = os.path.join(os.environ["OUTPUT"], os.path.basename(script))
        descriptor = os.open(printed, os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        runpy.run_path(script, run_name="__main__")
        sys.exit(0)
    _, status = os.waitpid(child, 0)
    print(os.path.basename(script), os.waitstatus_to_exitcode(status), flush=True)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """Script name -> exit code and what it printed."""
    directory = tmp_path_factory.mktemp("examples")
    environment = {
        **os.environ,
        "OUTPUT": str(directory),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    finished = subprocess.run(
        [sys.executable, "-c", _DRIVER, *map(str, EXAMPLES)],
        env=environment,
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    codes = dict(line.rsplit(" ", 1) for line in finished.stdout.splitlines())
    return {
        name: (int(code), (directory / name).read_text(encoding="utf-8"))
        for name, code in codes.items()
    }


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(script: Path, runs: dict[str, tuple[int, str]]) -> None:
    code, printed = runs[script.name]
    assert code == 0, printed
    assert printed.strip(), "an example should show something"


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_short_and_says_how_it_runs(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_LINES
    assert f"python examples/{script.name}" in text
    assert "import lorakit as lk" in text


def test_examples_use_the_public_api_only() -> None:
    for script in EXAMPLES:
        text = script.read_text(encoding="utf-8")
        assert "from lorakit" not in text, script.name
        assert "import lorakit." not in text, script.name


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 6
