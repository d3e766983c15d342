"""What composing promises: sums of changes, not of factors; identity; errors that are true."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny_models
from law_cases import CASES
from learned import attach_learned, expected_warning
from lorakit.adapters.adapter import Adapter
from lorakit.adapters.attach import detach
from lorakit.adapters.bind import bind_adapter
from lorakit.adapters.composition.compose import compose, compose_parts
from lorakit.adapters.composition.recipe import Part, Recipe
from lorakit.adapters.extract import adapter_from_model
from lorakit.adapters.fold import merge
from lorakit.adapters.spec import LoraSpec
from lorakit.adapters.targets import base_modules
from lorakit.errors import AdapterFileError, BaseMismatchError, SpecError
from lorakit.formats.peft import read_adapter
from lorakit.math.sparsify import slerp_weights

# Different ranks, alphas, scalings and sites; parts of fused projections; embeddings, kernels.
PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": (
        {"targets": "qv", "r": 3, "alpha": 7.5},
        {"targets": ("q_proj", "down_proj"), "r": 5, "alpha": 2.0, "scaling": "alpha/sqrt(r)"},
    ),
    "gpt2": (
        {"targets": ("c_attn.q", "c_attn.v"), "r": 2, "rank_pattern": {"c_attn.v": 4}},
        {"targets": ("c_attn", "wpe"), "r": 3, "alpha": 5.0},
    ),
    "bloom": ({"targets": "qv", "r": 2}, {"targets": "qv", "r": 3, "alpha": 9.0}),
    "vit": (
        {"targets": ("projection", "q_proj"), "r": 3},
        {"targets": ("projection", "v_proj"), "r": 2, "alpha": 3.0},
    ),
    "bert": (
        {"targets": ("word_embeddings", "query"), "r": 3},
        {"targets": ("word_embeddings",), "r": 4, "alpha": 3.0},
    ),
}


def learned(name: str, spec: LoraSpec, *, seed: int) -> Adapter:
    model = tiny_models.build(name)
    attach_learned(model, spec, seed=seed)
    return adapter_from_model(model)


def pair(name: str) -> tuple[Adapter, Adapter]:
    one, two = PAIRS[name]
    return learned(name, LoraSpec(**one), seed=1), learned(name, LoraSpec(**two), seed=2)


def changes(adapter: Adapter, model: torch.nn.Module) -> dict[str, Tensor]:
    """Module -> what the adapter adds to its weight, float64."""
    modules = base_modules(model)
    return {
        m: adapter.delta(m, modules[m].get_parameter("weight").detach()).double()
        for m in adapter.modules()
    }


def weighted(model: torch.nn.Module, *parts: tuple[Adapter, float]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for adapter, weight in parts:
        for module, change in changes(adapter, model).items():
            total[module] = total.get(module, 0) + weight * change
    return total


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], rtol: float = 1e-6) -> None:
    assert found.keys() == wanted.keys()
    for module, change in wanted.items():
        assert float((found[module] - change).norm()) <= rtol * float(change.norm()), module


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("how", ["cat", "linear", "task_arithmetic"])
def test_the_sum_is_the_sum_of_the_changes(name: str, how: str) -> None:
    model = tiny_models.build(name)
    one, two = pair(name)
    for weights in ((0.7, 0.3), (1.0, -0.5)):
        made = compose(dict(zip((one, two), weights, strict=True)), how)
        assert_close(changes(made, model), weighted(model, (one, weights[0]), (two, weights[1])))


@pytest.mark.parametrize("name", PAIRS)
def test_the_composed_adapter_answers_as_its_bound_parts_do(name: str, tmp_path: Path) -> None:
    """Saved as PEFT writes it, read, bound: the forward pass of W0 + the weighted sum."""
    model = tiny_models.build(name)
    one, two = pair(name)
    compose({one: 0.7, two: 0.3}).save(tmp_path / "made")
    bind_adapter(model, read_adapter(tmp_path / "made"))
    given = tiny_models.inputs(model)
    found = tiny_models.outputs(model, given)
    detach(model)
    modules = base_modules(model)
    with torch.no_grad():
        for module, change in weighted(model, (one, 0.7), (two, 0.3)).items():
            modules[module].get_parameter("weight").add_(change.float())
    torch.testing.assert_close(found, tiny_models.outputs(model, given), rtol=1e-4, atol=1e-4)


IDENTITY = ["llama-qv", "gpt2-parts-ranks", "vit-conv", "llama-patterns-rslora", "bert-embeddings"]


@pytest.mark.parametrize("how", ["cat", "linear", "task_arithmetic", "svd", "ties", "magnitude"])
@pytest.mark.parametrize("case", [*IDENTITY, "llama-dora", "vit-everything", "bert-bias-lora-only"])
def test_one_adapter_at_weight_one_is_that_adapter_bit_for_bit(case: str, how: str) -> None:
    adapter = learned(CASES[case].architecture, CASES[case].make(), seed=3)
    given: dict[str, dict[str, Any]] = {
        "svd": {"r": 64},
        "ties": {"density": 1.0},
        "magnitude": {"density": 1.0},
    }
    made = compose({adapter: 1.0}, how, **given.get(how, {}))
    assert made.spec == adapter.spec
    assert made.factors.keys() == adapter.factors.keys()
    for name, factors in adapter.factors.items():
        same = made.factors[name]
        assert same.A.equal(factors.A)
        assert same.B.equal(factors.B)
        assert (same.scaling, same.alpha, same.rows) == (
            factors.scaling,
            factors.alpha,
            factors.rows,
        )
        if factors.magnitude is not None:
            assert same.magnitude is not None
            assert same.magnitude.equal(factors.magnitude)
    assert all(made.biases[n].equal(t) for n, t in adapter.biases.items())
    assert all(made.overrides[n].equal(t) for n, t in adapter.overrides.items())


def test_adapters_on_different_sites_stay_as_they_are() -> None:
    one = learned("llama", LoraSpec(r=3, alpha=7.5, targets="attention"), seed=1)
    two = learned("llama", LoraSpec(r=5, alpha=2.0, targets="mlp"), seed=2)
    made = compose({one: 1.0, two: 1.0}, "linear")
    for name, factors in {**one.factors, **two.factors}.items():
        assert made.factors[name].A.equal(factors.A)
        assert made.factors[name].B.equal(factors.B)
        assert made.factors[name].scaling == factors.scaling


def test_cat_adds_ranks_and_copies_a() -> None:
    one, two = pair("llama")
    made = compose({one: 0.7, two: 0.3})
    site = "model.layers.0.self_attn.q_proj"
    assert made.factors[site].r == 8
    assert made.factors[site].A.equal(torch.cat([one.factors[site].A, two.factors[site].A]))


def test_linear_finds_the_smallest_rank_that_holds_the_sum() -> None:
    adapter = learned("llama", LoraSpec(r=3, alpha=7.5), seed=1)
    twin = replace(adapter, passport={})
    made = compose({adapter: 0.4, twin: 0.6}, "linear")
    assert {factors.r for factors in made.factors.values()} == {3}
    model = tiny_models.build("llama")
    assert_close(changes(made, model), changes(adapter, model))


@pytest.mark.parametrize("name", PAIRS)
def test_the_error_of_svd_is_the_discarded_tail(name: str) -> None:
    model = tiny_models.build(name)
    one, two = pair(name)
    result = compose_parts([Part("one", one, 0.7), Part("two", two, 0.3)], Recipe(how="svd", r=2))
    made, wanted = changes(result.adapter, model), weighted(model, (one, 0.7), (two, 0.3))
    errors: dict[str, float] = {}
    for site in result.sites:
        module = result.adapter.factors[site.name].module
        errors[module] = errors.get(module, 0.0) + site.error**2
        assert site.r <= 2
    lost = total = 0.0
    for module, change in wanted.items():
        measured = float((made[module] - change).norm())
        assert measured == pytest.approx(errors[module] ** 0.5, rel=1e-4, abs=1e-6)
        lost, total = lost + measured**2, total + float(change.norm()) ** 2
    assert result.relative_error == pytest.approx((lost / total) ** 0.5, rel=1e-4)
    assert result.relative_error > 0.05


def test_svd_is_the_best_of_its_rank() -> None:
    one, two = pair("bloom")
    model = tiny_models.build("bloom")
    made = compose({one: 0.7, two: 0.3}, "svd", r=2)
    for name, factors in made.factors.items():
        module = factors.module
        wanted = sum(w * a.factors[name].delta().double() for a, w in ((one, 0.7), (two, 0.3)))
        tail = torch.linalg.svdvals(wanted)[2:].norm()
        assert float((factors.delta() - wanted).norm()) == pytest.approx(float(tail), rel=1e-4)
        assert module in changes(made, model)


def test_linear_is_not_the_average_of_factors() -> None:
    """PEFT's linear sums sqrt-weighted factors, so cross terms B1 A2 appear."""
    one, two = pair("bloom")
    name = next(iter(one.factors))
    first, second = one.factors[name], two.factors[name]
    wanted = 0.5 * first.delta() + 0.5 * second.delta()
    made = compose({one: 0.5, two: 0.5}, "linear").factors[name].delta()
    torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-5)


