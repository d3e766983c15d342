"""Attach is the identity, counts what it planned, freezes the rest, and detach undoes it all."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import tiny_models
from law_cases import CASES, Case, grid
from learned import (
    assert_same_bits,
    attach_learned,
    bits,
    expected_warning,
    module_ids,
    shake,
    trainable,
)
from lorakit.adapters.attach import active_adapter, attach, detach, use
from lorakit.adapters.plan import plan_adapter
from lorakit.adapters.spec import LoraSpec
from lorakit.errors import StateError


@grid()
def test_attach_is_the_identity(case: Case) -> None:
    model = tiny_models.build(case.architecture)
    given = tiny_models.inputs(model)
    before = tiny_models.outputs(model, given)
    with expected_warning(case.warns):
        attach(model, case.make(), name="new")
    assert tiny_models.outputs(model, given).equal(before)
    assert active_adapter(model) == "new"


@grid()
def test_the_planned_count_is_the_real_count(case: Case) -> None:
    model = tiny_models.build(case.architecture)
    base = sum(p.numel() for p in model.parameters())
    with expected_warning(case.warns):
        plan = plan_adapter(model, case.make())
    assert not [n for n, _ in model.named_parameters() if "lora" in n]
    attach(model, plan)
    real = sum(p.numel() for p in trainable(model).values())
    assert plan.num_params() == real > 0
    # Nothing of the base is counted twice or lost.
    assert sum(p.numel() for p in model.parameters()) == base + real


@grid()
def test_only_the_adapter_is_trainable_and_every_number_learns(case: Case) -> None:
    model = tiny_models.build(case.architecture)
    attach_learned(model, case.make(), warns=case.warns)
    result = model(**tiny_models.inputs(model))
    tensors = [t for t in result.values() if isinstance(t, torch.Tensor) and t.requires_grad]
    sum((t * torch.randn_like(t)).sum() for t in tensors).backward()
    without = [n for n, p in trainable(model).items() if p.grad is None or not p.grad.any()]
    # A key's bias moves all scores of a query alike: softmax does not see it.
    assert [n for n in without if "key" not in n and "k_proj" not in n] == []
    assert [
        n for n, p in model.named_parameters() if p.grad is not None and n not in trainable(model)
    ] == []


@grid()
def test_an_adapter_that_learned_changes_the_output_and_none_is_the_base(case: Case) -> None:
    model = tiny_models.build(case.architecture)
    given = tiny_models.inputs(model)
    before = tiny_models.outputs(model, given)
    attach_learned(model, case.make(), warns=case.warns)
    live = tiny_models.outputs(model, given)
    assert (live - before).abs().max() > 1e-4
    with use(model, None):
        assert tiny_models.outputs(model, given).equal(before)
    assert tiny_models.outputs(model, given).equal(live)


@grid()
def test_detach_gives_back_the_very_modules(case: Case) -> None:
    model = tiny_models.build(case.architecture)
    first = next(model.parameters())
    first.requires_grad_(False)
    grads = {n: p.requires_grad for n, p in model.named_parameters()}
    ids, values = module_ids(model), bits(model)
    parameter_ids = {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)}
    keys = list(model.state_dict())
    attach_learned(model, case.make(), "one", warns=case.warns)
    attach_learned(model, case.make(r=2), "two", seed=8, warns=case.warns)
    detach(model, "one")
    assert active_adapter(model) == "two"
    detach(model, "two")
    assert module_ids(model) == ids
    assert {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)} == parameter_ids
    assert {n: p.requires_grad for n, p in model.named_parameters()} == grads
    assert_same_bits(values, bits(model))
    assert list(model.state_dict()) == keys
    assert "_lorakit" not in vars(model)


@grid("llama-all-linear", "gpt2-parts-ranks", "bert-embeddings", "vit-everything", "t5-embeddings")
def test_two_adapters_do_not_touch_each_other(case: Case) -> None:
    given = tiny_models.inputs(tiny_models.build(case.architecture))
    alone = {}
    for name, seed in (("one", 7), ("two", 8)):
        model = tiny_models.build(case.architecture)
        attach_learned(model, case.make(), name, seed=seed, warns=case.warns)
        alone[name] = tiny_models.outputs(model, given)
    both = tiny_models.build(case.architecture)
    torch.manual_seed(0)
    attach_learned(both, case.make(), "one", seed=7, warns=case.warns)
    state = {n: p.detach().clone() for n, p in both.named_parameters() if p.requires_grad}
    attach_learned(both, case.make(), "two", seed=8, warns=case.warns)
    after = dict(both.named_parameters())
    assert all(after[n].equal(v) for n, v in state.items())
    # A is drawn anew for the second adapter, so only the first is comparable by value.
    torch.manual_seed(0)
    model = tiny_models.build(case.architecture)
    attach_learned(model, case.make(), "one", seed=7, warns=case.warns)
    with use(both, "one"):
        torch.testing.assert_close(
            tiny_models.outputs(both, given), tiny_models.outputs(model, given), rtol=0, atol=0
        )
    with use(both, "two"):
        assert not tiny_models.outputs(both, given).equal(tiny_models.outputs(model, given))


def test_nested_use_restores_also_after_an_error() -> None:
    model = tiny_models.build("llama")
    attach_learned(model, LoraSpec(), "one")
    attach_learned(model, LoraSpec(), "two", seed=8)
    assert active_adapter(model) == "two"
    with use(model, "one"):
        with use(model, None):
            assert active_adapter(model) is None
            with use(model, ["one", None]):
                assert active_adapter(model) == ("one", None)
            assert active_adapter(model) is None
        assert active_adapter(model) == "one"
        with pytest.raises(ZeroDivisionError), use(model, None):
            raise ZeroDivisionError
        assert active_adapter(model) == "one"
    assert active_adapter(model) == "two"


def test_a_refused_use_changes_nothing() -> None:
    model = tiny_models.build("llama")
    attach_learned(model, LoraSpec(), "one")
    for wrong in ("on", ["one", "tow"], []):
        with pytest.raises(StateError), use(model, wrong):
            pytest.fail("never entered")
        assert active_adapter(model) == "one"
    with pytest.raises(StateError, match="one"), use(model, "on"):
        pass


def test_use_without_an_adapter_says_so() -> None:
    with pytest.raises(StateError, match="no adapter"), use(tiny_models.build("llama"), "one"):
        pass


def test_a_name_is_taken_once_and_cannot_be_a_path() -> None:
    model = tiny_models.build("llama")
    attach(model, LoraSpec(), name="one")
    ids = module_ids(model)
    for wrong in ("one", "../x", "a/b", "", ".hidden", "a\\b", "a b", "x\n"):
        with pytest.raises(StateError):
            attach(model, LoraSpec(), name=wrong)
        assert module_ids(model) == ids


@pytest.mark.parametrize(
    "name", ["keys", "v1.2", "training", "forward", "a-b_c", "default", "weight"]
)
def test_any_ordinary_name_works(name: str) -> None:
    # Names become keys of nn.ModuleDict, which has methods of its own and forbids dots.
    model = tiny_models.build("bert")
    given = tiny_models.inputs(model)
    before = tiny_models.outputs(model, given)
    spec = LoraSpec(bias="all", also_train=("pooler",))
    attach_learned(model, spec, name)
    live = tiny_models.outputs(model, given)
    assert not live.equal(before)
    with use(model, [name, None, name]):
        mixed = tiny_models.outputs(model, given)
    torch.testing.assert_close(mixed[0], live[0])
    torch.testing.assert_close(mixed[1], before[1])
    detach(model, name)
    assert tiny_models.outputs(model, given).equal(before)


def test_detach_all_and_detach_of_nothing() -> None:
    model = tiny_models.build("t5")
    ids = module_ids(model)
    with pytest.raises(StateError):
        detach(model)
    attach(model, LoraSpec(targets="all-linear"), name="one")
    attach(model, LoraSpec(targets="qv", also_train=("decoder.final_layer_norm",)), name="two")
    with pytest.raises(StateError, match="one"):
        detach(model, "onee")
    detach(model)
    assert module_ids(model) == ids
    with pytest.raises(StateError):
        detach(model)


def test_detaching_the_active_adapter_leaves_no_dangling_name() -> None:
    model = tiny_models.build("llama")
    given = tiny_models.inputs(model)
    before = tiny_models.outputs(model, given)
    attach_learned(model, LoraSpec(), "one")
    attach_learned(model, LoraSpec(), "two", seed=8)
    detach(model, "two")
    assert active_adapter(model) in (None, "one")
    tiny_models.outputs(model, given)
    detach(model)
    assert tiny_models.outputs(model, given).equal(before)


@pytest.mark.parametrize(
    "name", ["llama-all-linear", "gpt2-parts-ranks", "vit-everything", "t5-all-linear"]
)
def test_a_deep_copy_stands_alone(name: str) -> None:
    case = CASES[name]
    model = tiny_models.build(case.architecture)
    given = tiny_models.inputs(model)
    attach_learned(model, case.make(), "one")
    live = tiny_models.outputs(model, given)
    clone = copy.deepcopy(model)
    assert tiny_models.outputs(clone, given).equal(live)
    with use(clone, None):
        assert not tiny_models.outputs(clone, given).equal(live)
        # The original does not follow its copy.
        assert tiny_models.outputs(model, given).equal(live)
    detach(clone)
    assert active_adapter(model) == "one"
    assert tiny_models.outputs(model, given).equal(live)


def test_a_model_shared_module_is_wrapped_once_at_all_its_places() -> None:
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = torch.nn.Linear(6, 6)
            self.second = self.first
            self.more = torch.nn.ModuleList([self.first, torch.nn.Linear(6, 4)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.more[1](self.second(self.first(x)))

    model = Twice().eval()
    ids = module_ids(model)
    plan = attach(model, LoraSpec(targets=("first", "1"), r=2, alpha=3.0))
    assert model.first is model.second is model.more[0]
    assert id(model.first) != ids["first"]
    assert plan.num_params() == sum(p.numel() for p in trainable(model).values())
    detach(model)
    assert module_ids(model) == ids


def test_dropout_acts_in_train_mode_only_and_on_the_branch_only() -> None:
    model = tiny_models.build("llama")
    given = tiny_models.inputs(model)
    before = tiny_models.outputs(model, given)
    attach_learned(model, LoraSpec(dropout=0.5, targets="all-linear"))
    live = tiny_models.outputs(model, given)
    assert tiny_models.outputs(model, given).equal(live)
    model.train()
    one, two = tiny_models.outputs(model, given), tiny_models.outputs(model, given)
    assert not one.equal(two)
    with use(model, None):
        assert tiny_models.outputs(model, given).equal(before)
    model.eval()
    assert tiny_models.outputs(model, given).equal(live)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name",
    [
        "llama-all-linear",
        "gpt2-all-linear",
        "gpt2-parts-ranks",
        "vit-conv",
        "llama-embedding",
        "opt-bias-all",
        "llama-norms-beside",
    ],
)
def test_a_half_precision_base_keeps_factors_in_float32(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    model = tiny_models.build(case.architecture).to(dtype)
    given = tiny_models.inputs(model)
    if "pixel_values" in given:
        given["pixel_values"] = given["pixel_values"].to(dtype)
    before = tiny_models.outputs(model, given)
    assert before.dtype == dtype
    with expected_warning(case.warns):
        attach(model, case.make())
    factors = {n: p for n, p in trainable(model).items() if "lora_" in n}
    assert {p.dtype for p in factors.values()} == {torch.float32}
    assert tiny_models.outputs(model, given).equal(before)
    shake(model)
    live = tiny_models.outputs(model, given)
    assert live.dtype == dtype
    assert not live.equal(before)
    # The same model in float32 says the same, to the precision of the activations.
    reference = copy.deepcopy(model).float()
    given32 = {k: v.float() if v.is_floating_point() else v for k, v in given.items()}
    wide = tiny_models.outputs(reference, given32)
    assert (wide - live.float()).norm() < 0.05 * wide.norm()


def test_planning_works_on_the_meta_device_and_changes_nothing() -> None:
    real = tiny_models.build("phi3")
    with torch.device("meta"):
        empty = tiny_models.build("phi3")
    spec = LoraSpec(targets="all-linear", r=3)
    ids = module_ids(empty)
    assert plan_adapter(empty, spec).num_params() == plan_adapter(real, spec).num_params()
    assert module_ids(empty) == ids


def test_a_plan_of_another_model_is_refused() -> None:
    plan = plan_adapter(tiny_models.build("llama"), LoraSpec(targets="all-linear"))
    other = tiny_models.build("qwen3")
    ids = module_ids(other)
    # Same names, other shapes.
    with pytest.raises(Exception, match=r"q_proj|shape"):
        attach(other, plan)
    assert module_ids(other) == ids


def test_a_second_attach_freezes_the_first_adapter() -> None:
    model = tiny_models.build("llama")
    attach(model, LoraSpec(), name="one")
    first = set(trainable(model))
    attach(model, LoraSpec(), name="two")
    second = set(trainable(model))
    assert first
    assert second
    assert not first & second


def test_an_attach_that_fails_half_way_changes_nothing() -> None:
    # "one" trains the key's bias as a whole; "two" wants a low-rank update of query and key.
    model = tiny_models.build("bert")
    attach(model, LoraSpec(targets=("query",), bias="all"), name="one")
    ids, trains = module_ids(model), set(trainable(model))
    with pytest.raises(StateError):
        attach(model, LoraSpec(targets=("query", "key")), name="two")
    assert module_ids(model) == ids
    assert set(trainable(model)) == trains
    assert active_adapter(model) == "one"


def test_a_first_attach_that_fails_leaves_a_plain_trainable_model() -> None:
    model = tiny_models.build("llama")
    plan = plan_adapter(tiny_models.build("bert"), LoraSpec(targets=("query",), bias="all"))
    ids = module_ids(model)
    with pytest.raises(StateError):
        attach(model, plan)
    assert module_ids(model) == ids
    assert all(p.requires_grad for p in model.parameters())
    assert "_lorakit" not in vars(model)


def test_a_model_with_an_adapter_can_be_pickled() -> None:
    model = tiny_models.build("llama")
    attach(model, LoraSpec(r=3, alpha=7, targets="qv"))
    shake(model)
    given = tiny_models.inputs(model)
    copied = pickle.loads(pickle.dumps(model))
    assert tiny_models.outputs(copied, given).equal(tiny_models.outputs(model, given))
