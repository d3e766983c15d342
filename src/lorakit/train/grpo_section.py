"""The section `grpo` of a training config: answers that the model samples, and what they earn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from lorakit.data.options import SftOptions
from lorakit.errors import ConfigError
from lorakit.evaluate.options import METRICS, SINGLE_METRICS
from lorakit.train.data_section import require

GRPO = "grpo"
# Whose special tokens stand beside the prompt's; sampling and learning would number them apart.
_PREFIXES = ("prefix_embedding", "prefix_layer")


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass(frozen=True, kw_only=True)
class GrpoSection:
    """How answers are sampled, rewarded and learned.

    Raises:
        ConfigError: a value out of range.
    """

    reward: str | Mapping[str, float] | None = field(
        default=None,
        metadata=_help(
            f"what an answer earns: a metric ({', '.join(SINGLE_METRICS)}), your own function "
            "(rewards.py:name or package.module:name), or several with their weights, as in "
            "{sql_execution: 1, exact_match: 0.2}"
        ),
    )
    num_samples: int = field(default=8, metadata=_help("answers to each prompt, 2 or more"))
    temperature: float = field(
        default=1.0, metadata=_help("of the sampling, and of the policy that is learned")
    )
    max_new_tokens: int = field(default=128, metadata=_help("the longest answer, in tokens"))
    scale_rewards: bool = field(
        default=True,
        metadata=_help(
            "divide an advantage by the standard deviation of its prompt's rewards (GRPO); false: "
            "do not (Dr. GRPO)"
        ),
    )
    normalise: Literal["answer", "constant"] = field(
        default="answer",
        metadata=_help(
            "what an answer's summed loss is divided by: answer, its own tokens (GRPO); constant, "
            "max_new_tokens (Dr. GRPO: long answers do not weigh less per token)"
        ),
    )
    mask_truncated: bool = field(
        default=False,
        metadata=_help(
            "answers cut at max_new_tokens are not learned from; they count in their prompt's mean"
        ),
    )
    beta: float = field(
        default=0.0,
        metadata=_help(
            "weight of the distance (KL) from the model as the run begins; 0 leaves it out"
        ),
    )

    def __post_init__(self) -> None:
        require(self.num_samples >= 2, "grpo.num_samples", ">= 2", self.num_samples)
        require(self.temperature > 0, "grpo.temperature", "> 0", self.temperature)
        require(self.max_new_tokens >= 1, "grpo.max_new_tokens", ">= 1", self.max_new_tokens)
        require(self.beta >= 0, "grpo.beta", ">= 0", self.beta)
        if self.reward is not None and not self.weights:
            raise ConfigError(
                "no reward is named", where="grpo.reward", expected=", ".join(SINGLE_METRICS)
            )
        for name, weight in self.weights.items():
            require(weight != 0, f"grpo.reward.{name}", "a weight other than 0", weight)
            _require_reward(name)

    @property
    def weights(self) -> dict[str, float]:
        """Each reward with its weight."""
        if self.reward is None:
            return {}
        return {self.reward: 1.0} if isinstance(self.reward, str) else dict(self.reward)

    def check(self, task: str, method: str, data: SftOptions, *, smoothing: float) -> None:
        """Refuse what means nothing for this task, or does not combine with it.

        Args:
            task: of the config.
            method: of the config.
            data: the section data.
            smoothing: train.label_smoothing.

        Raises:
            ConfigError: with the key.
        """
        if task != GRPO:
            if self != GrpoSection():
                raise ConfigError(
                    f"the section 'grpo' is set, and the task is {task!r}",
                    where=GRPO,
                    expected="task: grpo",
                    remedy="set the task, or remove the section",
                )
            return
        if not self.weights:
            raise ConfigError(
                "task grpo needs to know what an answer earns",
                where="grpo.reward",
                expected=f"{', '.join(SINGLE_METRICS)}, or your own function: rewards.py:name",
            )
        if smoothing:
            raise ConfigError(
                "train.label_smoothing smooths targets over the vocabulary, and a sampled answer "
                "is no target",
                where="train.label_smoothing",
                expected="0",
                found=f"{smoothing:g}",
            )
        if method in _PREFIXES:
            raise ConfigError(
                "answers cannot be sampled beside the special tokens of a prefix in this version",
                where="method",
                expected="another method than prefix_embedding and prefix_layer",
                found=method,
            )
        if data.max_length is not None and data.on_too_long == "cut":
            raise ConfigError(
                "a prompt that is cut loses its question",
                where="data.on_too_long",
                expected="drop or error, where data.max_length is set",
                found="cut",
            )


def _require_reward(name: str) -> None:
    """Refuse a metric that does not score one written answer by itself."""
    if ":" in name or name in SINGLE_METRICS:
        return
    known = METRICS.get(name)
    if known is None:
        what = f"there is no reward {name!r}"
    elif known.needs == "answers":
        what = f"{name} is a score of all answers together, and a reward is one answer's"
    else:
        what = f"{name} does not score what a model writes"
    raise ConfigError(
        what,
        where="grpo.reward",
        expected=f"{', '.join(SINGLE_METRICS)}, or your own function: rewards.py:name",
        found=name,
    )
