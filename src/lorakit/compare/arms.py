"""One method of a comparison: what it changes in the base, and the rates it may choose from."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorakit.errors import ConfigError, RequestError
from lorakit.train.config import TrainConfig

# What every run gets from the comparison, and why a method or the base may not set it.
_SET_BY_US = {
    "output": "each run has its own directory below output",
    "seed": "it comes from seeds",
    "train.lr": "it comes from lr_search.values, or from the method's lr",
    "train.epochs": "it comes from budget",
    "train.max_steps": "it comes from budget",
    "train.max_minutes": "methods are compared under budget",
}
# What must be the same for all methods, or the comparison says nothing.
_SAME_FOR_ALL = ("data", "task", "model.ref")
# Stands where a run's directory comes later.
_NO_OUTPUT = "cells"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One method with its options.

    Attributes:
        name: as the table shows it.
        slug: its directory.
        where: its place in the config, for messages.
        values: plain values of a training config, without output, seed, rate and length.
        rates: the learning rates to choose from, ascending; one: no search.
    """

    name: str
    slug: str
    where: str
    values: Mapping[str, Any]
    rates: tuple[float, ...]

    @property
    def method(self) -> str:
        """The method's name in the registry."""
        return str(self.values.get("method", "lora"))

    def train_config(
        self,
        *,
        lr: float,
        seed: int,
        length: Mapping[str, Any],
        data: Mapping[str, Any] | None = None,
        output: str = _NO_OUTPUT,
    ) -> TrainConfig:
        """The training config of one run.

        Args:
            lr: the learning rate.
            seed: of every random choice.
            length: {"max_steps": 100} or {"epochs": 1.5}.
            data: what differs in the data section (the files as they were found).
            output: directory of the run.

        Raises:
            RequestError: the values are not a training config; says which method's.
        """
        values = merged(
            self.values,
            {
                "output": output,
                "seed": seed,
                "train": {"lr": lr, **length},
                **({} if data is None else {"data": dict(data)}),
            },
        )
        try:
            return TrainConfig.from_dict(values)
        except RequestError as error:
            raise _within(error, self.where) from error


def read_arms(
    base: Mapping[str, Any],
    methods: Sequence[Mapping[str, Any]],
    *,
    rates: Sequence[float],
    by_steps: bool,
) -> tuple[Arm, ...]:
    """The methods, each laid over the base.

    Args:
        base: plain values of a training config.
        methods: what the file lists.
        rates: for the methods that name none; empty: the default of the training config.
        by_steps: the budget counts steps, so every method must see the same rows per step.

    Raises:
        ConfigError: no method, a name that is missing or given twice, a key that is not the
            method's to set.
    """
    if not methods:
        raise ConfigError("there is no method to compare", where="methods", expected="at least one")
    _refuse_keys(base, "base", {**_SET_BY_US, "method": "the methods are listed below methods"})
    arms: list[Arm] = []
    for index, given in enumerate(methods):
        arm = _read(base, given, f"methods[{index}]", rates)
        for other in arms:
            if arm.slug == other.slug:
                raise ConfigError(
                    "two methods have the same name",
                    where=f"{other.where} and {arm.where}",
                    expected="names that differ in letters, digits, dots or signs",
                    found=f"{other.name!r} and {arm.name!r}",
                )
        if by_steps and _rows_per_step(arm.values) != _rows_per_step(base):
            raise ConfigError(
                "a budget in steps gives this method another number of rows",
                where=f"{arm.where}, train.batch_size and train.gradient_accumulation",
                expected=f"{_rows_per_step(base)} rows per step, as in base",
                found=f"{_rows_per_step(arm.values)}",
                remedy="keep their product, or give the budget in epochs or seconds",
            )
        arms.append(arm)
    return tuple(arms)


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values of `base` with those of `over` laid over them, mapping by mapping."""
    result = dict(base)
    for key, value in over.items():
        before = result.get(key)
        if key == "model" and isinstance(before, str) and isinstance(value, Mapping):
            before = {"ref": before}
        if isinstance(before, Mapping) and isinstance(value, Mapping):
            result[key] = merged(before, value)
        else:
            result[key] = value
    return result


def slug_of(name: str) -> str:
    """A directory's name made of the letters, digits, dots and signs of a name."""
    return re.sub(r"[^a-z0-9.+=]+", "-", name.lower()).strip("-.")


def _read(
    base: Mapping[str, Any], given: Mapping[str, Any], where: str, rates: Sequence[float]
) -> Arm:
    values = dict(given)
    name = values.pop("name", None)
    if not isinstance(name, str) or not slug_of(name):
        raise ConfigError(
            "a method has no name",
            where=f"{where}.name",
            expected="text with a letter or digit, as the table is to show it",
            found=repr(name),
        )
    where = f"{where} ({name})"
    own = values.pop("lr", None)
    if "method" not in values:
        raise ConfigError("the key 'method' is missing", where=where, expected="a method's name")
    same = dict.fromkeys(_SAME_FOR_ALL, "it must be the same for all methods: set it in base")
    _refuse_keys(values, where, {**_SET_BY_US, **same})
    if isinstance(values.get("model"), str):
        raise ConfigError("a method names its own model", where=where, remedy="set it in base")
    return Arm(
        name=name,
        slug=slug_of(name),
        where=where,
        values=merged(base, values),
        rates=_rates(own, rates, f"{where}, lr"),
    )


def _rates(own: Any, default: Sequence[float], where: str) -> tuple[float, ...]:
    given = own if own is not None else (list(default) or 2e-4)
    listed = given if isinstance(given, list | tuple) else [given]
    for rate in listed:
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not rate > 0:
            raise ConfigError(
                "this is not a learning rate",
                where=where,
                expected="a number > 0, or a list of them",
                found=repr(rate),
            )
    if not listed or len(set(listed)) != len(listed):
        raise ConfigError(
            "the learning rates cannot be searched",
            where=where,
            expected="at least one, each once",
            found=repr(given),
        )
    return tuple(sorted(float(rate) for rate in listed))


def _refuse_keys(values: Mapping[str, Any], where: str, refused: Mapping[str, str]) -> None:
    for key, why in refused.items():
        section, _, leaf = key.partition(".")
        found = values.get(section)
        present = (leaf in found if isinstance(found, Mapping) else False) if leaf else found
        if present:
            raise ConfigError(
                f"{key} cannot be set here",
                where=f"{where}, {key}",
                expected=why,
                remedy="remove it",
            )


def _rows_per_step(values: Mapping[str, Any]) -> int:
    train = values.get("train")
    section = train if isinstance(train, Mapping) else {}
    return int(section.get("batch_size", 8)) * int(section.get("gradient_accumulation", 1))


def _within(error: RequestError, where: str) -> RequestError:
    inner = f"{where}, {error.where}" if error.where else where
    return type(error)(
        error.what, where=inner, expected=error.expected, found=error.found, remedy=error.remedy
    )
