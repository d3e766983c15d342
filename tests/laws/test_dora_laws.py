"""DoRA's definition, and a kept norm that never outlives what it was computed from."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import tiny_models
from law_cases import CASES, Case, grid
from learned import attach_learned
from lorakit.adapters.attach import attach, detach, use
from lorakit.adapters.attachments import adapted_layers
from lorakit.adapters.fold import merge, unmerge
from lorakit.adapters.spec import LoraSpec
from lorakit.errors import SpecError
from lorakit.layers.adapted import AdaptedLayer

_DORA = tuple(name for name, case in CASES.items() if case.spec.get("update") == "dora")


def _weight_by_definition(layer: AdaptedLayer) -> Tensor:
    """M (W0 + s B A) / ||W0 + s B A|| in float64, row by row, in the base's layout."""
    weight = layer.base.get_parameter("weight").detach().double()
    branch = layer.branch_of("default")
    assert branch is not None
    transposed = layer.kind.name in ("conv1d", "embedding")
    matrix = (weight.T if transposed else weight.flatten(1)).clone()
    for update in branch.updates():
        owned = list(range(matrix.shape[0]))
        if update.rows is not None:
            rows = update.rows
            owned = [
                rows.start + i * rows.step + j
                for i in range(rows.count)
                for j in range(rows.length)
            ]
        product = update.lora_B.detach().double().flatten(
            1
        ) @ update.lora_A.detach().double().flatten(1)
        whole = matrix[owned] + update.scaling * product
        assert update.magnitude is not None
        m = update.magnitude.detach().double()
        matrix[owned] = m[:, None] * whole / whole.norm(dim=1, keepdim=True)
    return matrix.T if transposed else matrix.reshape(weight.shape)


@grid(*_DORA)
def test_the_merged_weight_is_the_definition(case: Case) -> None:
    model = tiny_models.build(case.architecture)
    attach_learned(model, case.make(), warns=case.warns)
    wanted = {layer.name: _weight_by_definition(layer) for layer in adapted_layers(model)}
    merge(model)
    assert wanted
    for layer in adapted_layers(model):
        found = layer.base.get_parameter("weight").double()
        torch.testing.assert_close(found, wanted[layer.name], rtol=1e-5, atol=1e-6)


def _llama(**changes: object) -> tuple[nn.Module, dict[str, Tensor]]:
    model = tiny_models.build("llama")
    given = tiny_models.inputs(model)
    attach_learned(model, LoraSpec(update="dora", targets="all-linear", r=3, alpha=7.5, **changes))
    return model, given


def _fresh(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    """The output with nothing kept: a deep copy starts with empty caches."""
    return tiny_models.outputs(copy.deepcopy(model), given)


def _first(model: nn.Module) -> AdaptedLayer:
    return next(iter(adapted_layers(model)))


def _update(model: nn.Module):
    branch = _first(model).branch_of("default")
    assert branch is not None
    return branch.updates()[0]


def _step(model: nn.Module) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.05)
    model(**tiny_models.inputs(model)).logits.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def _train_and_back(model: nn.Module) -> None:
    model.train()
    _step(model)
    model.eval()


def _step_through_data(model: nn.Module) -> None:
    # Writing through .data moves no version counter; the switch out of train mode forgets anyway.
    model.train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05)
    model.eval()


def _load_state(model: nn.Module) -> None:
    changed = {n: t + 0.1 if "lora_" in n else t for n, t in model.state_dict().items()}
    model.load_state_dict(changed)


def _load_state_by_assignment(model: nn.Module) -> None:
    changed = {n: t + 0.1 if "lora_" in n else t for n, t in model.state_dict().items()}
    model.load_state_dict(changed, assign=True)


def _write_base(model: nn.Module) -> None:
    with torch.no_grad():
        _first(model).base.get_parameter("weight").mul_(1.0 + torch.rand(1, 32))


def _new_base_parameter(model: nn.Module) -> None:
    base = _first(model).base
    weight = base.get_parameter("weight").detach()
    base.register_parameter("weight", nn.Parameter(weight * torch.linspace(0.5, 2, 32)))


def _merge_and_unmerge(model: nn.Module) -> None:
    merge(model)
    with torch.no_grad():
        _update(model).lora_B.add_(0.1)
    unmerge(model)


_CHANGES: dict[str, Callable[[nn.Module], None]] = {
    "a step in eval mode": _step,
    "a step in train mode": _train_and_back,
    "a write through data in train mode": _step_through_data,
    "load_state_dict": _load_state,
    "load_state_dict with assign": _load_state_by_assignment,
    "the base written in place": _write_base,
    "the base replaced": _new_base_parameter,
    "merge, change, unmerge": _merge_and_unmerge,
}


@pytest.mark.parametrize("change", _CHANGES.values(), ids=list(_CHANGES))
def test_the_kept_norm_follows_every_change(change: Callable[[nn.Module], None]) -> None:
    model, given = _llama()
    before = tiny_models.outputs(model, given)
    assert _update(model).norms._value is not None
    change(model)
    after = tiny_models.outputs(model, given)
    assert not after.equal(before)
    assert after.equal(_fresh(model, given))


