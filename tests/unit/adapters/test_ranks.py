from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import tiny_models
from learned import attach_learned
from lorakit.adapters.adapter import Adapter
from lorakit.adapters.attach import attach
from lorakit.adapters.bind import bind_adapter
from lorakit.adapters.budget import budget_params, equal_rank
from lorakit.adapters.data_ranks import choose_ranks
from lorakit.adapters.plan import plan_adapter
from lorakit.adapters.prune import prune_adapter
from lorakit.adapters.ranks import MOST, allocate
from lorakit.adapters.spec import LoraSpec
from lorakit.errors import AdapterFileError, DataError, LorakitError, SpecError, StateError
from lorakit.formats.peft import save_adapter


def _batches(model, count=3):
    batches = [tiny_models.inputs(model, seed=seed) for seed in range(count)]
    return [{**batch, "labels": batch["input_ids"]} for batch in batches]


@pytest.mark.parametrize(
    ("budget", "num_params"),
    [
        (400_000, 400_000),
        ("400000", 400_000),
        ("400_000", 400_000),
        ("400k", 400_000),
        ("1.5M", 1_500_000),
        ("1.5 MB", 375_000),
        ("64 KiB", 16_384),
        ("1.5 gb", 375_000_000),
    ],
)
def test_a_budget_is_parameters_or_bytes(budget, num_params):
    assert budget_params(budget) == num_params


@pytest.mark.parametrize("budget", ["", "many", "4 apples", "-3", "1e6", 0, "0.1 B", True])
def test_a_budget_that_says_nothing_is_refused(budget):
    with pytest.raises(SpecError, match="budget"):
        budget_params(budget)


@pytest.mark.parametrize("budget", ["1.5B", "1.5 b", "1500B"])
def test_a_lone_b_is_asked_back(budget):
    """Beside k and M it reads as billions of parameters; beside kB and MB as bytes."""
    with pytest.raises(SpecError, match="billions of parameters, or bytes") as caught:
        budget_params(budget)
    if budget == "1.5B":
        assert '"1500M" for parameters, "0.0015 kB" for bytes' in str(caught.value)


def test_the_equal_rank_is_the_largest_within_the_budget():
    model = tiny_models.build("llama")
    for update in ("lora", "dora"):
        plans = {
            r: plan_adapter(model, LoraSpec(r=r, targets="all-linear", update=update))
            for r in (1, 4, 5)
        }
        exact = plans[5].num_params()
        spec = LoraSpec(r="auto", budget=exact, targets="all-linear", update=update)
        assert {site.r for site in plan_adapter(model, spec).sites} == {5}
        spec = LoraSpec(r="auto", budget=exact - 1, targets="all-linear", update=update)
        plan = plan_adapter(model, spec)
        assert {site.r for site in plan.sites} == {4}
        assert plan.spec.r == 4
        assert plan.spec.budget is None
        with pytest.raises(SpecError, match="rank 1 at every"):
            equal_rank(plan.sites, plans[1].num_params() - 1)


def test_a_spec_says_its_ranks_once():
    for wrong in (
        {"r": "auto"},
        {"r": 4, "budget": 100},
        {"r": 4, "ranks": "eva"},
        {"r": "auto", "budget": 100, "rank_pattern": {"q_proj": 3}},
        {"r": "auto", "budget": 100, "alpha_pattern": {"q_proj": 3.0}},
        {"r": "auto", "budget": 100, "ranks": "random"},
    ):
        with pytest.raises(SpecError):
            LoraSpec(**wrong)
    spec = LoraSpec(r="auto", budget="1 MB", ranks="gradient")
    assert LoraSpec.from_dict(spec.to_dict()) == spec


def test_ranks_that_wait_for_data_are_not_attached():
    model = tiny_models.build("llama")
    with pytest.raises(SpecError, match="wait for data"):
        attach(model, LoraSpec(r="auto", budget=5000, ranks="eva"))