def test_weights_undo_each_other() -> None:
    one = learned("llama", LoraSpec(r=3, alpha=7.5), seed=1)
    made = compose({one: 1.0, replace(one, passport={}): -1.0}, "linear")
    assert all(float(f.delta().abs().max()) < 1e-7 for f in made.factors.values())


def test_slerp_ends_at_its_parts_and_keeps_the_angle() -> None:
    one, two = pair("bloom")
    for weights, end in (((1.0, 0.0), one), ((0.0, 1.0), two)):
        made = compose({one: weights[0], two: weights[1]}, "slerp")
        assert made.factors.keys() == end.factors.keys()
        assert all(made.factors[n].B.equal(f.B) for n, f in end.factors.items())
    made = compose({one: 0.75, two: 0.25}, "slerp")
    for name, first in one.factors.items():
        x, y = first.delta().double().flatten(), two.factors[name].delta().double().flatten()
        angle = torch.acos(x @ y / (x.norm() * y.norm()))
        wanted = (torch.sin(0.75 * angle) * x + torch.sin(0.25 * angle) * y) / torch.sin(angle)
        found = made.factors[name].delta().double().flatten()
        assert float((found - wanted).norm()) < 1e-5 * float(wanted.norm())
    assert slerp_weights(1.0, 0.3) == (0.7, 0.3)


