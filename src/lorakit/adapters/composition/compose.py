"""Adapters into one adapter, with the error of each site."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from lorakit.adapters.adapter import Adapter, Factors
from lorakit.adapters.bind import plan_binding
from lorakit.adapters.composition.beside import (
    combined_biases,
    combined_overrides,
    fold_into_overrides,
)
from lorakit.adapters.composition.identity import (
    common_facts,
    require_common_base,
    require_common_classes,
)
from lorakit.adapters.composition.recipe import Part, Recipe, check_parts, is_identity
from lorakit.adapters.composition.sites import CommonSite, common_sites
from lorakit.adapters.composition.tokens import combined_tokens, with_rows_of_tokens
from lorakit.adapters.composition.ways import Held, combine
from lorakit.adapters.spec import Bias, LoraSpec
from lorakit.math.scaling import Scaling, alpha_for
from lorakit.progress import track


@dataclass(frozen=True, slots=True)
class ComposedSite:
    """What one site of the result holds.

    Attributes:
        name: the site.
        r: its rank.
        norm: ||wanted change||_F.
        error: ||wanted change - held change||_F; 0 where it is exact.
        parts: how many parts change this site.
    """

    name: str
    r: int
    norm: float
    error: float
    parts: int


@dataclass(frozen=True, slots=True)
class Composition:
    """A composed adapter and how well it holds what was asked for.

    Attributes:
        adapter: the result; its passport names the parts.
        sites: one per site.
    """

    adapter: Adapter
    sites: tuple[ComposedSite, ...]

    @property
    def relative_error(self) -> float:
        """||wanted - held|| / ||wanted|| over all sites; 0 where every site is exact."""
        wanted = sum(site.norm**2 for site in self.sites)
        return (sum(site.error**2 for site in self.sites) / wanted) ** 0.5 if wanted else 0.0


def compose(
    parts: Mapping[Adapter, float],
    how: str = "cat",
    *,
    r: int | None = None,
    density: float | None = None,
    seed: int = 0,
    base: nn.Module | None = None,
) -> Adapter:
    """One adapter from several: the changes are combined, never the factors.

    Ranks, alphas, scalings and sites may differ. The result's error stands per site in
    `passport["composition"]`.

    Args:
        parts: adapter -> weight; negative weights take a task away.
        how: a key of `lorakit.adapters.composition.recipe.WAYS`: cat and linear are exact, svd is
            the best approximation of the sum at rank r, and so on.
        r: the rank of the result; without it, cat and linear are exact, and the ways that work
            number by number get the sum of the parts' ranks.
        density: the share of numbers that ties, magnitude, dare and dare_ties keep; 0.5 by default.
        seed: of dare and dare_ties.
        base: the model they were trained on; needed for DoRA, and where biases or modules trained
            beside are weighted. Not changed.

    Raises:
        SpecError: an option or a combination that cannot be, with the reason.
        BaseMismatchError: the passports name different bases, or shapes differ.
    """
    named = [Part(f"part{i}", a, w) for i, (a, w) in enumerate(parts.items(), start=1)]
    recipe = Recipe(how=how, r=r, density=density, seed=seed)
    return compose_parts(named, recipe, base=base).adapter


def compose_parts(
    parts: Sequence[Part],
    recipe: Recipe,
    *,
    base: nn.Module | None = None,
    quiet: bool = False,
) -> Composition:
    """See `compose`; the parts have names, and the result tells the error of each site.

    Args:
        parts: the adapters with their weights.
        recipe: the way and its options.
        base: the model; see `compose`.
        quiet: show no progress.

    Raises:
        SpecError, BaseMismatchError: see `compose`.
    """
    counting = check_parts(parts, recipe)
    require_common_classes(counting)
    if not recipe.any_base:
        require_common_base(counting, base)
    if base is not None:
        counting = [replace(part, adapter=plan_binding(base, part.adapter)) for part in counting]
    if is_identity(counting, recipe):
        return _unchanged(counting[0], parts, recipe)
    counting = with_rows_of_tokens(counting, base)
    rule = _common_rule(counting)
    sites = common_sites(counting, base)
    factors: dict[str, Factors] = {}
    composed: list[ComposedSite] = []
    for site in sites if quiet else track(sites, f"composing, {recipe.how}"):
        held = combine(site, recipe, sum(abs(part.weight) for part in counting))
        factors[site.name] = _factors(site, held, rule)
        r = held.A.shape[0]
        composed.append(ComposedSite(site.name, r, held.norm, held.error, len(site.terms)))
    biases, overrides = combined_biases(counting, base), combined_overrides(counting, base)
    factors, overrides = fold_into_overrides(factors, overrides)
    adapter = Adapter(
        spec=_spec(counting, factors, rule),
        factors=factors,
        biases=biases,
        overrides=overrides,
        tokens=combined_tokens(counting, base),
        target_modules=_targets(counting),
        config=_config(counting),
    )
    return _with_passport(adapter, tuple(composed), parts, recipe)


def _unchanged(part: Part, parts: Sequence[Part], recipe: Recipe) -> Composition:
    sites = tuple(ComposedSite(name, f.r, 0.0, 0.0, 1) for name, f in part.adapter.factors.items())
    return _with_passport(part.adapter, sites, parts, recipe)


def _with_passport(
    adapter: Adapter, sites: tuple[ComposedSite, ...], parts: Sequence[Part], recipe: Recipe
) -> Composition:
    result = Composition(adapter, sites)
    facts = {
        "how": recipe.how,
        "r": recipe.r,
        "density": recipe.kept,
        "seed": recipe.seed,
        "parts": [_part_facts(part) for part in parts],
        "relative_error": result.relative_error,
        "sites": [asdict(site) for site in sites],
    }
    passport = {**common_facts([p for p in parts if p.weight]), "composition": facts}
    return replace(result, adapter=replace(adapter, passport=passport))


def _part_facts(part: Part) -> dict[str, Any]:
    """What the passport says of one part: enough to find it again."""
    known = part.adapter.passport
    kept = ("model", "data", "seed", "metrics", "composition")
    facts = {key: known[key] for key in kept if key in known}
    return {
        "name": part.name,
        "weight": part.weight,
        "spec": part.adapter.spec.to_dict(),
        "num_params": part.adapter.num_params(),
        **facts,
    }


def _common_rule(parts: Sequence[Part]) -> Scaling:
    rules: set[Scaling] = {part.adapter.spec.scaling for part in parts}
    return rules.pop() if len(rules) == 1 else "alpha/r"


def _factors(site: CommonSite, held: Held, rule: Scaling) -> Factors:
    source = site.terms[0].source
    same_rule = source is not None and held.untouched
    alpha = alpha_for(held.scaling, held.A.shape[0], rule)
    if same_rule and source is not None and abs(source.alpha - alpha) <= 1e-9 * alpha:
        alpha = source.alpha
    return site.factors(held.A, held.B, scaling=held.scaling, alpha=alpha)


def _spec(parts: Sequence[Part], factors: Mapping[str, Factors], rule: Scaling) -> LoraSpec:
    """The request that this adapter would be the answer to."""
    ranks = Counter(f.r for f in factors.values())
    alphas = Counter(f.alpha for f in factors.values())
    r = ranks.most_common(1)[0][0] if ranks else 1
    alpha = alphas.most_common(1)[0][0] if alphas else float(r)
    targets = {part.adapter.spec.targets for part in parts}
    biases: set[Bias] = {part.adapter.spec.bias for part in parts}
    beside = dict.fromkeys(name for part in parts for name in part.adapter.spec.also_train)
    return LoraSpec(
        r=r,
        alpha=alpha,
        targets=targets.pop() if len(targets) == 1 else tuple(factors) or "qv",
        scaling=rule,
        rank_pattern={name: f.r for name, f in factors.items() if f.r != r},
        alpha_pattern={name: f.alpha for name, f in factors.items() if f.alpha != alpha},
        bias=biases.pop() if len(biases) == 1 else ("all" if "all" in biases else "lora_only"),
        also_train=tuple(beside),
    )


def _targets(parts: Sequence[Part]) -> tuple[str, ...]:
    """The short names, where all parts adapt the same modules; else every module by its name."""
    modules = {frozenset(part.adapter.modules()) for part in parts}
    return parts[0].adapter.target_modules if len(modules) == 1 else ()


def _config(parts: Sequence[Part]) -> dict[str, Any]:
    """What the parts' PEFT configurations agree on of the base."""
    result: dict[str, Any] = {}
    for key in ("base_model_name_or_path", "task_type", "revision", "auto_mapping"):
        values = [part.adapter.config.get(key) for part in parts]
        result[key] = values[0] if all(value == values[0] for value in values) else None
    for part in parts:
        # PEFT's version tells how expert weights lie; parts that differ in it have the base's.
        if any(f.stack is not None for f in part.adapter.factors.values()):
            result["peft_version"] = part.adapter.config.get("peft_version")
    return result
