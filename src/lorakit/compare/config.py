"""CompareConfig: one task, several methods, one budget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lorakit.compare.arms import Arm, read_arms
from lorakit.errors import ConfigError, RequestError, unknown_name
from lorakit.evaluate.options import METRICS
from lorakit.math.task_metrics import TASK_METRICS
from lorakit.train import schema
from lorakit.train.config import TrainConfig
from lorakit.train.overrides import apply_overrides
from lorakit.train.yaml import dump, read_mapping

# The rate is searched on a third of the budget unless told: enough to tell rates apart.
DEFAULT_SHARE = 1 / 3
# The log of eval's perplexity: nats per learned token, as training reports it.
LOSS = "loss"
_BUDGETS = ("steps", "epochs", "seconds")
# Task -> the metrics of its final score.
_SCORED: Mapping[str, Iterable[str]] = {"sft": METRICS, "classify": TASK_METRICS}


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How long each method trains; exactly one of the three."""

    steps: int | None = field(default=None, metadata=_help("optimizer steps"))
    epochs: float | None = field(default=None, metadata=_help("passes over the training rows"))
    seconds: float | None = field(
        default=None,
        metadata=_help("training time; a short probe run turns it into steps for each method"),
    )
    probe_steps: int = field(default=20, metadata=_help("optimizer steps of the probe run"))

    def __post_init__(self) -> None:
        given = {name: value for name in _BUDGETS if (value := vars(self)[name]) is not None}
        if len(given) != 1:
            raise ConfigError(
                "the budget is not one number",
                where="budget",
                expected=f"one of {', '.join(_BUDGETS)}",
                found=", ".join(f"{name} {value:g}" for name, value in given.items()) or "none",
            )
        for name, value in {**given, "probe_steps": self.probe_steps}.items():
            _require(value > 0, f"budget.{name}", "> 0", value)


@dataclass(frozen=True, kw_only=True)
class LrSearch:
    """The rates each method may choose from, by validation; none: no search."""

    values: tuple[float, ...] = field(
        default=(), metadata=_help("learning rates for every method that does not list its own")
    )
    share: float | None = field(
        default=None,
        metadata=_help("length of a search run as a share of the budget, 0 to 1; null: a third"),
    )
    steps: int | None = field(
        default=None, metadata=_help("length of a search run in optimizer steps, in place of share")
    )
    seed: int = field(default=0, metadata=_help("of the search runs"))

    def __post_init__(self) -> None:
        require_rates(self.values, "lr_search.values")
        if self.share is not None and self.steps is not None:
            raise ConfigError(
                "the length of a search run is given twice",
                where="lr_search.share and lr_search.steps",
                expected="one of them",
                remedy="remove one of them",
            )
        share = self.share
        _require(share is None or 0 < share <= 1, "lr_search.share", "0 < share <= 1", share)
        _require(self.steps is None or self.steps > 0, "lr_search.steps", "> 0", self.steps)


@dataclass(frozen=True, kw_only=True)
class EvalSection:
    """The final score; without data it is the validation loss of the run."""

    data: str | None = field(
        default=None, metadata=_help("rows to score on; null: the validation loss of the run")
    )
    metrics: tuple[str, ...] = field(
        default=(),
        metadata=_help(
            f"what to measure, the score first. For sft: loss, {', '.join(METRICS)}; default loss. "
            f"For classify: loss, {', '.join(TASK_METRICS)}, as the labels allow; default "
            "accuracy, for numbers pearson"
        ),
    )
    limit: int | None = field(
        default=None, metadata=_help("only the first so many questions; null: all")
    )
    max_new_tokens: int = field(default=128, metadata=_help("the longest answer, in tokens"))
    batch_size: int = field(default=16, metadata=_help("rows per forward pass"))

    def __post_init__(self) -> None:
        if self.data is None and (self.metrics or self.limit is not None):
            raise ConfigError(
                "the final score has options but no rows",
                where="eval.data",
                expected="a data file",
                remedy="name one, or remove metrics and limit: the score is the validation loss",
            )
        for name in ("limit", "max_new_tokens", "batch_size"):
            value = vars(self)[name]
            _require(value is None or value > 0, f"eval.{name}", "> 0", value)


@dataclass(frozen=True, kw_only=True)
class LatencySection:
    """The added time of one forward pass, measured beside the base."""

    trials: int = field(
        default=20, metadata=_help("forward passes of each model, alternating; 0: not measured")
    )
    batch_size: int = field(default=1, metadata=_help("rows in the pass"))
    length: int = field(default=128, metadata=_help("tokens in each row"))

    def __post_init__(self) -> None:
        _require(self.trials >= 0, "latency.trials", ">= 0", self.trials)
        for name in ("batch_size", "length"):
            _require(vars(self)[name] > 0, f"latency.{name}", "> 0", vars(self)[name])


