"""Successive halving."""

from __future__ import annotations

import math

import pytest

from lorakit.sweep.config import Halving
from lorakit.sweep.rungs import num_kept, rungs, survivors
from lorakit.train.merit import Merit, merit


@pytest.mark.parametrize(
    ("num_arms", "max_steps", "expected"),
    [(8, 100, (10, 20, 30)), (8, 25, (10, 20)), (8, 10, ()), (1, 100, ()), (3, 100, (10, 20))],
)
def test_rungs_end_with_one_arm_or_before_the_last_step(num_arms, max_steps, expected) -> None:
    assert rungs(Halving(every=10), num_arms, max_steps) == expected


def test_without_every_there_are_none() -> None:
    assert rungs(Halving(), 8, 100) == ()


def test_a_share_near_one_still_drops_an_arm() -> None:
    assert [num_kept(Halving(every=1, keep=0.99), n) for n in (2, 3, 9)] == [1, 2, 8]
    assert [num_kept(Halving(every=1, keep=0.3), n) for n in (2, 5, 10)] == [1, 2, 3]


def by_loss(**losses: float | None) -> dict[str, Merit | None]:
    return {name: merit({"eval_loss": loss}, "loss") for name, loss in losses.items()}


def test_the_lowest_losses_go_on_in_their_old_order() -> None:
    merits = by_loss(a=3.0, b=1.0, c=2.0, d=4.0)
    assert survivors(list("abcd"), merits, Halving(every=1)) == ["b", "c"]


def test_a_metric_decides_before_the_loss() -> None:
    found = {"a": (0.7, 1.0), "b": (0.8, 3.0), "c": (0.8, 2.0), "d": (0.9, 4.0)}
    merits = {
        name: merit({"eval_accuracy": accuracy, "eval_loss": loss}, "accuracy")
        for name, (accuracy, loss) in found.items()
    }
    assert survivors(list("abcd"), merits, Halving(every=1)) == ["c", "d"]


def test_a_failed_arm_never_goes_on_and_makes_room() -> None:
    merits = by_loss(a=3.0, b=None, c=math.nan, d=4.0)
    assert survivors(list("abcd"), merits, Halving(every=1)) == ["a", "d"]
    assert survivors(["b", "d"], merits, Halving(every=1)) == ["d"]
    assert survivors(["b", "c"], merits, Halving(every=1)) == []
