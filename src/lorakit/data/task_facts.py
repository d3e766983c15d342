"""What the passport of a classifier says of its task: enough to use it again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorakit.data.targets import Targets
from lorakit.errors import AdapterFileError
from lorakit.models.task_head import ClassificationHead

_NAME = "classify"


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassifyTask:
    """The task that a classifier was trained on.

    Attributes:
        targets: its classes, or a number.
        columns: role -> column of its training rows.
        max_length: the limit of a row in tokens, or None.
        pad_token_id: what batches are padded with.
    """

    targets: Targets
    columns: Mapping[str, str]
    max_length: int | None
    pad_token_id: int

    @property
    def head(self) -> ClassificationHead:
        """A head of this shape; its first weights are replaced by the learned ones."""
        return ClassificationHead(
            names=self.targets.names, pad_token_id=self.pad_token_id, seed=0, learned=True
        )

    def lines(self) -> dict[str, str]:
        """The task in a few words, label by label."""
        names = self.targets.names
        what = f"{len(names)} classes: {', '.join(names)}" if names else "regression"
        facts = {
            "task": f"{_NAME}, {what}",
            "columns": ", ".join(f"{role} {name}" for role, name in self.columns.items()),
        }
        if self.max_length is not None:
            facts["max length"] = f"{self.max_length} tokens"
        return facts


def saved_task(passport: Mapping[str, Any], *, where: str) -> ClassifyTask | None:
    """The classification task in a passport, or None where what was learned writes text.

    Args:
        passport: the facts beside what was learned.
        where: the directory, for the error.

    Raises:
        AdapterFileError: it names the task and does not describe it.
    """
    task = passport.get("task")
    if not isinstance(task, Mapping) or task.get("name") != _NAME:
        return None
    try:
        limit = task.get("max_length")
        return ClassifyTask(
            targets=Targets.from_json(task["targets"]),
            columns={str(role): str(name) for role, name in task["columns"].items()},
            max_length=None if limit is None else int(limit),
            pad_token_id=int(task["pad_token_id"]),
        )
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise AdapterFileError(
            "the passport does not describe its classes",
            where=f"{where}, lorakit.json, key task",
            expected="targets, columns, max_length and pad_token_id, as lorakit writes them",
            found=f"{type(error).__name__}: {error}",
            remedy="copy the directory again, or train again",
        ) from error
