"""The piece of a batch on which two ways to the logits are compared."""

from __future__ import annotations

import pytest
import torch

from lorakit.models import logits_agree
from lorakit.models.logits_agree import agree, excerpt


def a_batch(rows: int, columns: int, *, asked_from: int) -> tuple[dict, torch.Tensor]:
    ids = torch.arange(rows * columns).view(rows, columns)
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    mask[:, asked_from:] = True
    return {"input_ids": ids, "weights": torch.arange(rows), "scale": torch.tensor(2.0)}, mask


def test_long_rows_are_cut_around_the_first_label(monkeypatch):
    monkeypatch.setattr(logits_agree, "_NUM_COMPARED", 2 * 20 * 1000)
    batch, mask = a_batch(5, 400, asked_from=300)
    part, asked = excerpt(batch, mask, rows=torch.tensor([1, 3]), vocabulary=1000, whole_rows=False)
    assert part["input_ids"].tolist() == [
        list(range(400 * row + 290, 400 * row + 310)) for row in (1, 3)
    ]
    assert part["weights"].tolist() == [1, 3]
    assert part["scale"] == 2.0
    assert asked.shape == (2, 20)
    assert asked[0].nonzero().flatten().tolist() == list(range(10, 20))


@pytest.mark.parametrize(("asked_from", "start"), [(0, 0), (5, 0), (399, 380)])
def test_the_cut_stays_inside_the_rows(monkeypatch, asked_from, start):
    monkeypatch.setattr(logits_agree, "_NUM_COMPARED", 20 * 1000)
    batch, mask = a_batch(3, 400, asked_from=asked_from)
    part, asked = excerpt(batch, mask, rows=torch.tensor([0]), vocabulary=1000, whole_rows=False)
    assert part["input_ids"][0].tolist() == list(range(start, start + 20))
    assert asked.any()


def test_short_rows_and_rows_of_two_sequences_stay_whole(monkeypatch):
    batch, mask = a_batch(3, 12, asked_from=4)
    part, asked = excerpt(batch, mask, rows=torch.tensor([2]), vocabulary=1000, whole_rows=False)
    assert torch.equal(part["input_ids"], batch["input_ids"][2:])
    assert torch.equal(asked, mask[2:])
    monkeypatch.setattr(logits_agree, "_NUM_COMPARED", 1000)
    batch, mask = a_batch(3, 400, asked_from=300)
    part, asked = excerpt(batch, mask, rows=torch.tensor([2]), vocabulary=1000, whole_rows=True)
    assert part["input_ids"].shape == asked.shape == (1, 400)


def test_noise_agrees_and_another_position_does_not():
    whole = torch.randn(6, 50)
    assert agree(whole + 1e-6, whole)
    assert not agree(whole.roll(1, 0), whole)
    half = whole.to(torch.bfloat16)
    assert agree(half + half * 0.004, half)
    assert not agree(half.roll(1, 0), half)
