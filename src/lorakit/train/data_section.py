"""The section `data` of a training config: the rows, and how they become examples."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from lorakit.data.classify_options import CLASSIFY_ROLES, ClassifyOptions
from lorakit.data.options import PREFERENCE_ROLES, SFT_ROLES, SftOptions
from lorakit.data.targets import LabelKind
from lorakit.errors import ConfigError

# What only one task reads, with the defaults.
_SFT_KEYS: dict[str, object] = {
    "template": "auto",
    "chat_template": None,
    "template_options": {},
    "system": None,
    "completion_only": True,
    "last_turn_only": False,
    "add_eos": True,
}
_CLASSIFY_KEYS: dict[str, object] = {"labels": "auto", "classes": ()}
# An answer is learned as one, and nothing else of the row is.
_PREFERENCE_FOREIGN = {**_CLASSIFY_KEYS, "completion_only": True, "last_turn_only": False}
# An answer is written by the model: which tokens of the row's own are learned means nothing.
_GRPO_FOREIGN = {**_PREFERENCE_FOREIGN, "add_eos": True}
_FOREIGN = {"sft": _CLASSIFY_KEYS, "classify": _SFT_KEYS, "grpo": _GRPO_FOREIGN}
_ROLES = {
    "sft": SFT_ROLES,
    "classify": CLASSIFY_ROLES,
    "grpo": tuple(role for role in SFT_ROLES if role != "text"),
}


def _help(text: str) -> dict[str, str]:
    return {"help": text}


def require(fits: bool, where: str, expected: str, found: object) -> None:
    """Refuse a value out of its range.

    Raises:
        ConfigError: it is.
    """
    if not fits:
        raise ConfigError(
            f"{where} is out of range", where=where, expected=expected, found=repr(found)
        )


@dataclass(frozen=True, kw_only=True)
class DataSection(SftOptions):
    """The rows, and how they become examples; a bare string stands for `train`."""

    SHORTHAND: ClassVar[str] = "train"

    train: str = field(
        metadata=_help("training rows: jsonl, csv or parquet file, directory, or hub id")
    )
    validation: str | None = field(
        default=None, metadata=_help("validation rows, in the same format")
    )
    validation_share: float | None = field(
        default=None,
        metadata=_help("hold out this share of the training rows for validation, 0 to 1"),
    )

    labels: LabelKind = field(
        default="auto",
        metadata=_help(
            "task classify: classes, regression (numbers), or auto: numbers with a fraction are a "
            "regression"
        ),
    )
    classes: tuple[str, ...] = field(
        default=(),
        metadata=_help(
            "task classify: the classes in the order of their ids; none: the labels of the "
            "training rows, sorted"
        ),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        share = self.validation_share
        require(
            share is None or 0 < share < 1, "data.validation_share", "0 < share < 1 or null", share
        )
        if share is not None and self.validation is not None:
            raise ConfigError(
                "validation rows are given twice",
                where="data.validation and data.validation_share",
                expected="a validation file, or a share of the training rows",
                remedy="remove one of them",
            )

    def classify_options(self) -> ClassifyOptions:
        """The part that task classify reads."""
        return ClassifyOptions(
            columns=self.columns,
            labels=self.labels,
            classes=self.classes,
            max_length=self.max_length,
            on_too_long=self.on_too_long,
        )

    def check_task(self, task: str) -> None:
        """Refuse what means nothing for this task.

        Raises:
            ConfigError: a key of another task is set.
        """
        roles = _ROLES.get(task, PREFERENCE_ROLES)
        foreign = _FOREIGN.get(task, _PREFERENCE_FOREIGN)
        for name, default in foreign.items():
            value = self.__dict__[name]
            if value != default:
                raise ConfigError(
                    f"{name} means nothing for task {task}",
                    where=f"data.{name}",
                    found=repr(value),
                    remedy="remove it, or set another task",
                )
        for role in self.columns:
            if role not in roles:
                raise ConfigError(
                    f"unknown role {role!r} for task {task}",
                    where="data.columns",
                    expected=", ".join(roles),
                )
        if task == "classify":
            self.classify_options()
