from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.layers.bottleneck import (
    Activation,
    Bottleneck,
    BottleneckSite,
    DropAtRandom,
    Switch,
    Where,
    num_bottleneck_params,
)

WIDTH, SIZE = 6, 4


def learned_adapter(*, with_norm: bool = False, activation: Activation = "gelu") -> Bottleneck:
    adapter = Bottleneck(WIDTH, SIZE, activation=activation, with_norm=with_norm)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter))
    return adapter


def by_hand(adapter: Bottleneck, x: Tensor) -> Tensor:
    """W_up f(W_down LN(x) + b_down) + b_up, written out."""
    if adapter.norm is not None:
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
        x = (x - mean) / (variance + 1e-5).sqrt() * adapter.norm.weight + adapter.norm.bias
    f = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}[adapter.activation]
    h = f(x @ adapter.down.weight.T + adapter.down.bias)
    return h @ adapter.up.weight.T + adapter.up.bias


@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_the_formula_and_the_count(activation: Activation, with_norm: bool) -> None:
    adapter = learned_adapter(with_norm=with_norm, activation=activation)
    x = torch.randn(3, 5, WIDTH)
    torch.testing.assert_close(adapter(x), by_hand(adapter, x))
    num_params = sum(p.numel() for p in adapter.parameters())
    assert num_params == num_bottleneck_params(WIDTH, SIZE, with_norm=with_norm)


@pytest.mark.parametrize("with_norm", [False, True])
def test_a_new_adapter_is_zero_and_can_learn(with_norm: bool) -> None:
    adapter = Bottleneck(WIDTH, SIZE, activation="gelu", with_norm=with_norm)
    x = torch.randn(3, 5, WIDTH)
    assert adapter(x).equal(torch.zeros_like(x))
    bound = WIDTH**-0.5
    assert 0.3 * bound < adapter.down.weight.abs().max() <= bound
    (adapter(x) * torch.randn_like(x)).sum().backward()
    assert adapter.up.weight.grad is not None
    assert adapter.up.weight.grad.abs().max() > 0


@pytest.mark.parametrize("with_norm", [False, True])
def test_parameters_stay_float32_beside_bfloat16_activations(with_norm: bool) -> None:
    adapter = learned_adapter(with_norm=with_norm)
    x = torch.randn(3, WIDTH, dtype=torch.bfloat16)
    y = adapter(x)
    assert y.dtype == torch.bfloat16
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    torch.testing.assert_close(y.float(), adapter(x.float()), rtol=0.05, atol=0.1)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        return self.linear(x), "weights"


def site(base: nn.Module, where: Where, *, block: int = 0) -> tuple[BottleneckSite, Switch]:
    switch = Switch()
    adapter = learned_adapter()
    return BottleneckSite(base, adapter, switch=switch, block=block, where=where, name="b"), switch


def test_a_site_adds_at_the_modules_output() -> None:
    base = nn.Linear(3, WIDTH)
    wrapped, switch = site(base, "module")
    x = torch.randn(2, 5, 3)
    y = base(x)
    torch.testing.assert_close(wrapped(x), y + by_hand(wrapped.adapter, y))
    switch.on = False
    assert wrapped(x).equal(y)
    assert wrapped.in_features == 3


@pytest.mark.parametrize("kind", [Pair, lambda: nn.Linear(WIDTH, WIDTH)])
def test_a_site_adds_at_a_blocks_output_and_later_hooks_see_it(kind) -> None:
    base = kind()
    seen: list[Tensor] = []

    def first(output):
        return output[0] if isinstance(output, tuple) else output

    x = torch.randn(2, 5, WIDTH)
    y = first(base(x))
    base.register_forward_hook(lambda _m, _a, output: seen.append(first(output)))
    wrapped, switch = site(base, "block")
    expected = y + by_hand(wrapped.adapter, y)
    output = wrapped(x)
    torch.testing.assert_close(first(output), expected)
    assert seen[-1].equal(first(output))
    assert not isinstance(output, tuple) or output[1] == "weights"
    switch.on = False
    assert first(wrapped(x)).equal(y)


def test_a_copied_block_runs_its_own_adapter() -> None:
    wrapped, _ = site(nn.Linear(WIDTH, WIDTH), "block")
    copied = copy.deepcopy(wrapped)
    x = torch.randn(2, WIDTH)
    before = wrapped(x)
    assert copied(x).equal(before)
    with torch.no_grad():
        copied.adapter.up.bias.add_(1)
    torch.testing.assert_close(copied(x), before + 1)
    assert wrapped(x).equal(before)


def test_a_site_before_a_norm_follows_pfeiffer() -> None:
    base = nn.LayerNorm(WIDTH)
    wrapped, switch = site(base, "norm")
    s = torch.randn(2, 5, WIDTH)
    torch.testing.assert_close(wrapped(s), base(s + by_hand(wrapped.adapter, base(s))))
    switch.on = False
    assert wrapped(s).equal(base(s))


def test_dropping_is_by_block_and_by_mode() -> None:
    wrapped, switch = site(nn.Linear(WIDTH, WIDTH), "module", block=2)
    switch.num_dropped, switch.num_dropped_training = 3, 2
    assert wrapped.train().runs
    assert not wrapped.eval().runs
    switch.num_dropped, switch.num_dropped_training = 2, 3
    assert not wrapped.train().runs
    assert wrapped.eval().runs


def test_a_random_drop_is_uniform_repeats_with_the_seed_and_spares_evaluation() -> None:
    switch = Switch()
    draw = DropAtRandom(switch, 3)
    model = nn.Linear(2, 2)

    def drawn(count: int) -> list[int]:
        torch.manual_seed(5)
        found = []
        for _ in range(count):
            draw(model.train(), ())
            found.append(switch.num_dropped_training)
        return found

    numbers = drawn(400)
    assert {n: numbers.count(n) > 60 for n in range(4)} == dict.fromkeys(range(4), True)
    assert set(numbers) == {0, 1, 2, 3}
    assert drawn(400) == numbers
    last = switch.num_dropped_training
    state = torch.get_rng_state()
    draw(model.eval(), ())
    assert switch.num_dropped_training == last
    assert switch.num_dropped == 0
    assert torch.get_rng_state().equal(state)
