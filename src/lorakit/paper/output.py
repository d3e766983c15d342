"""The directory of all results: whose it is, and what is finished in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lorakit.errors import OutputError, RequestError
from lorakit.files import require_free, write_json
from lorakit.paper.experiments import EXPERIMENTS

MARK = "paper.json"
_KIND = "lorakit paper"


def claim(output: Path, scale: str) -> None:
    """Take the directory for the results of one scale; a directory of ours is taken again.

    Raises:
        OutputError: it is a file, holds something else, or holds results of the other scale.
    """
    mark = output / MARK
    if mark.is_file():
        found = _read(mark)
        if found.get("kind") != _KIND:
            raise OutputError(
                "the output directory holds something else",
                where=str(mark),
                expected="a directory of lorakit paper, or an empty one",
                remedy="choose another output",
            )
        if found.get("scale") != scale:
            raise OutputError(
                "the output directory holds results of another scale",
                where=str(output),
                expected=f"--scale {found.get('scale')}",
                found=f"--scale {scale}",
                remedy="choose another output",
            )
        return
    require_free(output)
    write_json(mark, {"kind": _KIND, "scale": scale})


def result_file(output: Path, name: str) -> Path:
    """Where the result of an experiment stands."""
    return output / f"{name}.json"


def read_results(output: str | Path) -> dict[str, dict[str, Any]]:
    """The finished experiments of a directory, in the order of the paper; empty if there are none.

    Raises:
        RequestError: a result is damaged.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in EXPERIMENTS:
        file = result_file(Path(output), name)
        if file.is_file():
            result = _read(file)
            if result.get("kind") != "paper" or result.get("experiment") != name:
                raise _damaged(file, "not a result of lorakit paper")
            found[name] = result
    return found


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(file, str(error)) from error
    return found if isinstance(found, dict) else {}


def _damaged(file: Path, why: str) -> RequestError:
    return RequestError(
        "a result is damaged", where=str(file), found=why, remedy="remove it, or run it again"
    )
