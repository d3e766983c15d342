"""The fast RMS norm is the model's own, where the model's own is one we know."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from lorakit.layers.rms_norm import rms_norm, use_fast_norms, use_own_norms

WIDTH = 24
CLASSES = [LlamaRMSNorm, Qwen3RMSNorm, Gemma3RMSNorm]


def norm_of(cls: type[nn.Module], dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    module = cls(WIDTH, eps=1e-2)
    nn.init.normal_(module.weight)
    return module.to(dtype).requires_grad_(False)


def run(module: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.clone().requires_grad_()
    y = module(x)
    (gradient,) = torch.autograd.grad((y * torch.arange(WIDTH).cos()).sum(), x)
    return y.detach(), gradient


@pytest.mark.parametrize("cls", CLASSES)
def test_output_and_gradient_are_the_modules_own(cls):
    module = norm_of(cls)
    x = torch.randn(2, 5, WIDTH) * 3
    expected = run(module, x)
    assert use_fast_norms(module) == 1
    torch.testing.assert_close(run(module, x), expected)


@pytest.mark.parametrize("cls", CLASSES)
def test_in_bfloat16_it_is_no_further_from_the_truth_than_the_modules_own(cls):
    module = norm_of(cls, torch.bfloat16)
    known = 0 if cls is Gemma3RMSNorm else 1  # 1 + w would be rounded
    x = (torch.randn(64, WIDTH) * 3).bfloat16()
    exact = run(copy.deepcopy(module).double(), x.double())
    own = run(module, x)
    assert use_fast_norms(module) == known
    fast = run(module, x)
    for truth, before, after in zip(exact, own, fast, strict=True):
        error = (after.double() - truth).norm() / truth.norm()
        assert error <= max(1.3 * (before.double() - truth).norm() / truth.norm(), 4e-3)


def test_gradient_by_finite_differences():
    weight = torch.randn(5, dtype=torch.float64)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: rms_norm(t, weight, 1e-2), (x,))


def test_a_norm_with_another_formula_keeps_its_own():
    class OddRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states):
            return super().forward(hidden_states) + 0.01

    class PlainRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(WIDTH), requires_grad=False)

        def forward(self, x):
            return x * self.weight

    odd = OddRMSNorm(WIDTH).requires_grad_(False)
    assert use_fast_norms(nn.ModuleList([odd, PlainRMSNorm()])) == 0


def test_a_trained_weight_keeps_its_own_and_gets_its_gradient():
    module = norm_of(LlamaRMSNorm)
    use_fast_norms(module)
    module.weight.requires_grad_()
    module(torch.randn(3, WIDTH)).sum().backward()
    assert module.weight.grad is not None
    assert use_fast_norms(norm_of(LlamaRMSNorm).requires_grad_()) == 0


def test_it_can_be_undone_and_is_not_done_twice():
    model = nn.ModuleList([norm_of(LlamaRMSNorm), norm_of(Gemma3RMSNorm)])
    assert [use_fast_norms(model), use_fast_norms(model)] == [2, 0]
    use_own_norms(model)
    assert all("forward" not in vars(module) for module in model)
