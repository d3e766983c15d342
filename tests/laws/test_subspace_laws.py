"""Laws of the measures: subspace similarity, amplification, intruders, inner products."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorakit.math.subspace import (
    chance_similarity,
    inner_product,
    intruders,
    projected_norm,
    random_directions,
    subspace_similarity,
)
from lorakit.math.svd import numerical_rank, product_svd, stable_rank

D = 23


def _frame(r: int, *, seed: int, d: int = D) -> Tensor:
    return random_directions(d, r, generator=torch.Generator().manual_seed(seed))


def test_a_subspace_contains_its_own_leading_directions() -> None:
    frame = _frame(6, seed=1)
    phi = subspace_similarity(frame, frame)
    # Everywhere, not on the diagonal alone: the smaller of two nested subspaces is contained.
    torch.testing.assert_close(phi, torch.ones(6, 6, dtype=torch.float64))


def test_orthogonal_subspaces_share_nothing() -> None:
    frame = _frame(11, seed=2)
    assert subspace_similarity(frame[:, :4], frame[:, 4:]).abs().max() < 1e-12


def test_swapping_the_two_transposes_phi() -> None:
    one, other = _frame(3, seed=3), _frame(8, seed=4)
    torch.testing.assert_close(subspace_similarity(one, other), subspace_similarity(other, one).T)


def test_phi_is_the_formula_of_the_paper() -> None:
    one, other = _frame(3, seed=5), _frame(7, seed=6)
    phi = subspace_similarity(one, other)
    for i in range(1, 4):
        for j in range(1, 8):
            s = torch.linalg.svdvals(one[:, :i].T @ other[:, :j])
            p = min(i, j)
            distance = (p - s.square().sum()).sqrt()
            assert phi[i - 1, j - 1] == pytest.approx(float(1 - distance**2 / p), abs=1e-12)


def test_the_whole_phi_does_not_depend_on_the_basis() -> None:
    one, other = _frame(4, seed=7), _frame(5, seed=8)
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    before, after = subspace_similarity(one, other), subspace_similarity(one @ turn, other)
    assert float(after[-1, -1]) == pytest.approx(float(before[-1, -1]))
    assert not torch.allclose(before[:3], after[:3])


def test_chance_is_the_mean_over_random_subspaces() -> None:
    pairs = [(_frame(3, seed=s), _frame(7, seed=1000 + s)) for s in range(200)]
    found = torch.stack([subspace_similarity(a, b) for a, b in pairs]).mean(0)
    for i, j in ((1, 1), (3, 2), (2, 7), (3, 7)):
        assert float(found[i - 1, j - 1]) == pytest.approx(chance_similarity(D, i, j), abs=0.02)


@pytest.mark.parametrize(("out", "r", "width"), [(9, 3, 14), (14, 3, 9), (4, 6, 11)])
def test_the_svd_of_a_product_is_that_of_the_matrix(out: int, r: int, width: int) -> None:
    B, A = torch.randn(out, r), torch.randn(r, width)
    left, values, right = product_svd(B, A)
    product = B.double() @ A.double()
    torch.testing.assert_close(left * values @ right.T, product)
    n = min(out, r, width)
    torch.testing.assert_close(values, torch.linalg.svdvals(product)[:n])
    identity = torch.eye(n, dtype=torch.float64)
    torch.testing.assert_close(left.T @ left, identity)
    torch.testing.assert_close(right.T @ right, identity)


def test_directions_of_a_product_do_not_depend_on_how_it_is_split() -> None:
    B, A = torch.randn(9, 3, dtype=torch.float64), torch.randn(3, 14, dtype=torch.float64)
    mix = torch.randn(3, 3, dtype=torch.float64) + 2 * torch.eye(3)
    one, other = product_svd(B, A), product_svd(B @ mix, torch.linalg.solve(mix, A))
    torch.testing.assert_close(one[1], other[1])
    # Each direction is the same up to its sign; the singular vectors of A alone are not.
    torch.testing.assert_close((one[2] * other[2]).sum(0).abs(), torch.ones(3).double())
    torch.testing.assert_close((one[0] * other[0]).sum(0).abs(), torch.ones(3).double())


def test_amplification_on_a_weight_with_known_directions() -> None:
    out, width = 12, 17
    left, right = _frame(out, seed=9, d=out), _frame(out, seed=10, d=width)
    values = torch.linspace(12, 1, out, dtype=torch.float64)
    W = (left * values) @ right.T
    # Along its own leading directions: the norm of its leading singular values.
    assert projected_norm(W, left[:, :3], right[:, :3]) == pytest.approx(float(values[:3].norm()))
    # Along its last ones: theirs.
    assert projected_norm(W, left[:, -2:], right[:, -2:]) == pytest.approx(
        float(values[-2:].norm())
    )
    # A direction that it maps elsewhere: nothing.
    assert projected_norm(W, left[:, :2], right[:, 2:4]) == pytest.approx(0.0, abs=1e-12)


def test_random_directions_see_their_share_of_a_weight() -> None:
    out, width, r = 30, 50, 4
    W = torch.randn(out, width, dtype=torch.float64)
    generator = torch.Generator().manual_seed(11)
    squares = [
        projected_norm(
            W,
            random_directions(out, r, generator=generator),
            random_directions(width, r, generator=generator),
        )
        ** 2
        for _ in range(300)
    ]
    mean = (sum(squares) / len(squares)) ** 0.5
    # The paper's sanity value r / d ||W||, for a weight that is not square.
    assert mean == pytest.approx(r / (out * width) ** 0.5 * float(W.norm()), rel=0.1)


def test_a_new_strong_direction_is_an_intruder_and_a_small_change_is_none() -> None:
    out, width = 40, 60
    W = torch.randn(out, width, dtype=torch.float64)
    base = torch.linalg.svd(W, full_matrices=False).U
    assert intruders(base, base) == []
    u = _frame(1, seed=12, d=out)
    v = _frame(1, seed=13, d=width)
    # A random direction is like none of forty: its largest cosine with them is far below 1.
    assert (base.T @ u).abs().max() < 0.5
    tuned = torch.linalg.svd(W + 100 * u @ v.T, full_matrices=False).U
    assert intruders(base, tuned) == [0]
    faint = torch.linalg.svd(W + 0.01 * u @ v.T, full_matrices=False).U
    assert intruders(base, faint) == []


def test_the_inner_product_is_that_of_the_matrices() -> None:
    one = torch.randn(9, 3), torch.randn(3, 14)
    other = torch.randn(9, 5), torch.randn(5, 14)
    expected = ((one[0] @ one[1]) * (other[0] @ other[1])).sum()
    assert inner_product(one, other) == pytest.approx(float(expected), rel=1e-4)


def test_ranks_of_a_spectrum() -> None:
    values = torch.tensor([3.0, 3.0, 3.0, 1e-9])
    assert numerical_rank(values) == 3
    assert stable_rank(values) == pytest.approx(3.0)
    assert numerical_rank(torch.zeros(4)) == 0
    assert stable_rank(torch.zeros(4)) == 0.0
