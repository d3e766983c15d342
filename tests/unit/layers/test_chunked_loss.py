"""The chunked loss is F.cross_entropy of the logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.layers import chunked_loss
from lorakit.layers.chunked_loss import chunked_cross_entropy

NUM, WIDTH, VOCAB = 11, 6, 17


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_loss, "_CHUNK_LABELS", 4)  # 4, 4 and 3 labels


def case(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(NUM, WIDTH, generator=generator, dtype=dtype)
    weight = 3 * torch.randn(VOCAB, WIDTH, generator=generator, dtype=dtype)
    bias = torch.randn(VOCAB, generator=generator, dtype=dtype)
    return hidden, weight, bias, torch.randint(VOCAB, (NUM,), generator=generator)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("with_bias", [False, True])
def test_loss_and_gradient(smoothing: float, with_bias: bool) -> None:
    hidden, weight, bias, targets = case()
    hidden.requires_grad_()
    b = bias if with_bias else None
    own = F.cross_entropy(
        F.linear(hidden, weight, b), targets, reduction="sum", label_smoothing=smoothing
    )
    found = chunked_cross_entropy(hidden, weight, b, targets, label_smoothing=smoothing)
    torch.testing.assert_close(found, own)
    (expected,) = torch.autograd.grad(own / 7, hidden)
    torch.testing.assert_close(torch.autograd.grad(found / 7, hidden)[0], expected)


def test_weights() -> None:
    hidden, weight, bias, targets = case()
    hidden.requires_grad_()
    weights = torch.linspace(-1.5, 2.0, NUM)
    options = {"label_smoothing": 0.1}
    each = F.cross_entropy(F.linear(hidden, weight, bias), targets, reduction="none", **options)
    found = chunked_cross_entropy(hidden, weight, bias, targets, weights=weights, **options)
    torch.testing.assert_close(found, (weights * each).sum())
    (expected,) = torch.autograd.grad((weights * each).sum(), hidden)
    torch.testing.assert_close(torch.autograd.grad(found, hidden)[0], expected)


def test_without_gradient_and_without_labels() -> None:
    hidden, weight, _, targets = case()
    with torch.no_grad():
        found = chunked_cross_entropy(hidden, weight, None, targets)
    torch.testing.assert_close(found, F.cross_entropy(hidden @ weight.T, targets, reduction="sum"))
    assert chunked_cross_entropy(hidden[:0], weight, None, targets[:0]) == 0


def test_bfloat16_takes_its_softmax_in_float32() -> None:
    hidden, weight, _, targets = case()
    hidden.requires_grad_()
    exact = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = chunked_cross_entropy(hidden, weight, None, targets)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=0.02, atol=0.0)
    (expected,) = torch.autograd.grad(exact, hidden)
    (gradient,) = torch.autograd.grad(found, hidden)
    assert gradient.dtype == torch.float32
    assert (gradient - expected).norm() < 0.03 * expected.norm()


def test_all_logits_are_never_there_at_once() -> None:
    hidden, weight, _, targets = case()
    hidden.requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        chunked_cross_entropy(hidden, weight, None, targets)
    assert [tuple(t.shape) for t in kept] == [(NUM, WIDTH)]
