"""The plan: every site and every parameter of an adapter, before anything is changed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from torch import nn

from lorakit.adapters.architectures import taken_for_experts
from lorakit.adapters.budget import budget_params, equal_rank
from lorakit.adapters.notes import expert_notes, rank_notes, tie_notes
from lorakit.adapters.occupied import refuse_occupied
from lorakit.adapters.spec import AUTO, DATA_INITS, MOVING, NONZERO_INITS, LoraSpec
from lorakit.adapters.targets import (
    Candidate,
    bare_model,
    base_modules,
    matches,
    model_type_of,
    resolve_targets,
)
from lorakit.errors import LorakitWarning, SpecError, TargetError, nearest
from lorakit.layers.kinds import KINDS, Shape
from lorakit.layers.rows import Rows
from lorakit.weights.nf4 import is_planned_four_bit
from lorakit.weights.storage import storage_refusal

V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class Site:
    """One resolved target.

    Attributes:
        name: the module's name, with the part behind it for a fused projection (`h.0.c_attn.q`).
        module: the module's name.
        kind: the geometry, a key of `lorakit.layers.kinds.KINDS`.
        shape: (out, in), kernel sizes behind for a convolution; out is the part's own size.
        r: the rank.
        alpha: the numerator of the scaling.
        scaling: the factor in front of BA.
        rows: the part's rows of the fused output, or None.
        bias: whether the module's bias is trained beside.
        update: the update rule, a key of `lorakit.layers.updates.RULES`.
        learns_values: whether the update is P diag(lambda) Q with a lambda of its own (AdaLoRA).
    """

    name: str
    module: str
    kind: str
    shape: Shape
    r: int
    alpha: float
    scaling: float
    rows: Rows | None = None
    bias: bool = False
    update: str = "lora"
    learns_values: bool = False

    def num_params(self) -> int:
        """Learned numbers in A, B, DoRA's m, AdaLoRA's lambda; for biases see AdapterPlan."""
        return self.num_params_at(self.r)

    def num_params_at(self, r: int) -> int:
        """The same at another rank."""
        A, B = KINDS[self.kind].factor_shapes(self.shape, r)
        magnitude = self.shape[0] if self.update == "dora" else 0
        values = r if self.learns_values else 0
        return math.prod(A) + math.prod(B) + magnitude + values

    @property
    def part(self) -> str | None:
        """The part's name (`q`), or None for a whole module."""
        return None if self.rows is None else self.name.rpartition(".")[2]


@dataclass(frozen=True, slots=True)
class OverrideSite:
    """Parameters of one module that the adapter replaces as a whole.

    Attributes:
        module: the module's name.
        shapes: parameter name inside the module -> shape.
    """

    module: str
    shapes: Mapping[str, Shape]

    def num_params(self) -> int:
        """Learned numbers."""
        return sum(math.prod(shape) for shape in self.shapes.values())


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """What `attach` will do; planned count = real count by construction.

    Attributes:
        spec: the request.
        sites: the low-rank updates, in the model's order.
        overrides: modules and biases trained beside.
        bias_sizes: adapted module -> size of its bias, where the bias is trained.
        notes: what the user should know, one sentence each.
    """

    spec: LoraSpec
    sites: tuple[Site, ...]
    overrides: tuple[OverrideSite, ...] = ()
    bias_sizes: Mapping[str, int] | None = None
    notes: tuple[str, ...] = ()

    def num_params(self) -> int:
        """All learned numbers."""
        low_rank = sum(site.num_params() for site in self.sites)
        biases = sum((self.bias_sizes or {}).values())
        return low_rank + biases + sum(o.num_params() for o in self.overrides)

    def modules(self) -> dict[str, list[Site]]:
        """Adapted module -> its sites (several for the parts of a fused projection)."""
        grouped: dict[str, list[Site]] = {}
        for site in self.sites:
            grouped.setdefault(site.module, []).append(site)
        return grouped


def whole_modules(plan: AdapterPlan) -> tuple[str, ...]:
    """Modules trained as a whole: their own weights say nothing about the base."""
    return tuple(site.module for site in plan.overrides if set(site.shapes) != {"bias"})


