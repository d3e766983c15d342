"""What a sweep leaves: sweep.json, report.html, best/."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorakit.files import atomic_directory, write_json, writing
from lorakit.report.collect import collect
from lorakit.report.html import write_report

BEST = "best"


def write_results(directory: Path, document: Mapping[str, Any]) -> Path | None:
    """Write the files, each whole or not at all, and copy the winner's adapter.

    Returns:
        Where the winner's adapter is; None without a winner.

    Raises:
        OutputError: the disk refuses.
    """
    best = directory / BEST
    winner = next((arm for arm in document["arms"] if arm["name"] == document["best"]), None)
    if winner is not None:
        with atomic_directory(best, replace=True) as staging, writing(staging):
            shutil.copytree(directory / winner["adapter"], staging, dirs_exist_ok=True)
    write_json(directory / "sweep.json", document)
    write_report(collect(directory), directory / "report.html")
    return None if winner is None else best
