"""Advantages against numbers worked out by hand; the divergence against its definition."""

from __future__ import annotations

import math

import pytest
import torch

from lorakit.math.policy import STD_EPS, group_advantages, k3_divergence


def test_advantages_by_hand() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [3.0, 1.0, 1.0, 3.0]])
    found = group_advantages(rewards, scale=True)
    # Means 0.25 and 2; squares sum to 0.75 and 4; standard deviations with n - 1 = 3.
    one, two = 0.5 + STD_EPS, math.sqrt(4 / 3) + STD_EPS
    expected = [[0.75 / one] + [-0.25 / one] * 3, [1 / two, -1 / two, -1 / two, 1 / two]]
    torch.testing.assert_close(found, torch.tensor(expected))
    plain = group_advantages(rewards, scale=False)
    assert plain.tolist() == [[0.75, -0.25, -0.25, -0.25], [1.0, -1.0, -1.0, 1.0]]


@pytest.mark.parametrize("scale", [True, False])
def test_equal_rewards_give_exactly_nothing(scale: bool) -> None:
    # 0.1 seven times has a mean that is not 0.1 in float32.
    rewards = torch.full((2, 7), 0.1)
    rewards[1, 0] = 0.2
    found = group_advantages(rewards, scale=scale)
    assert found[0].tolist() == [0.0] * 7
    assert found[1, 0] > 0 > found[1, 1]


def test_the_divergence_is_never_negative_and_its_mean_is_kl() -> None:
    generator = torch.Generator().manual_seed(0)
    policy = torch.randn(6, generator=generator).log_softmax(0)
    reference = torch.randn(6, generator=generator).log_softmax(0)
    each = k3_divergence(policy, reference)
    assert (each >= 0).all()
    exact = (policy.exp() * (policy - reference)).sum()
    torch.testing.assert_close((policy.exp() * each).sum(), exact)
    assert k3_divergence(policy, policy).tolist() == [0.0] * 6
