"""The arms of a sweep: which settings each has, and the training config that is equal to it."""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from lorakit.adapters.spec import DATA_INITS
from lorakit.errors import ConfigError, RequestError
from lorakit.methods.lora import LoraMethod
from lorakit.sweep.config import Range, SweepConfig
from lorakit.train.config import TrainConfig
from lorakit.train.overrides import full_name, put_values

# What all arms have in common, because they share the base and its forward passes.
_SHARED = {
    "model": "all arms run on one base",
    "task": "all arms share the loss of one task",
    "preference": "all arms share the loss of one task",
    "method": "rows of one batch can each run their own LoRA or DoRA adapter, no other method",
    "output": "every arm has its own directory below output",
    "train.precision": "all arms share the forward pass",
    "train.gradient_checkpointing": "all arms share the forward pass",
    "train.tensorboard": "the curves are in report.html",
}
_LONGEST_NAME = 80
Settings = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One run of a sweep.

    Attributes:
        name: of its directory, and in the table.
        settings: what it sets, by the full names of the keys.
        config: the training config whose run alone it is equal to.
    """

    name: str
    settings: Mapping[str, Any]
    config: TrainConfig


def make_arms(config: SweepConfig) -> list[Arm]:
    """Every combination of single arms, grid and draws, checked; pure.

    Raises:
        ConfigError: a setting that arms cannot have of their own, two arms with one name, or a
            config whose run beside others would not be its run alone.
        SpecError: a LoraSpec that cannot be.
    """
    taken: dict[str, Settings] = {}
    for given, settings in _all_settings(config):
        if settings in taken.values():
            # Draws may meet.
            continue
        name = given or _name(settings)
        if given and given in taken:
            raise ConfigError(
                f"two arms are named {given!r}",
                where="sweep.arms",
                expected="names that differ",
                remedy="leave the names out where a grid or draws multiply the arms",
            )
        number = 2
        while name in taken:
            name, number = f"{given or _name(settings)}-{number}", number + 1
        taken[name] = settings
    return [_arm(config, name, settings) for name, settings in taken.items()]


def _all_settings(config: SweepConfig) -> Iterator[tuple[str | None, Settings]]:
    sweep = config.sweep
    draws = _draws(config)
    names = [_full(config, key, "sweep.grid") for key in sweep.grid]
    for number, single in enumerate(sweep.arms or ({},)):
        where = f"sweep.arms[{number}]"
        own = {_full(config, key, where): v for key, v in single.items() if key != "name"}
        given = single.get("name")
        if given is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._=-]*", str(given)):
            raise ConfigError(
                "this cannot be the name of a directory",
                where=f"{where}.name",
                expected="letters, digits, '.', '_', '-' and '='",
                found=repr(given),
            )
        for values in product(*sweep.grid.values()):
            for drawn in draws:
                settings = {**own, **dict(zip(names, values, strict=True)), **drawn}
                yield None if given is None else str(given), settings


def _draws(config: SweepConfig) -> list[Settings]:
    search = config.sweep.random
    if not search.n:
        return [{}]
    rng = random.Random(search.seed)
    ranges = {
        _full(config, key, "sweep.random.ranges"): search.range_of(key)
        for key in sorted(search.ranges)
    }
    return [{key: _draw(rng, r) for key, r in ranges.items()} for _ in range(search.n)]


def _draw(rng: random.Random, choices: Range | tuple[Any, ...]) -> Any:
    if not isinstance(choices, Range):
        return rng.choice(choices)
    low, high = choices.low, choices.high
    if choices.log:
        value = math.exp(rng.uniform(math.log(low), math.log(high)))
    else:
        value = rng.uniform(low, high)
    # Three digits are what a search can tell apart, and what a reader can compare.
    whole = low.is_integer() and high.is_integer()
    return round(value) if whole else float(f"{min(max(value, low), high):.3g}")


def _full(config: SweepConfig, key: str, where: str) -> str:
    name = full_name(TrainConfig, config.base, key)
    for shared, why in _SHARED.items():
        if name == shared or name.startswith(f"{shared}."):
            raise ConfigError(
                f"{name} cannot differ between arms: {why}",
                where=f"{where}: {key}",
                remedy="set it once for the whole sweep, outside the section sweep",
            )
    return name


def _name(settings: Settings) -> str:
    parts = [f"{key.rpartition('.')[2]}-{_word(value)}" for key, value in settings.items()]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", "_".join(parts)).strip("-.") or "base"
    if len(name) <= _LONGEST_NAME:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{name[: _LONGEST_NAME - 9]}-{digest}"


def _word(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str):
        return Path(value).stem
    if isinstance(value, list | tuple):
        return "-".join(map(_word, value))
    return str(value)


def _arm(config: SweepConfig, name: str, settings: Settings) -> Arm:
    values = put_values(TrainConfig, config.base, settings.items())
    values = _one_length(values, settings)
    values["output"] = str(config.output / "arms" / name)
    every = config.sweep.halving.every
    train = values.get("train") or {}
    if every is not None and isinstance(train, Mapping):
        values["train"] = {"eval_every": every, **train}
    try:
        made = TrainConfig.from_dict(values)
        _check(made, every)
    except RequestError as error:
        raise type(error)(
            error.what,
            where=f"arm {name}: {error.where}" if error.where else f"arm {name}",
            expected=error.expected,
            found=error.found,
            remedy=error.remedy,
        ) from error
    return Arm(name=name, settings=settings, config=made)


def _one_length(values: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """An arm's epochs take the place of the config's max_steps, and the other way round."""
    for new, old in (("epochs", "max_steps"), ("max_steps", "epochs")):
        if f"train.{new}" in settings and f"train.{old}" not in settings:
            values["train"] = {**values["train"], old: None}
    return values


def require_beside(config: TrainConfig) -> None:
    """Refuse a run that would not be its run alone beside others.

    Raises:
        ConfigError: with the reason.
    """
    for refused, where, what, found, remedy in _refusals(config):
        if refused:
            raise ConfigError(what, where=where, found=found, remedy=remedy)


def _check(config: TrainConfig, every: int | None) -> None:
    require_beside(config)
    own = config.train.eval_every
    if every is not None and (own == "epoch" or every % own):
        raise ConfigError(
            "an arm is judged where it validates",
            where="train.eval_every and sweep.halving.every",
            expected=f"a divisor of {every}",
            found=str(own),
            remedy="leave train.eval_every out: it is then sweep.halving.every",
        )


def _refusals(config: TrainConfig) -> tuple[tuple[bool, str, str, str, str], ...]:
    """Whether it is refused, the key, the reason, what was found, the remedy."""
    lora = config.lora
    return (
        (
            config.method != LoraMethod.name,
            "method",
            "rows of one batch can each run their own LoRA or DoRA adapter, no other method",
            config.method,
            "set method: lora, or compare methods with lorakit compare",
        ),
        (
            config.task not in ("sft", "classify"),
            "task",
            "a preference, or a reward, is a loss over several rows; it cannot share its batch",
            config.task,
            "train these runs one at a time with lorakit train",
        ),
        (
            lora.dropout > 0,
            "lora.dropout",
            "dropout draws from one generator for the whole batch: no arm would be its run alone",
            f"{lora.dropout:g}",
            "set lora.dropout: 0",
        ),
        (
            lora.init in DATA_INITS or lora.ranks != "uniform",
            "lora.init and lora.ranks",
            "ranks and starts taken from data are not in a sweep",
            f"init {lora.init}, ranks {lora.ranks}",
            "use another init and ranks: uniform, or train these runs with lorakit train",
        ),
        (
            config.continue_from is not None or config.on_top_of is not None,
            "continue_from and on_top_of",
            "arms that begin with a saved adapter are not in a sweep",
            str(config.continue_from or config.on_top_of),
            "train these runs one at a time with lorakit train",
        ),
        (
            config.train.tensorboard,
            "train.tensorboard",
            "a sweep writes no TensorBoard events",
            "true",
            "set it to false; the curves are in report.html",
        ),
    )
