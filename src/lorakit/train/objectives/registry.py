"""From a task's name in a configuration to its objective."""

from __future__ import annotations

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lorakit.data.rows import Rows
from lorakit.errors import ConfigError
from lorakit.train.config import TrainConfig
from lorakit.train.grpo_section import GRPO
from lorakit.train.objectives.base import LOSS, Objective
from lorakit.train.objectives.classify import ClassifyObjective
from lorakit.train.objectives.grpo import GrpoObjective
from lorakit.train.objectives.preference import PreferenceObjective
from lorakit.train.objectives.sft import SftObjective
from lorakit.train.preference_section import PREFERENCE_TASKS


def build_objective(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, rows: Rows
) -> Objective:
    """The objective of the config's task.

    Args:
        config: the run.
        tokenizer: of the base.
        rows: the training rows.

    Raises:
        ConfigError: the best checkpoint is asked for by a metric that this task does not have.
        DataError: the rows do not fit the task.
    """
    objective: Objective = SftObjective(config, tokenizer)
    if config.task == "classify":
        objective = ClassifyObjective(config, tokenizer, rows)
    elif config.task in PREFERENCE_TASKS:
        objective = PreferenceObjective(config, tokenizer)
    elif config.task == GRPO:
        objective = GrpoObjective(config, tokenizer)
    wanted = config.train.best_metric
    if wanted not in (None, LOSS, *objective.metrics):
        raise ConfigError(
            f"the best checkpoint cannot be chosen by {wanted}",
            where="train.best_metric",
            expected=f"{', '.join((LOSS, *objective.metrics))}, as these rows allow",
            found=wanted,
        )
    return objective


def best_metric(config: TrainConfig, objective: Objective) -> str:
    """What chooses the best checkpoint: the config's metric, else the task's usual one."""
    return config.train.best_metric or objective.best
