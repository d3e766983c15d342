"""AdaLoRA's arithmetic against hand computations and PEFT's."""

from __future__ import annotations

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from torch import nn

from lorakit.math.sensitivity import (
    Smoothed,
    budget_at,
    far_from_orthonormal,
    keep_directions,
    triplet_scores,
)


def test_the_sensitivity_of_one_number_by_hand():
    smoothed = Smoothed(torch.zeros(1))
    smoothed.see(torch.tensor([2.0]), torch.tensor([-3.0]), (0.5, 0.75))
    # I = 6; I~ = 3; U~ = 0.25 |6 - 3|
    assert float(smoothed.scores()) == pytest.approx(3.0 * 0.75)
    smoothed.see(torch.tensor([1.0]), torch.tensor([1.0]), (0.5, 0.75))
    # I = 1; I~ = 2; U~ = 0.75 * 0.75 + 0.25 |1 - 2|
    assert float(smoothed.scores()) == pytest.approx(2.0 * (0.75 * 0.75 + 0.25))


def test_scores_and_schedule_are_those_of_peft():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(6, 9)
            self.second = nn.Linear(9, 6)

        def forward(self, x):
            return self.second(self.first(x).tanh())

    torch.manual_seed(3)
    config = AdaLoraConfig(
        target_modules=["first", "second"],
        init_r=4,
        target_r=2,
        tinit=2,
        tfinal=4,
        deltaT=1,
        total_step=12,
        lora_alpha=6,
    )
    theirs = get_peft_model(Two(), config)
    layers = [
        module for name, module in theirs.named_modules() if name.endswith(("first", "second"))
    ]
    tensors = {}
    for layer in layers:
        layer.lora_E["default"].data.normal_()
        tensors[layer] = [table["default"] for table in (layer.lora_B, layer.lora_E, layer.lora_A)]
    smoothed = {layer: [Smoothed(tensor) for tensor in own] for layer, own in tensors.items()}
    allocator = theirs.base_model.rankallocator
    for step in range(3):
        theirs.zero_grad()
        torch.manual_seed(step)
        theirs.base_model.model(torch.randn(5, 6)).square().sum().backward()
        allocator.update_ipt(theirs.base_model.model)
        for layer, own in tensors.items():
            for tensor, seen in zip(own, smoothed[layer], strict=True):
                seen.see(tensor, tensor.grad, (config.beta1, config.beta2))
    scores = {}
    for place, layer in enumerate(layers):
        left, values, right = (seen.scores() for seen in smoothed[layer])
        scores[str(place)] = triplet_scores(left, values[:, 0], right)
    # Their budget counts directions.
    kept = keep_directions(scores, dict.fromkeys(scores, 1), 5)
    pattern = allocator.mask_to_budget(theirs.base_model.model, 5)
    assert sum(map(sum, pattern.values())) == 5
    assert all(any(own) for own in pattern.values()), "the comparison needs one kept everywhere"
    assert [own.tolist() for own in kept.values()] == list(pattern.values())
    for step in range(1, 13):
        ours = budget_at(step, first=8, last=4, warmup=2, settled=8)
        assert ours == allocator.budget_schedule(step)[0]


def test_the_budget_counts_what_directions_cost_and_leaves_every_site_one():
    scores = {
        "a": torch.tensor([0.1, 5.0, 4.0]),
        "b": torch.tensor([0.3, 0.2]),
        "c": torch.zeros(2),
    }
    costs = {"a": 10, "b": 3, "c": 1}
    kept = keep_directions(scores, costs, 28)
    # 14 for one each, 10 for a's second; of the 4 left a's third is too dear, b's and c's are not.
    assert {name: own.tolist() for name, own in kept.items()} == {
        "a": [False, True, True],
        "b": [True, True],
        "c": [True, True],
    }
    least = keep_directions(scores, costs, 0)
    assert {name: int(own.sum()) for name, own in least.items()} == {"a": 1, "b": 1, "c": 1}


def test_the_penalty_is_zero_for_orthonormal_factors_only():
    left = torch.linalg.qr(torch.randn(7, 3))[0]
    right = torch.linalg.qr(torch.randn(5, 3))[0].T
    assert float(far_from_orthonormal(left, right)) == pytest.approx(0.0, abs=1e-10)
    # One column twice as long: its square is 4 in place of 1.
    wider = left * torch.tensor([2.0, 1.0, 1.0])
    assert float(far_from_orthonormal(wider, right)) == pytest.approx(9.0, rel=1e-5)
