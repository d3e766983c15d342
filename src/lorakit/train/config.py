"""TrainConfig: everything a training run is, in one frozen, checked value."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from lorakit.adapters.spec import LoraSpec
from lorakit.errors import ConfigError, LorakitWarning
from lorakit.methods.base import Method
from lorakit.methods.lora import LoraMethod
from lorakit.methods.registry import METHODS, build_method
from lorakit.train import schema
from lorakit.train.beginning import Beginnings, begin_lora, require_as_saved, set_keys
from lorakit.train.data_section import DataSection, require
from lorakit.train.grpo_section import GRPO, GrpoSection
from lorakit.train.method_sections import MethodSections, check_data_start
from lorakit.train.overrides import apply_overrides
from lorakit.train.preference_section import PREFERENCE_TASKS, PreferenceSection
from lorakit.train.train_section import TrainSection
from lorakit.train.yaml import dump, read_mapping

Task = Literal["sft", "classify", "dpo", "orpo", "kto", "grpo"]

# The keys of a file as it is written; the chosen method's section comes last.
_ORDER = ("model", "data", "task", "output", "train", "seed", "method")


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """The base model; a bare string stands for `ref`."""

    SHORTHAND: ClassVar[str] = "ref"

    ref: str = field(
        metadata=_help("hub id, directory, .gguf file, or a named model (smollm2-135m-instruct)")
    )
    dtype: Literal["float32", "bfloat16"] | None = field(
        default=None,
        metadata=_help(
            "dtype the frozen weights are kept in; null: float32 on a CPU, bfloat16 on a GPU that "
            "has it"
        ),
    )
    quantize: Literal["nf4"] | None = field(
        default=None,
        metadata=_help(
            "nf4: keep the frozen weights of linear layers in 4 bits (extra: quant); null: as they "
            "are stored"
        ),
    )
    attention: Literal["eager", "sdpa", "grouped", "flash_attention_2"] | None = field(
        default=None,
        metadata=_help(
            "attention kernel; null: transformers' choice; on a CPU, for architectures that are "
            "known to take it, grouped, under which batches are packed (docs/speed.md)"
        ),
    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(MethodSections):
    """What to train, on what, how, and where the result goes.

    Raises:
        ConfigError: a value out of range, or values that do not combine.
    """

    model: ModelSection = field(metadata=_help("the base model"))
    data: DataSection = field(metadata=_help("the rows"))
    output: str = field(metadata=_help("directory of the run; must not exist, or be empty"))
    task: Task = field(
        default="sft",
        metadata=_help(
            "what is learned: sft, to continue a prompt as the rows do; classify, a label of a "
            "sentence or a pair; dpo, orpo, kto, which of two answers is preferred; grpo, answers "
            "that earn a reward"
        ),
    )
    preference: PreferenceSection = field(
        default_factory=PreferenceSection, metadata=_help("tasks dpo, orpo and kto")
    )
    grpo: GrpoSection = field(default_factory=GrpoSection, metadata=_help("task grpo"))
    train: TrainSection = field(default_factory=TrainSection, metadata=_help("how to train"))
    seed: int = field(default=42, metadata=_help("of every random choice of the run"))

    def __post_init__(self) -> None:
        require(bool(self.output.strip()), "output", "a directory", self.output)
        require(0 <= self.seed < 2**32, "seed", "0 <= seed < 2**32", self.seed)
        super().__post_init__()
        self.data.check_task(self.task)
        self.preference.check_task(self.task, self.train.label_smoothing)
        self.grpo.check(self.task, self.method, self.data, smoothing=self.train.label_smoothing)
        if self.task == "kto":
            require(self.train.batch_size > 1, "train.batch_size", "> 1 for task kto", 1)
        self._check_lora_plus()
        check_data_start(self.task, self.lora)
        self.adalora.check(self.lora, ratio=self.train.lora_plus_ratio, time=self.train.max_minutes)
        self.beginnings.check(task=self.task, method=self.method, lora=self.lora)
        self._check_combinations()

    def _check_lora_plus(self) -> None:
        if self.train.lora_plus_ratio is not None and self.method != LoraMethod.name:
            raise ConfigError(
                f"LoRA+ gives lora_B a rate of its own, and {self.method} has no lora_B",
                where="train.lora_plus_ratio",
                expected="null",
                found=f"{self.train.lora_plus_ratio:g}",
                remedy="remove it, or take the method lora",
            )

    def _check_combinations(self) -> None:
        if not self.validates:
            for name, is_set in (
                ("early_stopping_patience", self.train.early_stopping_patience is not None),
                ("best_metric", self.train.best_metric is not None),
                ("eval_every", self.train.eval_every != "epoch"),
            ):
                if is_set:
                    raise ConfigError(
                        f"{name} needs validation rows",
                        where=f"train.{name}",
                        expected="data.validation or data.validation_share",
                        remedy=f"name validation rows, or remove {name}",
                    )
        if self.train.precision == "fp32" and self.model.dtype == "bfloat16":
            raise ConfigError(
                "float32 arithmetic on weights kept in bfloat16 is neither of the two",
                where="train.precision and model.dtype",
                expected="precision bf16 with dtype bfloat16, or fp32 with float32",
                remedy="change one of them",
            )

    def make_method(self, beside: tuple[str, ...] = (), *, name: str = "default") -> Method:
        """The chosen method, not attached yet.

        Args:
            beside: modules that are trained too, beyond those of `also_train`.
            name: of a LoRA adapter on the model.
        """
        options = self.options
        if beside:
            options["also_train"] = list(dict.fromkeys([*options["also_train"], *beside]))
        if self.method != LoraMethod.name:
            return build_method(self.method, options)
        spec, ratio = LoraSpec.from_dict(options), self.train.lora_plus_ratio
        begin, start = self.beginnings, self.adalora.start
        return begin_lora(begin, spec, name=name, lora_plus_ratio=ratio, moving_start=start)

    @property
    def beginnings(self) -> Beginnings:
        """The saved adapters that are named."""
        return Beginnings(
            continue_from=self.continue_from,
            on_top_of=self.on_top_of,
            reference=self.preference.reference,
        )

    @property
    def validates(self) -> bool:
        """Whether there are validation rows."""
        return self.data.validation is not None or self.data.validation_share is not None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Read plain values.

        Raises:
            ConfigError: an unknown or missing key, a wrong type or value.
            SpecError: a LoraSpec that cannot be.
            AdapterFileError: keys of lora stand beside `continue_from`, and it cannot be read.
        """
        config = schema.read(cls, values)
        given = values.get("lora")
        if config.continue_from is not None and isinstance(given, Mapping):
            require_as_saved(config.continue_from, given)  # also keys at their defaults
        return config

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
        """Read a YAML file, then the overrides ("train.lr=1e-4", or "lr=1e-4" where unambiguous).

        Paths in the file are relative to the current directory.

        The length of the run, in epochs or in steps, is one thing: an override of one replaces the
        other.

        Raises:
            ConfigError: the file or an override cannot be read, or a key or value is wrong.
            SpecError: a LoraSpec that cannot be.
        """
        in_file = read_mapping(path)
        return cls.from_dict(_one_length(in_file, apply_overrides(cls, in_file, overrides)))

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `from_dict` reads them back. Sections of other methods are left out."""
        values = schema.plain(self)
        order = _ORDER + (("preference",) if self.task in PREFERENCE_TASKS else ())
        order += ((GRPO,) if self.task == GRPO else ()) + self.set_beside
        if self.continue_from is not None:
            values["lora"] = schema.plain({"dropout": 0.0, **set_keys(self.lora)})
        return {name: values[name] for name in order} | {self.method: values[self.method]}

    def to_yaml(self) -> str:
        """YAML text that `from_yaml` reads back."""
        return dump(self.to_dict())

    @classmethod
    def fields(cls) -> list[schema.FieldHelp]:
        """Every key of the file with its type, default and meaning."""
        return [
            replace(leaf, type=", ".join(METHODS)) if leaf.name == "method" else leaf
            for leaf in schema.leaves(cls)
        ]


def _one_length(in_file: Mapping[str, Any], merged: dict[str, Any]) -> dict[str, Any]:
    """Drop the file's epochs where max_steps is overridden, and the other way round."""
    before, after = in_file.get("train"), merged.get("train")
    if not isinstance(before, Mapping) or not isinstance(after, Mapping):
        return merged
    for old, new in (("epochs", "max_steps"), ("max_steps", "epochs")):
        given_twice = after.get(old) is not None and after.get(new) is not None
        if given_twice and before.get(new) is None and before.get(old) == after[old]:
            warnings.warn(
                f"train.{new}={after[new]} replaces the file's train.{old}: {after[old]}",
                LorakitWarning,
                stacklevel=3,
            )
            return {**merged, "train": {**after, old: None}}
    return merged