def test_half_precision_parts_add_exactly() -> None:
    """What is weighted is float32: in bfloat16 "exact" was off by a thousandth."""
    parts = [
        replace(
            adapter,
            factors={
                n: replace(f, A=f.A.bfloat16(), B=f.B.bfloat16())
                for n, f in adapter.factors.items()
            },
        )
        for adapter in pair("bloom")
    ]
    made = compose(dict(zip(parts, (0.7, 0.3), strict=True)))
    for name, factors in made.factors.items():
        wanted = sum(
            w * a.factors[name].scaling * (a.factors[name].B.double() @ a.factors[name].A.double())
            for a, w in zip(parts, (0.7, 0.3), strict=True)
        )
        found = factors.scaling * (factors.B.double() @ factors.A.double())
        assert float((found - wanted).norm()) < 1e-6 * float(wanted.norm())
    alone = compose({parts[0]: 1.0})
    assert {f.B.dtype for f in alone.factors.values()} == {torch.bfloat16}


@pytest.mark.parametrize("how", ["linear", "svd"])
def test_what_cancels_is_nothing_and_not_rounding(how: str) -> None:
    one = learned("llama", LoraSpec(r=3, alpha=7.5), seed=1)
    parts = [Part("one", one, 1.0), Part("twin", replace(one, passport={}), -1.0)]
    made = compose_parts(parts, Recipe(how=how, r=4 if how == "svd" else None))
    assert {(site.r, site.norm, site.error) for site in made.sites} == {(1, 0.0, 0.0)}
    assert made.relative_error == 0


