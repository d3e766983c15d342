"""metrics.jsonl: one line per optimizer step and per validation, without gaps or repeats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lorakit.errors import OutputError
from lorakit.files import write_text, writing

Line = dict[str, Any]


class MetricsLog:
    """Appends lines to a JSON-lines file.

    A training line has step, epoch, loss, grad_norm, lr, and num_tokens and step_s of this step; a
    validation line has step, epoch, eval_loss, eval_tokens and eval_s. Both have a task's metrics.

    Args:
        path: the file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def append(self, line: Line) -> None:
        """Write one line and hand it to the system.

        Raises:
            OutputError: the disk refuses.
        """
        with writing(self.path), self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line, allow_nan=False) + "\n")

    def cut_after(self, step: int) -> None:
        """Remove the lines of later steps, and a last line that a kill cut short.

        Raises:
            OutputError: the disk refuses.
        """
        lines = [line for line in self.read() if line["step"] <= step]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in lines))

    def read(self) -> list[Line]:
        """Every whole line, in order.

        Raises:
            OutputError: a line before the last is not JSON.
        """
        if not self.path.is_file():
            return []
        texts = self.path.read_text(encoding="utf-8").splitlines()
        lines: list[Line] = []
        for number, text in enumerate(texts, start=1):
            try:
                lines.append(json.loads(text))
            except ValueError as error:
                if number == len(texts):
                    break
                raise OutputError(
                    "metrics.jsonl is damaged",
                    where=f"{self.path}, line {number}",
                    expected="one JSON object",
                    found=text[:80],
                ) from error
        return lines