def test_directions_are_bought_best_gain_per_parameter_first():
    model = tiny_models.build("llama")
    sites = plan_adapter(model, LoraSpec(r=4, targets=("q_proj", "k_proj"))).sites
    budget = sum(site.num_params() for site in sites)
    # One site has everything to gain, the others nothing.
    rich = sites[1].name
    gains = {site.name: torch.zeros(40, dtype=torch.float64) for site in sites}
    gains[rich] = torch.linspace(2, 1, 40, dtype=torch.float64)
    ranks = allocate(sites, gains, budget)
    least = sum(site.num_params_at(1) for site in sites)
    assert ranks[rich] == 1 + (budget - least) // sum(sites[1].shape)
    spent = sum(site.num_params_at(ranks[site.name]) for site in sites)
    assert budget - max(sum(site.shape) for site in sites) < spent <= budget
    assert max(ranks.values()) <= 4 * MOST
    # q_proj is 32 + 32, k_proj 16 + 32: of equal gains the cheaper one is bought.
    even = {site.name: torch.ones(40, dtype=torch.float64) for site in sites}
    ranks = allocate(sites, even, budget)
    cheap = [site.name for site in sites if sum(site.shape) == 48]
    assert min(ranks[name] for name in cheap) > max(
        rank for name, rank in ranks.items() if name not in cheap
    )


@pytest.mark.parametrize("how", ["eva", "gradient"])
@pytest.mark.parametrize(
    ("architecture", "targets"),
    [("llama", "all-linear"), ("gpt2", ("c_attn.q", "c_attn.v", "c_fc"))],
)
def test_data_spends_the_budget_and_leaves_the_model_as_it_was(how, architecture, targets):
    model = tiny_models.build(architecture)
    batches = _batches(model)
    before = tiny_models.outputs(model, tiny_models.inputs(model))
    budget = plan_adapter(model, LoraSpec(r=4, targets=targets)).num_params()
    spec = LoraSpec(r="auto", budget=budget, ranks=how, targets=targets, alpha=10.0)
    state = torch.get_rng_state()
    chosen = choose_ranks(model, spec, batches)
    assert torch.get_rng_state().equal(state)
    assert tiny_models.outputs(model, tiny_models.inputs(model)).equal(before)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert chosen.num_batches == 3
    assert choose_ranks(model, spec, batches).ranks == chosen.ranks
    plan = plan_adapter(model, chosen.spec)
    assert {site.name: site.r for site in plan.sites} == chosen.ranks
    assert 0.9 * budget < plan.num_params() <= budget
    assert len(set(chosen.ranks.values())) > 1
    # Every site keeps the scaling that the equal rank has.
    assert [site.scaling for site in plan.sites] == pytest.approx([10.0 / 4] * len(plan.sites))
    attach(model, chosen.spec)


def test_inputs_that_spread_more_get_more():
    model = tiny_models.build("llama")
    with torch.no_grad():
        # One layer's inputs lie on a line: a second direction of it gains nothing.
        model.model.layers[0].input_layernorm.weight[1:] = 0.0
    budget = plan_adapter(model, LoraSpec(r=4, targets=("q_proj",))).num_params()
    spec = LoraSpec(r="auto", budget=budget, ranks="eva", targets=("q_proj",))
    ranks = choose_ranks(model, spec, _batches(model)).ranks
    assert ranks == {
        "model.layers.0.self_attn.q_proj": 1,
        "model.layers.1.self_attn.q_proj": 7,
    }


def test_what_cannot_choose_is_refused():
    model = tiny_models.build("llama")
    with pytest.raises(SpecError, match="ranks are given"):
        choose_ranks(model, LoraSpec(r=4), [])
    spec = LoraSpec(r="auto", budget=1000, ranks="gradient", targets=("q_proj",))
    with pytest.raises(DataError, match="says nothing about this layer"):
        choose_ranks(model, spec, [])
    wide = LoraSpec(r="auto", budget=2000, ranks="eva", targets=("q_proj", "embed_tokens"))
    # Before any data is read, too.
    for refuses in (lambda: choose_ranks(model, wide, []), lambda: plan_adapter(model, wide)):
        with pytest.raises(SpecError, match="linear layers only"):
            refuses()
    attach(model, LoraSpec(r=2))
    with pytest.raises(StateError, match="before anything is attached"):
        choose_ranks(model, spec, [])


