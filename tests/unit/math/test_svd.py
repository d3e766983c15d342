from __future__ import annotations

import math

import pytest
import torch

from lorakit.math.svd import effective_rank, product_singular_values


@pytest.mark.parametrize(("out", "r", "width"), [(7, 3, 11), (11, 3, 7), (4, 6, 9), (5, 1, 2)])
def test_the_spectrum_is_that_of_the_product(out: int, r: int, width: int) -> None:
    b, a = torch.randn(out, r), torch.randn(r, width)
    found = product_singular_values(b, a)
    expected = torch.linalg.svdvals(b.double() @ a.double())[: min(r, out, width)]
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected)


def test_a_zero_product_has_a_zero_spectrum_and_rank() -> None:
    values = product_singular_values(torch.zeros(5, 2), torch.randn(2, 4))
    assert values.tolist() == [0.0, 0.0]
    assert effective_rank(values) == 0.0


def test_the_effective_rank_is_the_exponential_of_the_entropy() -> None:
    assert effective_rank(torch.ones(6)) == pytest.approx(6.0)
    assert effective_rank(torch.tensor([5.0, 0.0, 0.0])) == pytest.approx(1.0)
    p = torch.tensor([0.75, 0.25], dtype=torch.float64)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert effective_rank(10 * p) == pytest.approx(math.exp(entropy))
