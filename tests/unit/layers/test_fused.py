"""The fused path computes what the general path computes, and steps aside where it would not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from lorakit.layers import adapted
from lorakit.layers.adapted import AdaptedLayer, module_key
from lorakit.layers.fused import fused_forward
from lorakit.layers.kinds import kind_of
from lorakit.layers.low_rank import Branch, LowRank
from lorakit.layers.routing import Routing
from lorakit.layers.rows import Rows
from lorakit.layers.updates import LORA

IN, OUT, R, SCALING = 6, 10, 3, 2.5


def low_rank(rows: Rows | None = None, *, dropout: float = 0.0) -> LowRank:
    size = OUT if rows is None else rows.size
    A, B = torch.randn(R, IN, dtype=torch.float64), torch.randn(size, R, dtype=torch.float64)
    return LowRank(A, B, scaling=SCALING, rule=LORA, dropout=dropout, rows=rows)


def layer(base: nn.Module, *parts: LowRank, bias: Tensor | None = None) -> AdaptedLayer:
    kind = kind_of(base)
    assert kind is not None
    base.requires_grad_(False)
    wrapped = AdaptedLayer(base, kind=kind, routing=Routing("a"), name="layer")
    wrapped.factors[module_key("a")] = Branch(list(parts), bias)
    return wrapped


def linear(bias: bool = True) -> nn.Module:
    return nn.Linear(IN, OUT, bias=bias, dtype=torch.float64)


def conv1d() -> nn.Module:
    module = Conv1D(OUT, IN).double()
    nn.init.normal_(module.bias)
    return module


FIRST, LAST = Rows(0, 4, OUT), Rows(7, 3, OUT)


def gradients(wrapped: AdaptedLayer, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = wrapped(x)
    weights = torch.arange(y.numel(), dtype=y.dtype).reshape(y.shape).cos()
    found = torch.autograd.grad((y * weights).sum(), [x, *wrapped.factors.parameters()])
    return [y.detach(), *found]


@pytest.mark.parametrize("shape", [(IN,), (5, IN), (2, 4, IN), (0, IN)])
@pytest.mark.parametrize("base", [linear, conv1d, lambda: linear(bias=False)])
@pytest.mark.parametrize("parts", [(None,), (FIRST, LAST)])
def test_output_and_gradients_are_those_of_the_general_path(shape, base, parts, monkeypatch):
    torch.manual_seed(0)
    wrapped = layer(base(), *[low_rank(rows) for rows in parts])
    x = torch.randn(shape, dtype=torch.float64)
    assert fused_forward(wrapped.base, wrapped.branch_of("a"), x) is not None
    fused = gradients(wrapped, x)
    monkeypatch.setattr(adapted, "fused_forward", lambda *_: None)
    torch.testing.assert_close(fused, gradients(wrapped, x))


def test_gradients_are_right_by_finite_differences():
    torch.manual_seed(0)
    wrapped = layer(linear(), low_rank())
    x = torch.randn(2, 3, IN, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(wrapped, (x,))


def test_an_input_without_gradient_still_trains_the_factors():
    wrapped = layer(linear(), low_rank())
    wrapped(torch.randn(4, IN, dtype=torch.float64)).sum().backward()
    part = wrapped.branch_of("a").updates()[0]
    assert part.lora_A.grad.abs().max() > 0
    assert part.lora_B.grad.abs().max() > 0


def test_autocast_computes_in_bfloat16_and_leaves_float32_gradients():
    torch.manual_seed(0)
    wrapped = layer(linear().float(), low_rank().float())
    x = torch.randn(4, IN)
    exact = wrapped(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = wrapped(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert wrapped.branch_of("a").updates()[0].lora_B.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), exact, rtol=0.03, atol=0.1)


@pytest.mark.parametrize("shape", [(4, IN), (2, 3, IN)])
def test_the_output_may_be_changed_in_place(shape):
    wrapped = layer(linear(), low_rank())
    x = torch.randn(shape, dtype=torch.float64)
    y = wrapped(x)
    y /= 2.0
    torch.relu_(y).sum().backward()
    assert wrapped.branch_of("a").updates()[0].lora_B.grad is not None


def test_the_input_is_kept_once():
    wrapped = layer(linear(), low_rank())
    x = torch.randn(64, IN, dtype=torch.float64, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        wrapped(x)
    wide = [t for t in kept if t.shape == (64, IN)]
    assert len(wide) == 1
    assert not [t for t in kept if t.shape == (64, OUT)]


def hooked() -> nn.Module:
    module = linear()
    module.register_forward_hook(lambda _m, _x, y: y * 2)
    return module


def replaced() -> nn.Module:
    module = linear()
    module.forward = lambda x: x.new_ones(*x.shape[:-1], OUT)  # as device-placement hooks do
    return module


def parametrized() -> nn.Module:
    module = linear()
    parametrize.register_parametrization(module, "weight", nn.Tanh())
    return module


@pytest.mark.parametrize("base", [hooked, replaced, parametrized])
def test_a_base_whose_forward_is_not_its_own_runs_itself(base):
    wrapped = layer(base(), low_rank())
    part, x = wrapped.branch_of("a").updates()[0], torch.randn(4, IN, dtype=torch.float64)
    expected = wrapped.base(x) + SCALING * x @ part.lora_A.T @ part.lora_B.T
    torch.testing.assert_close(wrapped(x), expected)


def test_what_the_function_does_not_know_takes_the_general_path():
    x = torch.randn(4, IN, dtype=torch.float64)
    interleaved = Rows(1, 2, 5, count=2)
    for wrapped in (
        layer(linear(), low_rank(interleaved)),
        layer(linear(), low_rank(dropout=0.5)),
        layer(linear(), low_rank(), bias=torch.ones(OUT, dtype=torch.float64)),
    ):
        assert fused_forward(wrapped.base, wrapped.branch_of("a"), x) is None
    trained = layer(linear(), low_rank())
    trained.base.weight.requires_grad_()
    assert fused_forward(trained.base, trained.branch_of("a"), x) is None
    trained(x).sum().backward()
    assert trained.base.weight.grad is not None