def plan_adapter(model: nn.Module, spec: LoraSpec) -> AdapterPlan:
    """Resolve a spec against a model; changes nothing and works on the meta device.

    Args:
        model: any nn.Module; transformers models get presets and fused parts.
        spec: the request.

    Returns:
        The plan. What the user should know is in its notes and is also warned about.

    Raises:
        TargetError: a target, pattern or module name matches nothing or cannot be adapted.
        SpecError: the spec asks for what cannot be done here, with the reason.
        StateError: a method other than LoRA is on the model.
    """
    model = bare_model(model)
    refuse_occupied(model, "lora")
    modules = base_modules(model)
    whole = [site.module for site in modules_beside(spec.also_train, modules)]
    found = resolve_targets(model, spec.targets, whole=whole)
    _refuse_unstorable(found)
    spec, chosen = _with_fixed_rank(found, spec)
    sites = tuple(_site(candidate, spec) for candidate in found)
    _check_patterns("rank_pattern", spec.rank_pattern, sites)
    _check_patterns("alpha_pattern", spec.alpha_pattern, sites)
    _refuse_init(spec, sites)
    beside = modules_beside(spec.also_train, modules, {site.module for site in sites})
    biases = _other_biases(spec, modules, sites, beside)
    changed = [site.module for site in (*sites, *beside)]
    targets = (spec.targets,) if isinstance(spec.targets, str) else spec.targets
    taken = taken_for_experts(model_type_of(model), (site.module for site in sites))
    notes = [
        *rank_notes(sites),
        *tie_notes(modules, changed),
        *expert_notes(modules, targets, taken if spec.update == "dora" else []),
    ]
    for note in notes:
        warnings.warn(note, LorakitWarning, stacklevel=2)
    return AdapterPlan(
        spec=spec,
        sites=sites,
        overrides=(*beside, *biases),
        bias_sizes={s.module: _bias_size(modules[s.module]) for s in sites if s.bias},
        notes=(*chosen, *notes),
    )


def _with_fixed_rank(found: list[Candidate], spec: LoraSpec) -> tuple[LoraSpec, list[str]]:
    """For r: auto the largest equal rank within the budget, and what there is to say about it."""
    if spec.r != AUTO or spec.budget is None:
        return spec, []
    num_params = budget_params(spec.budget)
    shapes = [
        _site(candidate, replace(spec, r=1, budget=None, ranks="uniform")) for candidate in found
    ]
    if spec.ranks != "uniform":
        for site in shapes:
            require_linear(site, f"ranks by {spec.ranks} are", where="ranks", instead="uniform")
    r = equal_rank(shapes, num_params)
    note = f"r: auto, rank {r} everywhere fits the budget of {num_params:,} parameters"
    if spec.ranks == MOVING:
        note += "; ranks: adalora begins with more and moves them while it learns"
    elif spec.ranks != "uniform":
        note += f"; ranks: {spec.ranks} spends it after a look at the data"
    return replace(spec, r=r, budget=None, ranks="uniform"), [note]


def _refuse_unstorable(found: list[Candidate]) -> None:
    for candidate in found:
        reason = storage_refusal(candidate.module)
        if reason is not None:
            raise TargetError(
                "the layer's weight cannot be read",
                where=candidate.name,
                expected="a dense float weight, or 4 bits as load_model(..., quantize='nf4') makes",
                found=f"{type(candidate.module).__name__}: {reason}",
                remedy="load the base dense: load_model(..., quantize=None)",
            )


def require_linear(site: Site, what: str, *, where: str, instead: str) -> None:
    """Refuse a site without one matrix to take directions from.

    Args:
        site: the site.
        what: what is defined for linear layers only, and the verb.
        where: the field that asks for it.
        instead: a value of the field that takes every layer.

    Raises:
        SpecError: it is an embedding or a convolution.
    """
    if site.kind not in ("linear", "conv1d"):
        raise SpecError(
            f"{what} defined for linear layers only",
            where=where,
            found=f"{site.name} is of the kind {site.kind}",
            remedy=f"leave the layer out of the targets, or use {where}: {instead}",
        )


def _refuse_init(spec: LoraSpec, sites: Iterable[Site]) -> None:
    """Starts taken from a matrix's directions need a matrix with enough of them."""
    if spec.init not in NONZERO_INITS | DATA_INITS:
        return
    for site in sites:
        require_linear(site, f"the start {spec.init!r} is", where="init", instead="gaussian")
        # EVA takes directions of the input alone, LoRA-GA r for A and r others for B.
        limit = site.shape[1] if spec.init == "eva" else min(site.shape)
        limit = limit // 2 if spec.init == "lora_ga" else limit
        if site.r > limit:
            raise SpecError(
                f"the start {spec.init!r} needs more directions than the matrix has",
                where="init",
                expected=f"a rank of at most {limit} for {site.name}, "
                f"{site.shape[0]} x {site.shape[1]}",
                found=f"r={site.r}",
            )


