"""What a demo task is: rows to learn, rows to be asked, how to score them, how to train."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def _no_databases(directory: Path) -> None:
    """Tasks without databases write none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoTask:
    """One task.

    Attributes:
        name: as on the command line.
        title: of the report.
        subtitle: one sentence below it.
        split: what keeps the held-out rows apart from the training rows.
        train: chat rows to learn from.
        held_out: chat rows to be asked.
        few_shot: rows shown as examples before the question, for the second baseline.
        metrics: name in result.json -> metric of lorakit.evaluate; the first says what is right.
        lora: the `lora` section of the training config.
        training: its `train` section.
        max_new_tokens: the longest answer, in tokens.
        batch_size: rows answered together.
        write_databases: writes the databases that the rows name into a directory.
    """

    name: str
    title: str
    subtitle: str
    split: str
    train: list[Row]
    held_out: list[Row]
    few_shot: list[Row]
    metrics: Mapping[str, str]
    lora: Mapping[str, Any]
    training: Mapping[str, Any]
    max_new_tokens: int
    batch_size: int = 32
    write_databases: Callable[[Path], None] = field(default=_no_databases)

    def with_examples(self, row: Row) -> Row:
        """The row with the few-shot rows as earlier turns of the conversation."""
        messages = row["messages"]
        system = [m for m in messages[:1] if m["role"] == "system"]
        shown = [m for r in self.few_shot for m in r["messages"] if m["role"] != "system"]
        return {**row, "messages": [*system, *shown, *messages[len(system) :]]}
