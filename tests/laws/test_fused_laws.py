"""A part of a fused projection moves its own rows only, as the model itself splits them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import tiny_models
from learned import attach_learned
from lorakit.adapters.attach import detach, use
from lorakit.adapters.spec import LoraSpec
from lorakit.errors import TargetError

Split = Callable[[Tensor], dict[str, Tensor]]


def _gpt2(y: Tensor) -> dict[str, Tensor]:
    # GPT2Attention.forward: c_attn(x).split(split_size, dim=2)
    return dict(zip("qkv", y.split(32, dim=2), strict=True))


def _phi3(y: Tensor) -> dict[str, Tensor]:
    # Phi3Attention.forward: heads * head_dim of q, then kv_heads * head_dim of k, the rest v.
    return {"q": y[..., :32], "k": y[..., 32:48], "v": y[..., 48:]}


def _gate_up(y: Tensor) -> dict[str, Tensor]:
    # Phi3MLP.forward: gate, up_states = up_states.chunk(2, dim=-1)
    return dict(zip(("gate", "up"), y.chunk(2, dim=-1), strict=True))


def _heads_of_three(y: Tensor) -> dict[str, Tensor]:
    # BloomAttention._reshape, FalconAttention._split_heads: view(b, s, heads, 3, head_dim)
    y = y.view(*y.shape[:2], 4, 3, 8)
    return {"q": y[..., 0, :], "k": y[..., 1, :], "v": y[..., 2, :]}


def _neox(y: Tensor) -> dict[str, Tensor]:
    # GPTNeoXAttention.forward: view(b, s, -1, 3 * head_size).transpose.chunk(3, dim=-1)
    return dict(zip("qkv", y.view(*y.shape[:2], -1, 24).chunk(3, dim=-1), strict=True))


def _falcon_multi_query(y: Tensor) -> dict[str, Tensor]:
    y = y.view(*y.shape[:2], 6, 8)
    return {"q": y[..., :-2, :], "k": y[..., -2, :], "v": y[..., -1, :]}


def _falcon_grouped(y: Tensor) -> dict[str, Tensor]:
    # Two groups, each: two query heads, one key head, one value head.
    y = y.view(*y.shape[:2], 2, 4, 8)
    return {"q": y[..., :-2, :], "k": y[..., -2, :], "v": y[..., -1, :]}


FUSED: dict[str, tuple[str, str, Split]] = {
    "gpt2": ("gpt2", "transformer.h.0.attn.c_attn", _gpt2),
    "phi3": ("phi3", "model.layers.0.self_attn.qkv_proj", _phi3),
    "phi3-mlp": ("phi3", "model.layers.0.mlp.gate_up_proj", _gate_up),
    "bloom": ("bloom", "transformer.h.0.self_attention.query_key_value", _heads_of_three),
    "falcon": ("falcon", "transformer.h.0.self_attention.query_key_value", _falcon_multi_query),
    "falcon-grouped": (
        "falcon-grouped",
        "transformer.h.0.self_attention.query_key_value",
        _falcon_grouped,
    ),
    "falcon-multi-head": (
        "falcon-multi-head",
        "transformer.h.0.self_attention.query_key_value",
        _heads_of_three,
    ),
    "gpt_neox": ("gpt_neox", "gpt_neox.layers.0.attention.query_key_value", _neox),
}
_PARTS = [
    pytest.param(key, part, id=f"{key}.{part}")
    for key in FUSED
    for part in (("gate", "up") if key == "phi3-mlp" else ("q", "k", "v"))
]


@pytest.mark.parametrize(("key", "part"), _PARTS)
def test_a_part_moves_its_own_rows_only(key: str, part: str) -> None:
    architecture, module, split = FUSED[key]
    model = tiny_models.build(architecture)
    given = tiny_models.inputs(model)
    spec = LoraSpec(targets=(f"{module.rpartition('.')[2]}.{part}",), r=3, alpha=5.0)
    plan = attach_learned(model, spec)
    assert {s.name for s in plan.sites} == {
        f"{module.replace('.0.', f'.{i}.')}.{part}" for i in range(2)
    }
    caught: list[Tensor] = []
    hook = model.get_submodule(module).register_forward_hook(
        lambda _m, _i, y: caught.append(y.detach().clone())
    )
    tiny_models.outputs(model, given)
    with use(model, None):
        tiny_models.outputs(model, given)
    hook.remove()
    moved = split(caught[0] - caught[1])
    for name, rows in moved.items():
        if name == part:
            assert (rows != 0).float().mean() > 0.99
        else:
            assert not rows.any()
    own = moved[part]
    site = next(s for s in plan.sites if s.name.startswith(module))
    assert own.numel() == 3 * 9 * site.shape[0]
    assert site.num_params() == 3 * (site.shape[0] + site.shape[1])
    # Rank 3: the part's own update is a product of its own.
    flat = own.reshape(27, -1)
    assert torch.linalg.matrix_rank(flat.double(), rtol=1e-5) == 3
    detach(model)


def test_falcons_own_split_agrees() -> None:
    # The model's code, not ours: what attention takes as the query moves, key and value do not.
    for architecture in ("falcon", "falcon-grouped", "falcon-multi-head"):
        model = tiny_models.build(architecture)
        given = tiny_models.inputs(model)
        attention = model.transformer.h[0].self_attention
        attach_learned(model, LoraSpec(targets=("query_key_value.q",), r=2, alpha=3.0))
        caught: list[Tensor] = []
        hook = attention.query_key_value.register_forward_hook(
            lambda _m, _i, y, caught=caught: caught.append(y.detach().clone())
        )
        tiny_models.outputs(model, given)
        with use(model, None):
            tiny_models.outputs(model, given)
        hook.remove()
        q, k, v = attention._split_heads(caught[0] - caught[1])
        assert q.ne(0).float().mean() > 0.99
        assert not k.any()
        assert not v.any()


def test_blooms_own_split_agrees() -> None:
    model = tiny_models.build("bloom")
    attention = model.transformer.h[0].self_attention
    attach_learned(model, LoraSpec(targets=("query_key_value.v",), r=2, alpha=3.0))
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        live = attention.query_key_value(x)
        with use(model, None):
            base = attention.query_key_value(x)
    q, k, v = attention._reshape(live - base)
    assert v.ne(0).float().mean() > 0.99
    assert not q.any()
    assert not k.any()


def test_parts_have_their_own_factors_and_whole_plus_part_is_refused() -> None:
    model = tiny_models.build("gpt2")
    plan = attach_learned(
        model,
        LoraSpec(targets=("c_attn.q", "c_attn.v"), r=2, rank_pattern={"c_attn.v": 5}),
    )
    assert {(s.part, s.r) for s in plan.sites} == {("q", 2), ("v", 5)}
    assert plan.num_params() == 2 * (2 + 5) * (32 + 32)
    detach(model)
    with pytest.raises(TargetError, match="c_attn"):
        attach_learned(model, LoraSpec(targets=("c_attn", "c_attn.q")))


def test_a_part_that_does_not_exist_lists_those_that_do() -> None:
    model = tiny_models.build("gpt2")
    with pytest.raises(TargetError, match=r"c_attn\.(q|k|v)"):
        attach_learned(model, LoraSpec(targets=("c_attn.z",)))
