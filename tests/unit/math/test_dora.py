"""Row norms of W0 + s B A without the sum in memory, to float32's last digits."""

from __future__ import annotations

import pytest
import torch

from lorakit.math import dora
from lorakit.math.dora import dora_change, row_norms


@pytest.mark.parametrize("transposed", [False, True], ids=["out-in", "in-out"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("block", [2**18, 64, 1])
def test_norms_are_those_of_the_dense_sum(
    transposed: bool, dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dora, "_CPU_BLOCK", block)
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(37, 53, generator=generator).to(dtype)
    if transposed:
        weight = weight.T.contiguous().T
    A, B = torch.randn(5, 53, generator=generator), torch.randn(37, 5, generator=generator)
    exact = (weight.double() + 2.5 * B.double() @ A.double()).norm(dim=1)
    found = row_norms(weight, A, B, 2.5)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("transposed", [False, True], ids=["out-in", "in-out"])
def test_an_update_that_undoes_a_row_keeps_its_digits(transposed: bool) -> None:
    # ||W0||^2 + 2 s <W0, B A> + s^2 ||B A||^2 in float32 has no right digit left here.
    torch.manual_seed(0)
    A, B = torch.randn(4, 300), torch.randn(50, 4)
    rest = 1e-4 * torch.randn(50, 300)
    weight = (rest.double() - 1.5 * B.double() @ A.double()).float()
    if transposed:
        weight = weight.T.contiguous().T
    exact = (weight.double() + 1.5 * B.double() @ A.double()).norm(dim=1)
    torch.testing.assert_close(row_norms(weight, A, B, 1.5).double(), exact, rtol=2e-3, atol=0)
    expanded = (
        weight.square().sum(1)
        + 3.0 * ((weight @ A.T) * B).sum(1)
        + 2.25 * ((B @ (A @ A.T)) * B).sum(1)
    )
    assert ((expanded.clamp_min(0).sqrt().double() - exact).abs() > 0.1 * exact).any()


def test_the_change_gives_rows_of_the_wanted_norm() -> None:
    torch.manual_seed(0)
    weight, A, B, m = torch.randn(6, 9), torch.randn(2, 9), torch.randn(6, 2), torch.rand(6) + 0.5
    merged = weight + dora_change(weight, A, B, scaling=2.5, magnitude=m)
    torch.testing.assert_close(merged.norm(dim=1), m)
    whole = weight + 2.5 * B @ A
    torch.testing.assert_close(torch.cosine_similarity(merged, whole), torch.ones(6))
