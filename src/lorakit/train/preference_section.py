"""The section `preference` of a training config: tasks dpo, orpo and kto."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from lorakit.errors import ConfigError
from lorakit.train.data_section import require

PREFERENCE_TASKS = ("dpo", "orpo", "kto")
# Which tasks read which key; beta is read by all.
_READ_BY: dict[str, tuple[str, ...]] = {
    "loss": ("dpo",),
    "label_noise": ("dpo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
    "desirable_from": ("kto",),
    "reference": ("dpo", "kto"),
    "cache_reference": ("dpo",),
}


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass(frozen=True, kw_only=True)
class PreferenceSection:
    """How preferences are learned.

    Raises:
        ConfigError: a value out of range.
    """

    beta: float = field(
        default=0.1,
        metadata=_help(
            "dpo, kto: how strongly the policy is held to the reference; orpo: the weight of the "
            "odds ratio beside the chosen answer's own loss (the paper's lambda)"
        ),
    )
    loss: Literal["sigmoid", "ipo"] = field(
        default="sigmoid", metadata=_help("dpo: sigmoid (the paper's), or ipo")
    )
    label_noise: float = field(
        default=0.0,
        metadata=_help(
            "dpo, sigmoid: share of pairs whose labels may be wrong, 0 to 0.5 (conservative DPO)"
        ),
    )
    desirable_weight: float = field(
        default=1.0, metadata=_help("kto: weight of the loss of desirable answers")
    )
    undesirable_weight: float = field(
        default=1.0, metadata=_help("kto: weight of the loss of undesirable answers")
    )
    desirable_from: float | None = field(
        default=None,
        metadata=_help(
            "kto: the column label holds ratings, numbers, of which this one and larger ones are "
            "desirable; null: it holds true or false"
        ),
    )
    reference: str | None = field(
        default=None,
        metadata=_help(
            "dpo, kto: what the policy is compared with: base, or the directory of a LoRA adapter; "
            "null: the model as the run begins"
        ),
    )
    cache_reference: bool = field(
        default=False,
        metadata=_help(
            "dpo: compute the reference's log-probabilities once, before the first step, and keep "
            "them in the cache directory for later runs on the same base and rows"
        ),
    )

    def __post_init__(self) -> None:
        require(self.beta > 0, "preference.beta", "> 0", self.beta)
        share = self.label_noise
        require(0 <= share < 0.5, "preference.label_noise", "0 <= share < 0.5", share)
        for name in ("desirable_weight", "undesirable_weight"):
            require(self.__dict__[name] > 0, f"preference.{name}", "> 0", self.__dict__[name])
        if self.loss == "ipo" and share:
            raise ConfigError(
                "ipo has no label noise",
                where="preference.label_noise",
                expected="0, or loss: sigmoid",
                found=f"{share:g}",
            )

    def check_task(self, task: str, train_label_smoothing: float) -> None:
        """Refuse what means nothing for this task.

        Args:
            task: of the config.
            train_label_smoothing: of the section train, which is about tokens.

        Raises:
            ConfigError: a key of another task is set.
        """
        if task not in PREFERENCE_TASKS:
            if self != PreferenceSection():
                raise ConfigError(
                    f"the section 'preference' is set, and the task is {task!r}",
                    where="preference",
                    expected=f"task: {', '.join(PREFERENCE_TASKS)}",
                    remedy="set the task, or remove the section",
                )
            return
        for key in fields(self):
            tasks = _READ_BY.get(key.name, PREFERENCE_TASKS)
            if task not in tasks and self.__dict__[key.name] != key.default:
                raise ConfigError(
                    f"{key.name} means nothing for task {task}",
                    where=f"preference.{key.name}",
                    expected=f"task {' or '.join(tasks)}",
                    remedy="remove it",
                )
        if train_label_smoothing:
            raise ConfigError(
                "train.label_smoothing smooths targets over the vocabulary, and preferences have "
                "none",
                where="train.label_smoothing",
                expected="0",
                found=f"{train_label_smoothing:g}",
                remedy="preference.label_noise is the share of pairs with wrong labels",
            )