def test_a_budget_beyond_every_full_rank_is_refused_with_the_largest():
    model = tiny_models.build("llama")
    spec = {"r": "auto", "targets": ("q_proj", "k_proj")}
    # q is 32 x 32, k 16 x 32; there are two layers.
    most = 2 * (32 * (32 + 32) + 16 * (32 + 16))
    for ranks in ("uniform", "gradient", "adalora"):
        with pytest.raises(SpecError, match=f"at most {most:,} parameters"):
            plan_adapter(model, LoraSpec(budget=most + 1, ranks=ranks, **spec))
    assert plan_adapter(model, LoraSpec(budget=most // 2, **spec)).num_params() <= most // 2


def _learned(tmp_path, architecture="llama", **spec):
    model = tiny_models.build(architecture)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attach_learned(model, LoraSpec(**{"r": 6, "alpha": 9.0, "targets": "all-linear", **spec}))
    save_adapter(model, tmp_path / "adapter")
    return Adapter.load(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("architecture", "spec"),
    [
        ("llama", {}),
        ("llama", {"scaling": "alpha/sqrt(r)", "rank_pattern": {"v_proj": 3}}),
        ("gpt2", {"targets": ("c_attn.q", "c_attn.v", "c_fc")}),
        ("vit", {"targets": ("projection", "q_proj")}),
        ("bert", {"targets": ("word_embeddings", "query")}),
    ],
)
def test_pruning_makes_the_error_it_says(tmp_path, architecture, spec):
    adapter = _learned(tmp_path, architecture, **spec)
    budget = adapter.num_params() // 2
    pruned = prune_adapter(adapter, budget=budget)
    smaller = pruned.adapter
    assert smaller.num_params() <= budget
    assert pruned.num_params == (adapter.num_params(), smaller.num_params())
    lost = whole = 0.0
    for site, factors in adapter.factors.items():
        small = smaller.factors[site]
        assert (factors.r, small.r) == pruned.ranks[site]
        assert small.scaling == factors.scaling
        delta = factors.delta()
        error = float((delta - small.delta()).norm())
        assert error / float(delta.norm()) == pytest.approx(pruned.errors[site], abs=1e-4)
        # Nothing of this rank is nearer: the tail of the spectrum.
        tail = torch.linalg.svdvals(
            factors.scaling * factors.B.flatten(1).double() @ factors.A.flatten(1).double()
        )[small.r :]
        assert error == pytest.approx(float(tail.norm()), rel=1e-3, abs=1e-5)
        lost, whole = lost + error**2, whole + float(delta.norm()) ** 2
    assert pruned.error == pytest.approx((lost / whole) ** 0.5, rel=1e-4)
    # What is written is what was pruned, and says so.
    smaller.save(tmp_path / "pruned")
    back = Adapter.load(tmp_path / "pruned")
    assert {n: f.r for n, f in back.factors.items()} == {n: f.r for n, f in smaller.factors.items()}
    for site, factors in back.factors.items():
        torch.testing.assert_close(factors.delta(), smaller.factors[site].delta())
    assert back.passport["pruned_from"]["num_params"] == adapter.num_params()


def test_keeping_everything_changes_nothing(tmp_path):
    adapter = _learned(tmp_path)
    for pruned in (prune_adapter(adapter, energy=1.0), prune_adapter(adapter, budget="10M")):
        assert pruned.error < 1e-6
        for site, factors in adapter.factors.items():
            assert pruned.adapter.factors[site].A.equal(factors.A)
            assert pruned.adapter.factors[site].B.equal(factors.B)


def test_an_energy_keeps_the_fewest_directions_that_hold_it(tmp_path):
    adapter = _learned(tmp_path)
    pruned = prune_adapter(adapter, energy=0.8)
    assert 1 - pruned.error**2 >= 0.8
    assert pruned.num_params[1] < pruned.num_params[0]
    directions = sum(after for _, after in pruned.ranks.values())
    squares = (
        torch.cat(
            [
                torch.linalg.svdvals(f.scaling * f.B.double() @ f.A.double())[: f.r].square()
                for f in adapter.factors.values()
            ]
        )
        .sort(descending=True)
        .values
    )
    assert float(squares[: directions - 1].sum() / squares.sum()) < 0.8


def test_pruning_refuses_what_cannot_be(tmp_path):
    adapter = _learned(tmp_path)
    for wrong in (
        {},
        {"budget": 1000, "energy": 0.5},
        {"energy": 0.0},
        {"energy": 1.5},
        {"budget": 10},
        {"budget": "ten"},
    ):
        with pytest.raises(LorakitError):
            prune_adapter(adapter, **wrong)


def _stored_as(adapter, dtype):
    factors = {
        name: replace(f, A=f.A.to(dtype), B=f.B.to(dtype)) for name, f in adapter.factors.items()
    }
    return replace(adapter, factors=factors)


def test_the_error_of_narrow_factors_is_that_of_what_is_written(tmp_path):
    adapter = _stored_as(_learned(tmp_path), torch.bfloat16)
    pruned = prune_adapter(adapter, energy=0.95)
    pruned.adapter.save(tmp_path / "pruned")
    back = Adapter.load(tmp_path / "pruned")
    lost = whole = 0.0
    rounding = False
    for site, factors in adapter.factors.items():
        small = back.factors[site]
        assert small.A.dtype == small.B.dtype == torch.bfloat16
        delta, left = (f.scaling * f.B.double() @ f.A.double() for f in (factors, small))
        error = float((delta - left).norm())
        assert pruned.errors[site] == pytest.approx(error / float(delta.norm()), rel=1e-9)
        tail = float(torch.linalg.svdvals(delta)[small.r : factors.r].norm())
        rounding |= error > tail * (1 + 1e-6)
        lost, whole = lost + error**2, whole + float(delta.norm()) ** 2
    assert rounding
    assert pruned.error == pytest.approx((lost / whole) ** 0.5, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_budget_of_bytes_is_counted_in_the_dtype_that_is_written(tmp_path, dtype):
    adapter = _stored_as(_learned(tmp_path), dtype)
    pruned = prune_adapter(adapter, budget="8 kB")
    pruned.adapter.save(tmp_path / "pruned")
    tensors = load_file(tmp_path / "pruned" / "adapter_model.safetensors")
    num_bytes = sum(t.numel() * t.itemsize for t in tensors.values())
    # The next direction costs at most 80 numbers (down_proj: 48 in, 32 out).
    assert 8000 - 80 * dtype.itemsize < num_bytes <= 8000


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_pruning_refuses_numbers_that_are_not_finite(tmp_path, number):
    adapter = _learned(tmp_path)
    adapter.factors["model.layers.1.mlp.up_proj"].A[0, 0] = number
    with pytest.raises(AdapterFileError, match=r"not finite: model\.layers\.1\.mlp\.up_proj A"):
        prune_adapter(adapter, energy=0.5)


def test_a_pruned_dora_keeps_its_magnitudes(tmp_path):
    adapter = _learned(tmp_path, update="dora", targets="qv")
    pruned = prune_adapter(adapter, budget=adapter.num_params() - 200).adapter
    assert pruned.num_params() <= adapter.num_params() - 200
    model = tiny_models.build("llama")
    bind_adapter(model, pruned)
    for site, factors in pruned.factors.items():
        assert factors.magnitude is not None
        assert factors.magnitude.equal(adapter.factors[site].magnitude)


def test_the_notes_say_what_a_budget_bought():
    model = tiny_models.build("llama")
    spec = LoraSpec(r="auto", budget=900, ranks="eva", targets=("k_proj",))
    notes = plan_adapter(model, spec).notes
    assert notes[0].startswith("r: auto, rank 9 everywhere fits the budget of 900 parameters")
    assert "ranks: eva spends it" in notes[0]
