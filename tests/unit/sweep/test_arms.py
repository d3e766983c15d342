"""Which arms a sweep has."""

from __future__ import annotations

import math

import pytest

from lorakit.errors import ConfigError
from lorakit.sweep.arms import make_arms
from lorakit.sweep.config import SweepConfig


def config(**section) -> SweepConfig:
    return SweepConfig.from_dict(
        {
            "model": "m",
            "data": {"train": "rows.jsonl", "validation": "held.jsonl"},
            "train": {"max_steps": 40},
            "output": "out",
            "sweep": section,
        }
    )


def test_grid_draws_and_single_arms_multiply() -> None:
    arms = make_arms(
        config(
            grid={"r": [2, 4], "seed": [0, 1]},
            random={"n": 3, "ranges": {"lr": {"low": 1e-5, "high": 1e-2, "log": True}}},
            arms=[{"data.train": "a.jsonl"}, {"data.train": "b.jsonl", "train.epochs": 2}],
        )
    )
    assert len(arms) == 2 * 2 * 2 * 3
    assert len({arm.name for arm in arms}) == len(arms)
    assert {arm.config.lora.r for arm in arms} == {2, 4}
    assert {arm.config.data.train for arm in arms} == {"a.jsonl", "b.jsonl"}
    for arm in arms:
        assert arm.config.train.lr == arm.settings["train.lr"]
        assert arm.config.output == f"out/arms/{arm.name}"
        by_epochs = arm.config.data.train == "b.jsonl"
        assert (arm.config.train.epochs, arm.config.train.max_steps) == (
            (2.0, None) if by_epochs else (None, 40)
        )


def test_draws_lie_in_their_range_and_are_the_same_for_a_seed() -> None:
    ranges = {
        "lr": {"low": 1e-6, "high": 1.0, "log": True},
        "lora.r": {"low": 1, "high": 64},
        "train.schedule": ["cosine", "linear"],
    }
    one, again, other = (
        make_arms(config(random={"n": 60, "ranges": ranges, "seed": seed})) for seed in (3, 3, 4)
    )
    assert [arm.settings for arm in one] == [arm.settings for arm in again]
    assert [arm.settings for arm in one] != [arm.settings for arm in other]
    rates = [math.log10(arm.config.train.lr) for arm in one]
    assert -6 <= min(rates) < -4
    assert -2 < max(rates) <= 0
    # Even on the logarithmic scale: half of them below its middle.
    assert 15 < sum(rate < -3 for rate in rates) < 45
    assert {type(arm.settings["lora.r"]) for arm in one} == {int}
    assert {arm.config.train.schedule for arm in one} == {"cosine", "linear"}


def test_draws_that_meet_are_one_arm_and_names_stay_apart() -> None:
    arms = make_arms(config(random={"n": 30, "ranges": {"lora.r": [1, 2, 3]}}))
    assert sorted(arm.settings["lora.r"] for arm in arms) == [1, 2, 3]
    two = make_arms(config(grid={"data.train": ["x/rows.jsonl", "y/rows.jsonl"]}))
    assert [arm.name for arm in two] == ["train-rows", "train-rows-2"]


def test_halving_decides_where_an_arm_validates() -> None:
    (arm, _) = make_arms(config(grid={"lr": [1e-3, 1e-4]}, halving={"every": 8}))
    assert arm.config.train.eval_every == 8
    with pytest.raises(ConfigError, match="judged where it validates"):
        make_arms(config(grid={"train.eval_every": [3]}, halving={"every": 8}))


@pytest.mark.parametrize("key", ["task", "model", "output", "train.precision"])
def test_what_arms_share_cannot_differ(key: str) -> None:
    with pytest.raises(ConfigError, match="cannot differ between arms"):
        make_arms(config(grid={key: ["x"]}))


def test_two_arms_with_one_name_are_refused() -> None:
    arms = [{"name": "a", "lora.r": 2}, {"name": "a", "lora.r": 3}]
    with pytest.raises(ConfigError, match="two arms are named 'a'"):
        make_arms(config(arms=arms))
