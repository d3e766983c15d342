"""Successive halving."""

from __future__ import annotations

import pytest

from lorakit.sweep.config import Halving
from lorakit.sweep.rungs import num_kept, rungs, survivors


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


def test_the_lowest_losses_go_on_in_their_old_order() -> None:
    losses = {"a": 3.0, "b": 1.0, "c": 2.0, "d": 4.0}
    assert survivors(list("abcd"), losses, Halving(every=1)) == ["b", "c"]


def test_a_failed_arm_never_goes_on_and_makes_room() -> None:
    losses = {"a": 3.0, "b": None, "c": None, "d": 4.0}
    assert survivors(list("abcd"), losses, Halving(every=1)) == ["a", "d"]
    assert survivors(["b", "d"], losses, Halving(every=1)) == ["d"]
    assert survivors(["b", "c"], losses, Halving(every=1)) == []