@pytest.mark.parametrize("how", ["ties", "dare", "dare_ties", "magnitude"])
def test_nothing_thinned_out_and_no_conflict_is_the_sum(how: str) -> None:
    """At density 1, parts that agree in every sign: every way is the weighted sum."""
    one = learned("bloom", LoraSpec(r=2), seed=1)
    twin = replace(one, passport={})
    made = compose({one: 0.7, twin: 0.6}, how, density=1.0)
    for name, factors in one.factors.items():
        torch.testing.assert_close(
            made.factors[name].delta(), 1.3 * factors.delta(), rtol=1e-3, atol=1e-5
        )


@pytest.mark.parametrize("how", ["ties", "dare", "dare_ties", "magnitude"])
def test_dense_ways_say_the_error_they_make(how: str) -> None:
    """The wanted change is computed here again, number by number, and compared with the report."""
    one, two = pair("bloom")
    parts = [Part("one", one, 0.6), Part("two", two, 0.4)]
    full = compose_parts(parts, Recipe(how=how, r=32, density=0.3, seed=5))
    low = compose_parts(parts, Recipe(how=how, r=3, density=0.3, seed=5))
    for whole, cut in zip(full.sites, low.sites, strict=True):
        wanted = full.adapter.factors[whole.name].delta()
        assert whole.error < 1e-5 * whole.norm
        measured = float((low.adapter.factors[cut.name].delta() - wanted).norm())
        assert measured == pytest.approx(cut.error, rel=1e-3)
        assert cut.error > 0.01 * cut.norm


