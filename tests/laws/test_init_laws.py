"""Starts that are not zero: the output stays the base's, the base stays untouched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny_models
from learned import assert_same_bits, attach_learned, bits, module_ids, shake, trainable
from lorakit.adapters.attach import attach, detach, use
from lorakit.adapters.attachments import adapted_layers
from lorakit.adapters.data_init import initialise_from_data
from lorakit.adapters.extract import adapter_from_model
from lorakit.adapters.fold import merge, unmerge
from lorakit.adapters.plan import plan_adapter
from lorakit.adapters.spec import LoraSpec
from lorakit.errors import DataError, SpecError, StateError
from lorakit.formats.peft import load_adapter, save_adapter
from lorakit.layers.low_rank import LowRank
from lorakit.methods.lora import LoraMethod

_WEIGHT_INITS = ("pissa", "pissa_fast", "olora")
_ALL_INITS = (*_WEIGHT_INITS, "lora_ga", "eva")
_MODELS: dict[str, dict[str, Any]] = {
    "llama": {
        "targets": "all-linear",
        "rank_pattern": {"v_proj": 4},
        "alpha_pattern": {"k_proj": 2.0},
    },
    "gpt2": {"targets": ("c_attn.q", "c_attn.v", "c_fc")},
    "bloom": {"targets": "qv", "scaling": "alpha/sqrt(r)"},
}
_grid = pytest.mark.parametrize("architecture", list(_MODELS))
_inits = pytest.mark.parametrize("init", _ALL_INITS)
_updates_of = pytest.mark.parametrize("update", ["lora", "dora"])


def _spec(architecture: str, **changes: Any) -> LoraSpec:
    return LoraSpec(**{"r": 3, "alpha": 7.5, **_MODELS[architecture], **changes})


def _batches(model: Any, num: int = 2) -> list[dict[str, Tensor]]:
    found = []
    for seed in range(num):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(5, model.config.vocab_size, (4, 9), generator=generator)
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
    return found


def _start(model: Any, spec: LoraSpec, name: str = "default") -> None:
    attach(model, spec, name=name)
    if spec.init in ("eva", "lora_ga"):
        initialise_from_data(model, name, _batches(model))


def _updates(model: nn.Module, name: str = "default") -> list[LowRank]:
    branches = [layer.branch_of(name) for layer in adapted_layers(model)]
    return [update for branch in branches if branch is not None for update in branch.updates()]


@_grid
@_inits
@_updates_of
def test_the_start_is_the_identity_and_the_base_is_untouched(
    architecture: str, init: str, update: str
) -> None:
    model = tiny_models.build(architecture)
    given = tiny_models.inputs(model)
    before, values, ids = tiny_models.outputs(model, given), bits(model), module_ids(model)
    plan = plan_adapter(model, _spec(architecture, init=init, update=update))
    _start(model, plan.spec)
    assert plan.num_params() == sum(p.numel() for p in trainable(model).values())
    assert tiny_models.outputs(model, given).equal(before)
    if init != "eva":
        assert all(u.lora_B.any() and u.lora_A.any() for u in _updates(model))
    shake(model)
    assert (tiny_models.outputs(model, given) - before).abs().max() > 1e-4
    with use(model, None):
        assert tiny_models.outputs(model, given).equal(before)
    detach(model)
    assert_same_bits(values, bits(model))
    assert module_ids(model) == ids


@_grid
@_inits
@_updates_of
def test_what_is_saved_binds_on_the_untouched_base(
    architecture: str, init: str, update: str, tmp_path: Path
) -> None:
    model = tiny_models.build(architecture)
    given = tiny_models.inputs(model)
    spec = _spec(architecture, init=init, update=update)
    _start(model, spec)
    shake(model)
    live = tiny_models.outputs(model, given)
    written = save_adapter(model, tmp_path / "a")
    doubled = init != "eva"
    assert written.spec.r == spec.r * (2 if doubled else 1)
    assert ("trained_as" in written.passport) == doubled
    if doubled:
        assert written.passport["trained_as"] == spec.to_dict()
    fresh = tiny_models.build(architecture)
    load_adapter(fresh, tmp_path / "a")
    torch.testing.assert_close(tiny_models.outputs(fresh, given), live, rtol=1e-5, atol=2e-5)
    # It is an ordinary adapter now: it trains on, and saves again as it is.
    fresh.train()
    fresh(**given)
    again = save_adapter(fresh, tmp_path / "b")
    assert again.spec == written.spec
    assert all(f.A.equal(again.factors[n].A) for n, f in written.factors.items())


@_grid
@pytest.mark.parametrize("init", ["pissa", "lora_ga"])
@_updates_of
def test_live_equals_merged(architecture: str, init: str, update: str) -> None:
    model = tiny_models.build(architecture)
    given = tiny_models.inputs(model)
    _start(model, _spec(architecture, init=init, update=update))
    shake(model)
    live, values = tiny_models.outputs(model, given), bits(model)
    merge(model)
    torch.testing.assert_close(tiny_models.outputs(model, given), live, rtol=1e-5, atol=2e-5)
    unmerge(model)
    assert_same_bits(values, bits(model))


def test_the_weight_inits_are_what_the_papers_say() -> None:
    weight = torch.randn(12, 9, generator=torch.Generator().manual_seed(0))
    for init in _WEIGHT_INITS:
        model = nn.Sequential(nn.Linear(9, 12, bias=False))
        with torch.no_grad():
            model[0].weight.copy_(weight)
        attach(model, LoraSpec(targets=("0",), r=4, alpha=10.0, init=init))
        (update,) = _updates(model)
        A, B = update.lora_A.detach(), update.lora_B.detach()
        if init == "olora":
            q, r = torch.linalg.qr(weight)
            torch.testing.assert_close(B @ A, q[:, :4] @ r[:4])
            continue
        u, s, v = torch.linalg.svd(weight)
        best = (u[:, :4] * s[:4]) @ v[:4]
        torch.testing.assert_close(2.5 * B @ A, best, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(A @ A.T, torch.diag(s[:4] / 2.5), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(B.T @ B, torch.diag(s[:4] / 2.5), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("update", ["lora", "dora"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_training_is_that_of_the_changed_base(update: str, dropout: float) -> None:
    """Against (W0 - s B0 A0) with the same factors: the same output and gradients."""
    torch.manual_seed(0)
    mine = nn.Sequential(nn.Linear(9, 12)).double()
    other = nn.Sequential(nn.Linear(9, 12)).double()
    other.load_state_dict(mine.state_dict())
    spec = {"targets": ("0",), "r": 3, "alpha": 7.5, "update": update, "dropout": dropout}
    attach(mine, LoraSpec(init="pissa", **spec))
    (ours,) = _updates(mine)
    with torch.no_grad():
        other[0].weight -= 2.5 * ours.lora_B @ ours.lora_A
    attach(other, LoraSpec(**spec))
    shake(mine, seed=1)
    (theirs,) = _updates(other)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            theirs.get_parameter(name).copy_(parameter)
    x, weight = torch.randn(5, 9).double(), torch.randn(5, 12).double()
    results = []
    for model in (mine, other):
        torch.manual_seed(3)
        y = model.train()(x)
        (y * weight).sum().backward()
        results.append(y.detach())
    torch.testing.assert_close(*results)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs.get_parameter(name).grad)


def test_eva_takes_the_directions_of_the_inputs_without_padding() -> None:
    model = tiny_models.build("llama")
    (batch,) = _batches(model, 1)
    batch["attention_mask"][:, 6:] = 0
    seen: list[Tensor] = []
    layer = model.model.layers[1].mlp.down_proj
    handle = layer.register_forward_hook(
        lambda _, args, y: seen.append(args[0][:, :6].flatten(0, 1))
    )
    state = torch.get_rng_state()
    with torch.no_grad():
        model(**batch)
    handle.remove()
    attach(model, LoraSpec(targets=("down_proj",), r=3, init="eva"))
    modes = {n: m.training for n, m in model.named_modules()}
    state = torch.get_rng_state()
    assert initialise_from_data(model, "default", [batch]) == 1
    assert torch.get_rng_state().equal(state)
    assert {n: m.training for n, m in model.named_modules()} == modes
    A = _updates(model)[1].lora_A.detach()
    _, _, v = torch.linalg.svd(seen[0].double(), full_matrices=False)
    overlap = (A.double() @ v[:3].T).abs()
    torch.testing.assert_close(overlap, torch.eye(3).double(), rtol=0, atol=2e-3)
    assert not _updates(model)[1].lora_B.any()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_lora_ga_takes_the_directions_of_the_gradient(architecture: str) -> None:
    target = {"llama": "down_proj", "gpt2": "c_fc"}[architecture]
    model = tiny_models.build(architecture)
    batches = _batches(model)
    for batch in batches:
        model(**batch).loss.backward()
    weights = {n: m.weight for n, m in model.named_modules() if n.endswith(target)}
    gradients = {n: w.grad.double() for n, w in weights.items()}
    model.zero_grad()
    attach(model, LoraSpec(targets=(target,), r=2, alpha=5, init="lora_ga"))
    assert initialise_from_data(model, "default", batches) == 2
    assert all(p.grad is None for p in model.parameters())
    for (name, gradient), update in zip(gradients.items(), _updates(model), strict=True):
        full = gradient.T if architecture == "gpt2" else gradient
        u, _, v = torch.linalg.svd(full, full_matrices=False)
        c = full.shape[0] ** 0.25 / 4
        A, B = update.lora_A.detach().double() / c, update.lora_B.detach().double() / c
        (
            torch.testing.assert_close(
                (A @ v[:2].T).abs(), torch.eye(2).double(), rtol=0, atol=5e-3
            ),
            name,
        )
        torch.testing.assert_close(
            (B.T @ u[:, 2:4]).abs(), torch.eye(2).double(), rtol=0, atol=5e-3
        )


@pytest.mark.parametrize("init", ["eva", "lora_ga"])
def test_training_without_the_data_is_refused_and_evaluation_is_the_base(init: str) -> None:
    model = tiny_models.build("llama")
    given = tiny_models.inputs(model)
    before = tiny_models.outputs(model, given)
    attach(model, LoraSpec(init=init))
    assert tiny_models.outputs(model, given).equal(before)
    model.train()
    with pytest.raises(StateError, match="initialise_from_data"):
        model(**given)
    model.eval()
    with pytest.raises(DataError, match="0 batches"):
        initialise_from_data(model, "default", [])
    initialise_from_data(model, "default", _batches(model))
    model.train()
    model(**given)
    with pytest.raises(StateError, match="does not wait"):
        initialise_from_data(model, "default", _batches(model))


def test_an_adapter_that_starts_otherwise_takes_no_data() -> None:
    model = tiny_models.build("llama")
    attach(model, LoraSpec(init="pissa"))
    with pytest.raises(StateError, match="pissa"):
        initialise_from_data(model, "default", _batches(model))


@pytest.mark.parametrize(
    ("architecture", "init", "changes", "found"),
    [
        ("vit", "pissa", {"targets": ("projection",)}, "conv2d"),
        ("llama", "olora", {"targets": ("embed_tokens",)}, "embedding"),
        ("llama", "eva", {"targets": ("embed_tokens",)}, "embedding"),
        ("llama", "pissa", {"targets": ("v_proj",), "r": 17}, "r=17"),
        ("llama", "lora_ga", {"targets": ("v_proj",), "r": 9}, "r=9"),
        ("llama", "eva", {"targets": ("v_proj",), "r": 33}, "r=33"),
    ],
)
def test_what_cannot_be_is_refused_at_plan_time(
    architecture: str, init: str, changes: dict[str, Any], found: str
) -> None:
    with pytest.raises(SpecError) as caught:
        plan_adapter(tiny_models.build(architecture), LoraSpec(init=init, **changes))
    assert caught.value.where == "init"
    assert found in str(caught.value)


@_inits
@_updates_of
def test_a_state_goes_back_bit_for_bit(init: str, update: str) -> None:
    spec = _spec("llama", init=init, update=update)
    model = tiny_models.build("llama")
    given = tiny_models.inputs(model)
    method = LoraMethod(spec)
    method.attach(model)
    if init in ("eva", "lora_ga"):
        initialise_from_data(model, "default", _batches(model))
    shake(model)
    live = tiny_models.outputs(model, given)
    state = {n: t.detach().clone() for n, t in method.state(model).items()}
    groups = method.param_groups(model, 1e-3)
    assert {id(p) for g in groups for p in g["params"]} == {
        id(p) for p in trainable(model).values()
    }
    fresh = tiny_models.build("llama")
    method.attach(fresh)
    method.load(fresh, state)
    assert tiny_models.outputs(fresh, given).equal(live)
    fresh.train()
    fresh(**given)


def test_rows_of_a_batch_mix_starts_and_plain_adapters() -> None:
    model = tiny_models.build("llama")
    given = tiny_models.inputs(model, batch=4)
    _start(model, _spec("llama", init="pissa"), "pissa")
    shake(model)
    attach_learned(model, _spec("llama"), "plain", seed=9)
    _start(model, _spec("llama", init="olora", update="dora"), "olora")
    shake(model, seed=11)
    rows = ["olora", "pissa", None, "plain"]
    alone = []
    for i, row in enumerate(rows):
        with use(model, row):
            alone.append(tiny_models.outputs(model, given)[i])
    with use(model, rows):
        mixed = tiny_models.outputs(model, given)
    for i, one in enumerate(alone):
        torch.testing.assert_close(mixed[i], one, rtol=1e-5, atol=2e-6)


def test_the_saved_delta_is_the_difference_to_the_start() -> None:
    model = tiny_models.build("llama")
    _start(model, _spec("llama", init="pissa"))
    shake(model)
    adapter = adapter_from_model(model)
    for (name, factors), update in zip(adapter.factors.items(), _updates(model), strict=True):
        assert update.start_A is not None
        assert update.start_B is not None
        moved = update.lora_B @ update.lora_A - update.start_B @ update.start_A
        torch.testing.assert_close(
            factors.delta(), update.scaling * moved.detach(), rtol=1e-4, atol=1e-5
        )
        assert factors.r == 2 * update.lora_A.shape[0], name