@dataclass(frozen=True, kw_only=True)
class RowLimits:
    """A slice of the rows, the same for every run; drawn at random."""

    train: int | None = field(default=None, metadata=_help("training rows; null: all"))
    validation: int | None = field(default=None, metadata=_help("validation rows; null: all"))
    seed: int = field(default=0, metadata=_help("of the draw"))

    def __post_init__(self) -> None:
        for name in ("train", "validation"):
            value = vars(self)[name]
            _require(value is None or value > 0, f"rows.{name}", "> 0 or null", value)


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Which methods to compare on what, how long, and how they are scored.

    Raises:
        ConfigError: a value out of range, a method that is not a training config.
        SpecError: options of a method that cannot be.
    """

    output: str = field(metadata=_help("directory of the comparison"))
    base: Mapping[str, Any] = field(
        metadata=_help("a training config without method, output, seed, lr and length")
    )
    methods: tuple[Mapping[str, Any], ...] = field(
        metadata=_help(
            "the methods: name, method, its section, lr (a rate or a list), and what else differs "
            "from base in model and train"
        )
    )
    budget: Budget = field(metadata=_help("how long each method trains"))
    title: str = field(default="", metadata=_help("for the table and the report"))
    data: str | None = field(
        default=None,
        metadata=_help("directory in which relative data files are looked up; null: the current"),
    )
    rows: RowLimits = field(default_factory=RowLimits, metadata=_help("a slice of the rows"))
    seeds: tuple[int, ...] = field(
        default=(0, 1, 2), metadata=_help("one run of each method for each")
    )
    lr_search: LrSearch = field(default_factory=LrSearch, metadata=_help("learning-rate search"))
    eval: EvalSection = field(default_factory=EvalSection, metadata=_help("the final score"))
    latency: LatencySection = field(
        default_factory=LatencySection, metadata=_help("time of a forward pass beside the base")
    )
    together: Literal["auto", "yes", "no"] = field(
        default="auto",
        metadata=_help(
            "train LoRA runs of one length in one batch, each equal to its run alone; auto: on a "
            "GPU; their memory and speed are then shared, and not measured"
        ),
    )
    keep_weights: bool = field(
        default=True,
        metadata=_help("keep what the final runs learned; search runs never keep theirs"),
    )

    def __post_init__(self) -> None:
        _require(bool(self.output.strip()), "output", "a directory", self.output)
        _require(bool(self.seeds), "seeds", "at least one", self.seeds)
        _require(len(set(self.seeds)) == len(self.seeds), "seeds", "each once", self.seeds)
        self._check_arms()

    def _check_arms(self) -> None:
        for arm in self.arms:
            trial = arm.train_config(lr=arm.rates[0], seed=self.seeds[0], length={"max_steps": 1})
            if trial.task not in _SCORED:
                raise ConfigError(
                    f"a comparison has no final score for task {trial.task}",
                    where="base.task",
                    expected=" or ".join(_SCORED),
                    found=trial.task,
                    remedy="train each method with lorakit train, and compare their validations",
                )
            self._check_metrics(_SCORED[trial.task])
            if len(arm.rates) > 1 and not trial.validates:
                raise ConfigError(
                    "a learning-rate search needs validation rows",
                    where=f"base.data; {arm.where}",
                    expected="base.data.validation or base.data.validation_share",
                    remedy="name validation rows, or give one lr",
                )
            if self.eval.data is None and not trial.validates:
                raise ConfigError(
                    "there is nothing to score on",
                    where="eval.data",
                    expected="eval.data, or validation rows in base.data",
                    remedy="name one of them",
                )

    def _check_metrics(self, of_task: Iterable[str]) -> None:
        known = (LOSS, *of_task)
        for metric in self.eval.metrics:
            if metric not in known:
                raise unknown_name(
                    ConfigError, f"unknown metric {metric!r}", metric, known, where="eval.metrics"
                )

    @property
    def arms(self) -> tuple[Arm, ...]:
        """The methods in the order of the file, checked."""
        return read_arms(
            self.base,
            self.methods,
            rates=self.lr_search.values,
            by_steps=self.budget.steps is not None,
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CompareConfig:
        """Read plain values.

        Raises:
            ConfigError: an unknown or missing key, a wrong type or value.
            SpecError: options of a method that cannot be.
        """
        return schema.read(cls, values)

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Sequence[str] = ()) -> CompareConfig:
        """Read a YAML file, then the overrides: keys of this config, or of `base`.

        Raises:
            ConfigError: the file or an override cannot be read, or a key or value is wrong.
            SpecError: options of a method that cannot be.
        """
        in_file = read_mapping(path)
        mine, of_base = _sorted(overrides)
        values = apply_overrides(cls, in_file, mine)
        if of_base:
            base = values.get("base")
            start = base if isinstance(base, Mapping) else {}
            values["base"] = apply_overrides(TrainConfig, start, of_base)
        return cls.from_dict(_one_budget(in_file, values))

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `from_dict` reads them back."""
        return schema.plain(self)

    def to_yaml(self) -> str:
        """YAML text that `from_yaml` reads back."""
        return dump(self.to_dict())


def require_rates(rates: Sequence[float], where: str) -> None:
    """Refuse rates that are not positive, or given twice."""
    _require(all(rate > 0 for rate in rates), where, "every lr > 0", list(rates))
    _require(len(set(rates)) == len(rates), where, "each lr once", list(rates))


def _sorted(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """The overrides of the comparison, and those of its base without their "base."."""
    mine: list[str] = []
    of_base: list[str] = []
    for override in overrides:
        if override.startswith("base."):
            of_base.append(override.removeprefix("base."))
            continue
        try:
            apply_overrides(CompareConfig, {}, [override])
        except RequestError:
            # Not ours: if the base does not know it either, its error lists its own keys.
            of_base.append(override)
        else:
            mine.append(override)
    return mine, of_base


def _one_budget(in_file: Mapping[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Where another unit of the budget is given on the command line, the file's is dropped."""
    before, after = in_file.get("budget"), values.get("budget")
    if not isinstance(before, Mapping) or not isinstance(after, Mapping):
        return values
    new = [name for name in _BUDGETS if after.get(name) is not None and before.get(name) is None]
    if not new:
        return values
    kept = {key: value for key, value in after.items() if key in new or key not in _BUDGETS}
    return {**values, "budget": kept}


def _require(fits: bool, where: str, expected: str, found: object) -> None:
    if not fits:
        raise ConfigError(
            f"{where} is out of range", where=where, expected=expected, found=repr(found)
        )