def test_ties_by_hand() -> None:
    """The paper's figure: trim, elect, average what agrees."""
    one, two = pair("llama")
    name = "model.layers.1.self_attn.q_proj"
    x, y = one.factors[name].delta(), two.factors[name].delta()
    wanted = torch.zeros_like(x)
    count = -(-x.numel() * 3 // 10)
    thin = []
    for change in (x, y):
        limit = change.abs().flatten().sort(descending=True).values[count - 1]
        thin.append(torch.where(change.abs() >= limit, change, 0.0))
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            a, b = float(thin[0][i, j]), float(thin[1][i, j])
            agreeing = [v for v in (a, b) if v * (a + b) > 0]
            wanted[i, j] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    made = compose({one: 0.5, two: 0.5}, "ties", r=32, density=0.3).factors[name].delta()
    torch.testing.assert_close(made, wanted, rtol=1e-3, atol=1e-5)


def test_dare_is_seeded_and_right_on_average() -> None:
    one, two = pair("bloom")
    name = next(iter(one.factors))

    def made(seed: int) -> Tensor:
        adapter = compose({one: 0.6, two: 0.4}, "dare", r=32, density=0.5, seed=seed)
        return adapter.factors[name].delta()

    assert made(1).equal(made(1))
    assert not torch.allclose(made(1), made(2))
    wanted = 0.6 * one.factors[name].delta() + 0.4 * two.factors[name].delta()
    mean = sum(made(seed) for seed in range(40)) / 40
    # The standard error of the mean of 40 draws is about a sixth of a single one's deviation.
    single = float((made(1) - wanted).norm())
    assert float((mean - wanted).norm()) < 0.25 * single


def test_dora_composes_through_its_change() -> None:
    model = tiny_models.build("llama")
    dora = learned("llama", LoraSpec(r=3, alpha=7.5, update="dora"), seed=1)
    plain = learned("llama", LoraSpec(r=2, alpha=3.0, targets=("q_proj", "o_proj")), seed=2)
    wanted = weighted(model, (dora, 0.7), (plain, 0.3))
    made = compose({dora: 0.7, plain: 0.3}, "svd", r=32, base=model)
    assert made.spec.update == "lora"
    assert_close(changes(made, model), wanted, rtol=1e-5)
    low = compose_parts(
        [Part("a", dora, 0.7), Part("b", plain, 0.3)], Recipe(how="svd", r=4), base=model
    )
    lost = {m: float((c - wanted[m]).norm()) for m, c in changes(low.adapter, model).items()}
    for site in low.sites:
        assert site.error == pytest.approx(lost[site.name], rel=1e-3, abs=1e-5)


def test_what_is_trained_beside_is_combined_in_its_difference() -> None:
    model = tiny_models.build("bert")
    specs = [LoraSpec(targets=("query",), bias="lora_only", also_train=("pooler.dense",))] * 2
    one, two = (learned("bert", spec, seed=i) for i, spec in enumerate(specs))
    made = compose({one: 0.7, two: 0.6}, base=model)
    for name, value in made.overrides.items():
        base = dict(model.named_parameters())[name].detach()
        wanted = base + 0.7 * (one.overrides[name] - base) + 0.6 * (two.overrides[name] - base)
        torch.testing.assert_close(value, wanted)
    for name, value in made.biases.items():
        base = dict(model.named_parameters())[f"{name}.bias"].detach()
        wanted = base + 0.7 * (one.biases[name] - base) + 0.6 * (two.biases[name] - base)
        torch.testing.assert_close(value, wanted)
    # Weights that sum to 1 need no base.
    half = compose({one: 0.5, two: 0.5})
    name = next(iter(half.overrides))
    torch.testing.assert_close(
        half.overrides[name], (one.overrides[name] + two.overrides[name]) / 2
    )


@pytest.mark.parametrize("how", ["cat", "ties"])
def test_a_layer_that_one_part_replaces_and_another_adapts_has_both(
    how: str, tmp_path: Path
) -> None:
    model = tiny_models.build("llama")
    adapts = learned("llama", LoraSpec(targets=("q_proj", "lm_head"), r=3, alpha=7.0), seed=1)
    replaces = learned("llama", LoraSpec(targets=("q_proj",), also_train=("lm_head",)), seed=2)
    density = None if how == "cat" else 1.0
    made = compose({adapts: 0.6, replaces: -1.5}, how, density=density, base=model)
    before = model.get_parameter("lm_head.weight").detach().clone()
    wanted = 0.6 * adapts.delta("lm_head") - 1.5 * (replaces.overrides["lm_head.weight"] - before)
    if how == "ties":  # nothing disagrees in one term: the disjoint mean is it, times the total
        wanted = wanted + (2.1 - 0.6) * adapts.delta("lm_head")
    assert "lm_head" not in made.modules()
    made.save(tmp_path / "made")
    bind_adapter(model, read_adapter(tmp_path / "made"), "made", any_base=True)
    merge(model, "made")
    detach(model)
    torch.testing.assert_close(model.get_parameter("lm_head.weight").detach() - before, wanted)


def test_heads_of_different_classes_are_refused() -> None:
    one = learned("bert", LoraSpec(targets=("query",)), seed=1)
    facts = {"task": {"name": "classify", "targets": {"kind": "classes", "names": ["no", "yes"]}}}
    other = {"task": {"name": "classify", "targets": {"kind": "classes", "names": ["yes", "no"]}}}

    def headed(outputs: int, passport: dict[str, Any]) -> Adapter:
        return replace(
            one, overrides={"classifier.weight": torch.ones(outputs, 32)}, passport=passport
        )

    with pytest.raises(BaseMismatchError, match=r"classifier.weight(.|\n)*\(2, 32\)"):
        compose({headed(2, {}): 0.5, headed(3, {}): 0.5})
    with pytest.raises(BaseMismatchError, match=r"yes, no"):
        compose({headed(2, facts): 0.5, headed(2, other): 0.5})
    assert compose({headed(2, facts): 0.5, headed(2, facts): 0.5}).passport["task"] == facts["task"]


def test_the_passport_names_the_parts() -> None:
    one, two = pair("llama")
    made = compose({one: 0.7, two: 0.3}, "svd", r=2)
    facts = made.passport["composition"]
    assert [part["weight"] for part in facts["parts"]] == [0.7, 0.3]
    assert facts["how"] == "svd"
    assert facts["relative_error"] > 0
    assert {site["name"] for site in facts["sites"]} == set(made.factors)
    assert made.passport["base"] == one.passport["base"]


def test_a_tied_embedding_composes(tmp_path: Path) -> None:
    """Unequal warnings aside, the look-up alone changes, as in its parts."""
    model = tiny_models.build("llama-tied")
    with expected_warning("shares its weight"):
        attach_learned(model, LoraSpec(targets=("embed_tokens",), r=2), warns=None)
    adapter = adapter_from_model(model)
    made = compose({adapter: 0.5})
    name = "model.embed_tokens"
    torch.testing.assert_close(made.factors[name].delta(), 0.5 * adapter.factors[name].delta())


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"how": "tie"}, "did you mean 'ties'"),
    "svd-without-rank": ({"how": "svd"}, "svd needs a rank"),
    "cat-with-rank": ({"how": "cat", "r": 4}, "cat keeps every factor"),
    "rank-zero": ({"how": "linear", "r": 0}, "at least 1"),
    "density-of-linear": ({"how": "linear", "density": 0.5}, "takes no density"),
    "density-zero": ({"how": "ties", "density": 0.0}, "0 < density <= 1"),
    "slerp-of-weights": ({"how": "slerp"}, "weights from 0 to 1 that sum to 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    options, reason = REFUSED[case]
    one, two = pair("bloom")
    with pytest.raises(SpecError, match=reason):
        compose({one: 0.7, two: 0.7}, **options)


def test_weights_that_cannot_be() -> None:
    one, two = pair("bloom")
    with pytest.raises(SpecError, match="nothing is left"):
        compose({one: 0.0, two: 0.0})
    with pytest.raises(SpecError, match="nothing is left"):
        compose({})
    for weight in (float("nan"), float("inf"), 1e300):
        with pytest.raises(SpecError, match="finite"):
            compose({one: weight})


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_part_that_is_not_finite_is_named(value: float) -> None:
    one, two = pair("bloom")
    name, factors = next(iter(one.factors.items()))
    B = factors.B.clone()
    B[0, 0] = value
    broken = replace(one, factors={**one.factors, name: replace(factors, B=B)})
    for how in ("cat", "linear", "ties"):
        with pytest.raises(AdapterFileError, match=f"not finite: {name} B"):
            compose({two: 0.5, broken: 0.5}, how)
    assert compose({two: 1.0, broken: 0.0}).factors.keys() == two.factors.keys()


def test_dora_needs_its_base_and_a_rank() -> None:
    model = tiny_models.build("llama")
    dora = learned("llama", LoraSpec(update="dora"), seed=1)
    with pytest.raises(SpecError, match="--base REF"):
        compose({dora: 0.5}, "svd", r=4)
    for how in ("cat", "linear"):
        with pytest.raises(SpecError, match="not of low rank"):
            compose({dora: 0.5}, how, base=model)


def test_other_bases_are_refused() -> None:
    one, two = pair("bloom")
    other = tiny_models.build("bloom", seed=9)
    attach_learned(other, LoraSpec(targets="qv", r=2))
    stranger = adapter_from_model(other)
    with pytest.raises(BaseMismatchError, match="different base models"):
        compose({one: 0.5, stranger: 0.5})
    with pytest.raises(BaseMismatchError, match="another base model"):
        compose({one: 0.5, two: 0.5}, base=tiny_models.build("bloom", seed=9))
    parts = [Part("one", one, 0.5), Part("stranger", stranger, 0.5)]
    assert compose_parts(parts, Recipe(any_base=True)).adapter.factors


def test_other_shapes_are_refused_even_without_a_passport() -> None:
    one = learned("llama", LoraSpec(targets=("q_proj",)), seed=1)
    two = learned("qwen3", LoraSpec(targets=("q_proj",)), seed=2)
    with pytest.raises(BaseMismatchError, match="do not fit on one base"):
        compose({replace(one, passport={}): 0.5, replace(two, passport={}): 0.5})


def test_a_weighted_head_is_refused() -> None:
    one = learned("bert", LoraSpec(targets=("query",), also_train=("pooler.dense",)), seed=1)
    with pytest.raises(SpecError, match="depends on the base"):
        compose({one: 0.5})
    headed = replace(one, overrides={"classifier.weight": torch.ones(2, 32)}, passport={})
    with pytest.raises(SpecError, match="depends on the base"):
        compose({headed: 0.5})
    with pytest.raises(AdapterFileError, match="no such parameter"):
        compose({headed: 0.5}, base=tiny_models.build("bert"))
    assert compose({headed: 1.0, replace(one, overrides={}): 0.5}).overrides == headed.overrides
