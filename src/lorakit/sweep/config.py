"""SweepConfig: a training config, and what differs between the arms of a sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorakit.errors import ConfigError
from lorakit.train import schema
from lorakit.train.config import TrainConfig
from lorakit.train.overrides import apply_overrides
from lorakit.train.yaml import dump, read_mapping

SECTION = "sweep"


def _help(text: str) -> dict[str, str]:
    return {"help": text}


def _require(fits: bool, where: str, expected: str, found: object) -> None:
    if not fits:
        raise ConfigError(
            f"{where} is out of range", where=where, expected=expected, found=repr(found)
        )


@dataclass(frozen=True, kw_only=True)
class Range:
    """Values between two numbers; whole ones where both are whole."""

    low: float = field(metadata=_help("the least"))
    high: float = field(metadata=_help("the most"))
    log: bool = field(default=False, metadata=_help("even on a logarithmic scale"))

    def __post_init__(self) -> None:
        _require(self.low < self.high, "low", "low < high", [self.low, self.high])
        _require(not self.log or self.low > 0, "low", "> 0 with log: true", self.low)


@dataclass(frozen=True, kw_only=True)
class RandomSearch:
    """Arms whose settings are drawn."""

    n: int = field(default=0, metadata=_help("how many are drawn; 0: none"))
    ranges: Mapping[str, Any] = field(
        default_factory=dict[str, Any],
        metadata=_help("key: a list to choose from, or {low: 1e-5, high: 1e-3, log: true}"),
    )
    seed: int = field(default=0, metadata=_help("of the draw"))

    def __post_init__(self) -> None:
        _require(self.n >= 0, "n", ">= 0", self.n)
        if bool(self.n) != bool(self.ranges):
            raise ConfigError(
                "a random search needs how many to draw, and of what",
                where="n and ranges",
                expected="both, or neither",
            )
        for key in self.ranges:
            self.range_of(key)

    def range_of(self, key: str) -> Range | tuple[Any, ...]:
        """What values of a key are drawn from.

        Raises:
            ConfigError: neither a list nor a range.
        """
        found = self.ranges[key]
        if isinstance(found, list | tuple):
            _require(len(found) > 0, f"ranges.{key}", "at least one value", [])
            return tuple(found)
        return schema.read(Range, found, where=f"ranges.{key}")


@dataclass(frozen=True, kw_only=True)
class Halving:
    """Successive halving: after every so many steps only the better arms go on."""

    every: int | None = field(
        default=None, metadata=_help("optimizer steps between two decisions; null: no halving")
    )
    keep: float = field(default=0.5, metadata=_help("share of the arms that go on, 0 to 1"))

    def __post_init__(self) -> None:
        _require(self.every is None or self.every > 0, "every", "> 0 or null", self.every)
        _require(0 < self.keep < 1, "keep", "0 < keep < 1", self.keep)


@dataclass(frozen=True, kw_only=True)
class SweepSection:
    """What differs between the arms, and how they are trained."""

    grid: Mapping[str, tuple[Any, ...]] = field(
        default_factory=dict[str, tuple[Any, ...]],
        metadata=_help("key of the training config: its values; every combination is an arm"),
    )
    random: RandomSearch = field(
        default_factory=RandomSearch, metadata=_help("settings that are drawn")
    )
    arms: tuple[Mapping[str, Any], ...] = field(
        default=(), metadata=_help("settings of single arms, each with keys and perhaps a name")
    )
    halving: Halving = field(default_factory=Halving, metadata=_help("stop bad arms early"))
    together: int | None = field(
        default=None,
        metadata=_help("how many arms share a batch; null: as many as fit, 8 at most"),
    )

    def __post_init__(self) -> None:
        _require(self.together is None or self.together > 0, "together", "> 0", self.together)
        for key, values in self.grid.items():
            _require(len(values) > 0, f"grid.{key}", "at least one value", [])
        if not (self.grid or self.random.n or self.arms):
            raise ConfigError(
                "the sweep has no arms",
                where="grid, random and arms",
                expected="at least one of them",
                remedy="for example sweep: {grid: {train.lr: [1e-4, 1e-3]}}",
            )


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """A training config that all arms share, and the section `sweep`.

    Raises:
        ConfigError: a value out of range, or a training config that cannot be.
        SpecError: a LoraSpec that cannot be.
    """

    base: Mapping[str, Any] = field(metadata=_help("the training config"))
    sweep: SweepSection = field(metadata=_help("what differs"))

    def __post_init__(self) -> None:
        config = self.train_config
        if not config.validates:
            raise ConfigError(
                "a sweep compares its arms on validation rows, and there are none",
                where="data.validation",
                expected="data.validation or data.validation_share",
                remedy="name validation rows",
            )

    @property
    def train_config(self) -> TrainConfig:
        """What the arms have in common, as a training config."""
        return TrainConfig.from_dict(self.base)

    @property
    def output(self) -> Path:
        """The directory of the sweep."""
        return Path(str(self.base["output"]))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SweepConfig:
        """Read plain values: those of a training config, and the section `sweep`.

        Raises:
            ConfigError: an unknown or missing key, a wrong type or value.
            SpecError: a LoraSpec that cannot be.
        """
        base = {key: value for key, value in values.items() if key != SECTION}
        if SECTION not in values:
            raise ConfigError(
                "this config has no section `sweep`",
                where="the config",
                expected="a training config and a section sweep",
                remedy="for example sweep: {grid: {train.lr: [1e-4, 1e-3]}}; one run is started "
                "with lorakit train",
            )
        section = schema.read(SweepSection, values[SECTION], where=SECTION)
        return cls(base=base, sweep=section)

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Sequence[str] = ()) -> SweepConfig:
        """Read a YAML file, then the overrides: keys of the training config, or `sweep.KEY`.

        Raises:
            ConfigError: the file or an override cannot be read, or a key or value is wrong.
            SpecError: a LoraSpec that cannot be.
        """
        in_file = read_mapping(path)
        prefix = f"{SECTION}."
        of_sweep = [o.removeprefix(prefix) for o in overrides if o.startswith(prefix)]
        of_base = [o for o in overrides if not o.startswith(prefix)]
        section = in_file.pop(SECTION, None)
        values = apply_overrides(TrainConfig, in_file, of_base)
        if isinstance(section, Mapping) or (section is None and of_sweep):
            section = apply_overrides(SweepSection, section or {}, of_sweep)
        return cls.from_dict(values if section is None else {**values, SECTION: section})

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `from_dict` reads them back."""
        return {**schema.plain(self.base), SECTION: schema.plain(self.sweep)}

    def to_yaml(self) -> str:
        """YAML text that `from_yaml` reads back."""
        return dump(self.to_dict())

    @classmethod
    def fields(cls) -> list[schema.FieldHelp]:
        """Every key of the section `sweep`, then those of a training config."""
        return [*schema.leaves(SweepSection, SECTION), *TrainConfig.fields()]