def test_the_norm_is_kept_in_eval_mode_and_used() -> None:
    model, given = _llama()
    live = tiny_models.outputs(model, given)
    norms = _update(model).norms
    kept = norms._value
    assert kept is not None
    assert tiny_models.outputs(model, given).equal(live)
    assert norms._value is kept
    kept.mul_(2)
    assert not tiny_models.outputs(model, given).equal(live)


def test_the_norm_is_never_kept_while_training() -> None:
    model, given = _llama()
    tiny_models.outputs(model, given)
    model.train()
    assert _update(model).norms._value is None
    model(**given)
    assert _update(model).norms._value is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_kept_norm_follows_the_dtype(dtype: torch.dtype) -> None:
    model, given = _llama()
    tiny_models.outputs(model, given)
    model.to(dtype)
    assert tiny_models.outputs(model, given).equal(_fresh(model, given))


@pytest.mark.gpu
def test_the_kept_norm_follows_the_device() -> None:
    model, given = _llama()
    live = tiny_models.outputs(model, given)
    model.cuda()
    there = tiny_models.outputs(model, {k: v.cuda() for k, v in given.items()})
    torch.testing.assert_close(there.cpu(), live, rtol=1e-3, atol=1e-4)


def test_a_norm_kept_under_inference_mode_serves_a_backward_pass() -> None:
    model, given = _llama()
    with torch.inference_mode():
        live = model(**given).logits.clone()
    model(**given).logits.square().mean().backward()
    assert _update(model).magnitude.grad is not None
    assert tiny_models.outputs(model, given).equal(live)


def test_a_copy_and_a_pickle_keep_nothing_of_the_original() -> None:
    model, given = _llama()
    live = tiny_models.outputs(model, given)
    clone = copy.deepcopy(model)
    assert _update(clone).norms._value is None
    again = pickle.loads(pickle.dumps(_first(model)))
    assert again.branch_of("default").updates()[0].norms._value is None
    with torch.no_grad():
        _update(clone).lora_B.add_(1.0)
    assert not tiny_models.outputs(clone, given).equal(live)
    assert tiny_models.outputs(model, given).equal(live)


def test_no_gradient_flows_through_the_norm() -> None:
    layer = nn.Sequential(nn.Linear(6, 4)).double().eval()
    attach_learned(layer, LoraSpec(update="dora", targets=("0",), r=2, alpha=5.0))
    update = _update(layer)
    x, weight = torch.randn(3, 6).double(), torch.randn(3, 4).double()
    (layer(x) * weight).sum().backward()
    base = _first(layer).base
    A, B, m = (
        t.detach().clone().requires_grad_()
        for t in (update.lora_A, update.lora_B, update.magnitude)
    )
    whole = base.weight.detach() + update.scaling * B @ A
    norm = whole.detach().norm(dim=1)
    y = x @ ((m / norm)[:, None] * whole).T + base.bias.detach()
    (y * weight).sum().backward()
    for mine, reference in ((update.lora_A, A), (update.lora_B, B), (update.magnitude, m)):
        torch.testing.assert_close(mine.grad, reference.grad)


def test_plain_and_dora_adapters_share_a_batch() -> None:
    model = tiny_models.build("gpt2")
    given = tiny_models.inputs(model, batch=5)
    shape = {"targets": "all-linear", "r": 3, "alpha": 7.5}
    attach_learned(model, LoraSpec(**shape), "plain")
    attach_learned(model, LoraSpec(update="dora", **shape), "dora", seed=8)
    attach_learned(model, LoraSpec(update="dora", **{**shape, "r": 2}), "other", seed=9)
    rows = ["dora", None, "plain", "other", "dora"]
    alone = {}
    for name in set(rows):
        with use(model, name):
            alone[name] = tiny_models.outputs(model, given)
    with use(model, rows):
        mixed = tiny_models.outputs(model, given)
    for i, name in enumerate(rows):
        torch.testing.assert_close(mixed[i], alone[name][i], rtol=1e-5, atol=2e-6)
        assert all((mixed[i] - alone[n][i]).abs().max() > 1e-4 for n in alone if n != name)


def test_a_row_of_zeros_has_no_direction_and_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 5))
    with torch.no_grad():
        model[1].weight[2] = 0.0
    ids = [id(m) for m in model.modules()]
    with pytest.raises(SpecError, match="1 of 5 rows"):
        attach(model, LoraSpec(update="dora", targets=("0", "1"), r=2))
    assert [id(m) for m in model.modules()] == ids
    assert all(p.requires_grad for p in model.parameters())


def test_dropout_acts_on_the_whole_change_and_detach_ends_it() -> None:
    model, given = _llama(dropout=0.5)
    with use(model, None):
        base = tiny_models.outputs(model, given)
    live = tiny_models.outputs(model, given)
    model.train()
    torch.manual_seed(0)
    assert not tiny_models.outputs(model, given).equal(live)
    detach(model)
    assert tiny_models.outputs(model, given).equal(base)