def _site(candidate: Candidate, spec: LoraSpec) -> Site:
    r = pattern_value(spec.rank_pattern, candidate.name, spec.fixed_r())
    alpha = pattern_value(spec.alpha_pattern, candidate.name, spec.alpha)
    shape = candidate.kind.shape(candidate.module)
    if candidate.rows is not None:
        shape = (candidate.rows.size, *shape[1:])
    has_bias = "bias" in dict(candidate.module.named_parameters(recurse=False))
    return Site(
        name=candidate.name,
        module=candidate.module_name,
        kind=candidate.kind.name,
        shape=shape,
        r=r,
        alpha=float(alpha),
        scaling=spec.scale(r=r, alpha=alpha),
        rows=candidate.rows,
        bias=spec.bias != "none" and has_bias,
        update=spec.update,
    )


def pattern_value(pattern: Mapping[str, V], name: str, default: V) -> V:
    """The value of the first key that matches the site's name, as in PEFT."""
    return next((value for key, value in pattern.items() if matches(key, name)), default)


def _check_patterns(field: str, pattern: Mapping[str, object], sites: Iterable[Site]) -> None:
    names = [site.name for site in sites]
    for key in pattern:
        if not any(matches(key, name) for name in names):
            leaves = {name.rpartition(".")[2] for name in names}
            close = nearest(key.rpartition(".")[2], leaves) or sorted(leaves)[:8]
            raise TargetError(
                f"a key of {field} matches no target",
                where=f"{field}[{key!r}]",
                expected="the name, suffix or expression of something that is targeted",
                remedy=f"the targets here are {', '.join(close)}",
            )


def modules_beside(
    patterns: Iterable[str], modules: Mapping[str, nn.Module], adapted: Iterable[str] = ()
) -> list[OverrideSite]:
    """Resolve `also_train`: whole modules that are trained beside.

    Args:
        patterns: names, suffixes or expressions.
        modules: the base's modules by name.
        adapted: modules that are changed in another way and cannot be trained as a whole too.

    Raises:
        TargetError: a pattern matches nothing, nothing with parameters, or something adapted.
    """
    chosen: dict[str, OverrideSite] = {}
    for pattern in patterns:
        names = [name for name in modules if name and matches(pattern, name)]
        if not names:
            leaves = {name.rpartition(".")[2] for name in modules if name}
            close = nearest(pattern.rpartition(".")[2], leaves)
            raise TargetError(
                "a module to train beside matches nothing",
                where=f"also_train: {pattern!r}",
                expected="the name, suffix or expression of a module, such as lm_head",
                remedy=f"the nearest names are {', '.join(close or list(leaves)[:8])}",
            )
        for name in names:
            inside = [a for a in adapted if a == name or a.startswith(name + ".")]
            if inside:
                raise TargetError(
                    "a module is both adapted and trained as a whole",
                    where=f"also_train: {pattern!r}",
                    found=", ".join(inside[:4]),
                    remedy="keep one of the two",
                )
            _refuse_four_bit(pattern, name, modules[name])
            shapes = {n: tuple(p.shape) for n, p in modules[name].named_parameters()}
            if not shapes:
                raise TargetError(
                    "a module to train beside has no parameters",
                    where=f"also_train: {pattern!r}",
                    found=f"{name} is {type(modules[name]).__name__}",
                )
            chosen[name] = OverrideSite(module=name, shapes=shapes)
    nested = [n for n in chosen if any(n.startswith(other + ".") for other in chosen)]
    return [site for name, site in chosen.items() if name not in nested]


def _refuse_four_bit(pattern: str, name: str, module: nn.Module) -> None:
    if any(is_planned_four_bit(part) for part in module.modules()):
        raise TargetError(
            "a module with 4-bit weights cannot be trained as a whole",
            where=f"also_train: {pattern!r}",
            found=f"{name}: 4-bit numbers have no gradient",
            remedy="target its layers instead, or load the base dense",
        )


def _other_biases(
    spec: LoraSpec,
    modules: Mapping[str, nn.Module],
    sites: Iterable[Site],
    beside: Iterable[OverrideSite],
) -> list[OverrideSite]:
    """For bias="all": every bias that belongs neither to a target nor to a module beside."""
    if spec.bias != "all":
        return []
    taken = {site.module for site in sites}
    whole = [site.module for site in beside]
    result: list[OverrideSite] = []
    for name, module in modules.items():
        if name in taken or any(name == w or name.startswith(w + ".") for w in whole):
            continue
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if parameter_name == "bias":
                result.append(OverrideSite(module=name, shapes={"bias": tuple(parameter.shape)}))
    return result


def _bias_size(module: nn.Module) -> int:
    return module.get_parameter("bias").numel()
