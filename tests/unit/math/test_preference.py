"""Losses of preference tuning against their papers' formulas, written out."""

from __future__ import annotations

import math

import pytest
import torch

from lorakit.math.preference import dpo_losses, ipo_losses, kto_losses, orpo_penalties, token_kl

CHOSEN = torch.tensor([0.7, -2.0, 0.0], dtype=torch.float64)
REJECTED = torch.tensor([-0.4, 1.5, 0.0], dtype=torch.float64)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo_is_the_flipped_mixture_of_two_sigmoid_losses(smoothing: float) -> None:
    found = dpo_losses(CHOSEN, REJECTED, beta=0.3, label_smoothing=smoothing)
    for loss, c, r in zip(found.tolist(), CHOSEN.tolist(), REJECTED.tolist(), strict=True):
        x = 0.3 * (c - r)
        wanted = -(1 - smoothing) * math.log(sigmoid(x)) - smoothing * math.log(sigmoid(-x))
        assert loss == pytest.approx(wanted, abs=1e-12)
    assert found[2] == pytest.approx(math.log(2))


def test_ipo_wants_a_margin_of_half_of_one_over_beta() -> None:
    found = ipo_losses(CHOSEN, REJECTED, beta=0.4)
    torch.testing.assert_close(found, (CHOSEN - REJECTED - 1.25) ** 2)
    assert ipo_losses(torch.tensor([1.25]), torch.tensor([0.0]), beta=0.4).item() == 0.0


def test_orpo_compares_odds_and_stays_finite_near_certainty() -> None:
    chosen, rejected = torch.log(torch.tensor([0.8, 0.1])), torch.log(torch.tensor([0.3, 0.6]))
    odds = [(0.8 / 0.2) / (0.3 / 0.7), (0.1 / 0.9) / (0.6 / 0.4)]
    wanted = [math.log(1 + 1 / ratio) for ratio in odds]
    assert orpo_penalties(chosen, rejected).tolist() == pytest.approx(wanted, rel=1e-5)
    certain = torch.zeros(1, requires_grad=True)
    loss = orpo_penalties(certain, torch.tensor([-3.0]))
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert certain.grad is not None
    assert torch.isfinite(certain.grad).all()


def test_kto_pulls_the_desirable_up_and_the_others_down() -> None:
    ratio = torch.tensor([0.5, 0.5], requires_grad=True)
    good, kl = torch.tensor([True, False]), torch.tensor(0.2)
    found = kto_losses(ratio, good, kl, beta=0.7)
    wanted = [1 - sigmoid(0.7 * 0.3), 1 - sigmoid(-0.7 * 0.3)]
    assert found.tolist() == pytest.approx(wanted, rel=1e-6)
    found.sum().backward()
    assert ratio.grad is not None
    assert ratio.grad[0] < 0 < ratio.grad[1]


def test_kl_is_that_of_the_whole_distributions() -> None:
    generator = torch.Generator().manual_seed(2)
    one, two = (3 * torch.randn(150, 11, generator=generator) for _ in range(2))
    p, q = one.double().softmax(-1), two.double().softmax(-1)
    wanted = (p * (p.log() - q.log())).sum(-1)
    torch.testing.assert_close(token_kl(one, two).double(), wanted, rtol=1e-4, atol=1e-5)
    assert token_kl(one, one).abs().max() < 1e-6
    assert token_kl(one[:0], two[:0]).shape == (0,)
