"""Interference of two changes, and truncation, against plain linear algebra."""

from __future__ import annotations

import pytest
import torch

from lorakit.math import truncate
from lorakit.math.interference import interference, sign_conflict
from lorakit.math.sparsify import drop_and_rescale, keep_largest
from lorakit.math.truncate import truncate_dense, truncate_product


def product(seed: int, *, r: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(40, r, generator=generator), torch.randn(r, 24, generator=generator)


def test_a_change_beside_itself_and_its_negative() -> None:
    B, A = product(1)
    same = interference((B, A), (2 * B, A))
    assert same is not None
    assert (same.overlap_in, same.overlap_out) == pytest.approx((1.0, 1.0))
    assert same.cosine == pytest.approx(1.0)
    assert same.sign_conflict == 0
    opposed = interference((B, A), (-B, A))
    assert opposed is not None
    assert opposed.cosine == pytest.approx(-1.0)
    assert opposed.sign_conflict == 1
    assert interference((B, A), (0 * B, A)) is None


def test_unrelated_changes_are_near_chance() -> None:
    found = [interference(product(seed), product(seed + 100, r=5)) for seed in range(30)]
    values = [one for one in found if one is not None]
    assert values[0].chance_in == pytest.approx(5 / 24)
    for name in ("in", "out"):
        mean = sum(getattr(one, f"overlap_{name}") for one in values) / len(values)
        assert mean == pytest.approx(getattr(values[0], f"chance_{name}"), rel=0.2)
    assert sum(one.sign_conflict for one in values) / 30 == pytest.approx(0.5, abs=0.05)
    assert abs(sum(one.cosine for one in values) / 30) < 0.05


def test_the_numbers_are_those_of_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = product(1), product(2)
    one, two = first[0] @ first[1], second[0] @ second[1]
    found = interference(first, second)
    assert found is not None
    cosine = float((one * two).sum() / (one.norm() * two.norm()))
    assert found.cosine == pytest.approx(cosine, rel=1e-4)
    smaller = torch.minimum(one.abs(), two.abs())
    wanted = float(smaller[one * two < 0].sum() / smaller.sum())
    # In blocks of two rows: the blocks make no difference.
    monkeypatch.setattr("lorakit.math.interference._BLOCK", 48)
    assert sign_conflict(first, second) == pytest.approx(wanted, rel=1e-5)


def test_truncation_with_and_without_the_product() -> None:
    B, A = product(3, r=8)
    values = torch.linalg.svdvals(B @ A)
    for found in (truncate_product(B, A, 3), truncate_dense(B @ A, 3)):
        assert found.error == pytest.approx(float(values[3:].norm()), rel=1e-4)
        assert found.norm == pytest.approx(float(values.norm()), rel=1e-5)
        assert float((B @ A - found.B @ found.A).norm()) == pytest.approx(found.error, rel=1e-4)
    assert truncate_product(B, A).A.shape == (8, 24)
    assert truncate_product(torch.cat([B, B], 1), torch.cat([A, A])).A.shape == (8, 24)
    zero = truncate_product(0 * B, A, 3)
    assert (zero.A.shape, zero.error, zero.norm) == ((1, 24), 0.0, 0.0)


def test_the_randomized_truncation_says_its_own_error(monkeypatch: pytest.MonkeyPatch) -> None:
    B, A = product(4, r=8)
    matrix = B @ A + 0.01 * torch.randn(40, 24)
    exact = truncate_dense(matrix, 4)
    monkeypatch.setattr(truncate, "_EXACT_SIZE", 10)
    state = torch.random.get_rng_state()
    found = truncate_dense(matrix, 4)
    assert torch.random.get_rng_state().equal(state)
    assert found.A.shape == (4, 24)
    measured = float((matrix - found.B @ found.A).norm())
    assert found.error == pytest.approx(measured, rel=1e-4)
    assert exact.error <= found.error * (1 + 1e-5) <= 1.05 * exact.error


def test_thinning_out() -> None:
    change = torch.tensor([[3.0, -1.0], [0.5, -4.0]])
    assert keep_largest(change, 0.5).equal(torch.tensor([[3.0, 0.0], [0.0, -4.0]]))
    assert keep_largest(change, 0.51).count_nonzero() == 3
    assert keep_largest(change, 1.0) is change
    generator = torch.Generator().manual_seed(0)
    dropped = drop_and_rescale(torch.ones(10000), 0.25, generator)
    assert set(dropped.tolist()) == {0.0, 4.0}
    assert float(dropped.mean()) == pytest.approx(1.0, abs=0.1)
