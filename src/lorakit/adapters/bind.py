"""A model-free Adapter onto a live model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lorakit.adapters.adapter import Adapter, Factors
from lorakit.adapters.attach import detach, place_adapter
from lorakit.adapters.attachments import (
    adapted_layers,
    attachments_of,
    check_name,
    outer_modules,
    refuse_merged,
)
from lorakit.adapters.identity import require_same_base
from lorakit.adapters.parameters import fit_parameters, whole_parameters
from lorakit.adapters.plan import AdapterPlan, OverrideSite, Site
from lorakit.adapters.renamed import under_its_names
from lorakit.adapters.spec import DATA_INITS, NONZERO_INITS
from lorakit.adapters.strict import (
    bias_problems,
    changed_base,
    missing_tensors,
    missing_ties,
    not_finite,
)
from lorakit.adapters.targets import bare_model, base_modules, input_embedding
from lorakit.errors import AdapterFileError, LorakitWarning, nearest
from lorakit.layers.adapted import AdaptedLayer
from lorakit.layers.kinds import kind_of
from lorakit.layers.low_rank import Branch, LowRank
from lorakit.layers.overridden import OverriddenModule
from lorakit.layers.updates import fresh_norms
from lorakit.weights.storage import storage_of

_SHOWN = 12
# Of a norm summed up in another order.
_SAME_NORM = 1e-5


def bind_adapter(
    model: nn.Module,
    adapter: Adapter,
    name: str = "default",
    *,
    any_base: bool = False,
    problems: Sequence[str] = (),
) -> AdapterPlan:
    """Attach an adapter and give it its values; strict both ways, and active afterwards.

    Mutates `model`. If anything does not bind, nothing is attached.

    Args:
        model: the base it was made for.
        adapter: what to bind.
        name: its name on this model.
        any_base: bind even if the passport says that the base is another one.
        problems: what the reader of the file found already; listed with what is found here.

    Raises:
        AdapterFileError: tensors missing, extra, misshapen or not finite, all listed.
        BaseMismatchError: the passport names another base.
        StateError: the name is taken or cannot be one.
    """
    model = bare_model(model)
    check_name(name)
    refuse_merged(model)
    modules = base_modules(model)
    adapter = under_its_names(model, modules, adapter)
    fitted, wrong = fit_parameters(modules, adapter)
    adapter = fitted if wrong else whole_parameters(modules, fitted)
    plan = _plan_for(model, modules, adapter, (*problems, *wrong))
    if not any_base:
        require_same_base(model, adapter.passport)
    # Starts that look at the weight or at data keep something of it beside the factors.
    fill = adapter.spec.init in NONZERO_INITS | DATA_INITS
    place_adapter(model, plan, name, fill=fill)
    try:
        _fill(model, adapter, name)
    except BaseException:
        detach(model, name)
        raise
    attachments_of(model).passports[name] = dict(adapter.passport)
    _note_storage(modules, adapter, name)
    if _changes_nothing(model, adapter, name):
        warnings.warn(
            f"adapter {name!r} binds but changes nothing: every B A is zero{_and_norms(adapter)}",
            LorakitWarning,
            stacklevel=2,
        )
    return plan


def _note_storage(modules: Mapping[str, nn.Module], adapter: Adapter, name: str) -> None:
    """Say that the adapter learned beside weights that were rounded in another way."""
    facts = adapter.passport.get("base")
    trained = facts.get("storage") if isinstance(facts, Mapping) else None
    here = storage_of(modules.values())
    if trained is not None and trained != here:
        warnings.warn(
            f"adapter {name!r} was trained beside {trained} weights of this base; here they are "
            f"{here}, so its answers differ a little from those it was trained to give",
            LorakitWarning,
            stacklevel=3,
        )


def _changes_nothing(model: nn.Module, adapter: Adapter, name: str) -> bool:
    if adapter.biases or adapter.overrides:
        return False
    if any(bool(f.A.any()) and bool(f.B.any()) for f in adapter.factors.values()):
        return False
    branches = ((layer, layer.branch_of(name)) for layer in adapted_layers(model))
    return not any(
        _has_moved(update, layer)
        for layer, branch in branches
        if branch
        for update in branch.updates()
    )


def _has_moved(update: LowRank, layer: AdaptedLayer) -> bool:
    """Whether DoRA's magnitude is not the norms that it started from."""
    if update.magnitude is None or update.magnitude.is_meta:
        return False
    norms = fresh_norms(update, layer).to(update.magnitude)
    return not torch.allclose(update.magnitude, norms, rtol=_SAME_NORM, atol=0.0)


def _and_norms(adapter: Adapter) -> str:
    return ", every magnitude its norm" if adapter.spec.update == "dora" else ""


def plan_of_binding(model: nn.Module, adapter: Adapter) -> AdapterPlan:
    """What `bind_adapter` will attach; changes nothing and works on the meta device.

    Raises:
        AdapterFileError: tensors missing, extra, misshapen or not finite, all listed.
    """
    modules = base_modules(model)
    return _plan_for(model, modules, under_its_names(model, modules, adapter))


def plan_binding(model: nn.Module, adapter: Adapter) -> Adapter:
    """Check that an adapter binds, and give its factors the kinds this model's layers have.

    A foreign file does not always tell a Linear from a Conv1D. Changes nothing and works on the
    meta device.

    Raises:
        AdapterFileError: tensors missing, extra, misshapen or not finite, all listed.
    """
    modules = base_modules(model)
    fitted, wrong = fit_parameters(modules, under_its_names(model, modules, adapter))
    plan = _plan_for(model, modules, fitted, wrong)
    kinds = {site.name: site.kind for site in plan.sites}
    factors = {n: replace(f, kind=kinds.get(n, f.kind)) for n, f in fitted.factors.items()}
    return replace(fitted, factors=factors)


def _plan_for(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    adapter: Adapter,
    known: Sequence[str] = (),
) -> AdapterPlan:
    problems = list(known)
    sites: list[Site] = []
    for name, factors in adapter.factors.items():
        if factors.stack is not None:
            continue  # a parameter's, replaced as a whole: see `lorakit.adapters.parameters`
        site = _site_for(model, modules, name, factors, name_bias=factors.module in adapter.biases)
        if isinstance(site, str):
            problems.append(site)
        else:
            sites.append(site)
    problems += bias_problems(modules, adapter.biases)
    overrides = _override_sites(modules, adapter.overrides, problems)
    problems += not_finite(adapter)
    problems += changed_base(modules, adapter)
    problems += missing_ties(modules, adapter)
    adapted = {site.module for site in sites}
    problems += [
        f"extra: {site.module}: both adapted and replaced as a whole"
        for site in overrides
        if site.module in adapted
    ]
    reported = {problem.split(": ")[1] for problem in problems}
    problems += [p for p in missing_tensors(modules, adapter) if p.split(": ")[1] not in reported]
    if problems:
        raise _binding_error(model, adapter, problems, bound=len(sites))
    return AdapterPlan(
        spec=adapter.spec,
        sites=tuple(sites),
        overrides=overrides,
        bias_sizes={module: bias.numel() for module, bias in adapter.biases.items()},
    )


def _binding_error(
    model: nn.Module, adapter: Adapter, problems: list[str], *, bound: int
) -> AdapterFileError:
    shown = problems[:_SHOWN]
    if len(problems) > _SHOWN:
        shown.append(f"... and {len(problems) - _SHOWN} more")
    nothing = not bound and bool(adapter.factors)
    return AdapterFileError(
        "nothing of this adapter binds to the model"
        if nothing
        else f"{len(problems)} tensors do not bind",
        where=type(model).__name__,
        found="\n".join(shown),
        remedy=_resized(model, adapter) or _other_head(adapter) or _its_base(adapter),
    )


def _its_base(adapter: Adapter) -> str:
    name = adapter.config.get("base_model_name_or_path")
    return "load the base this adapter was made for" + (f" ({name})" if name else "")


def _other_head(adapter: Adapter) -> str | None:
    """What to do where the adapter brings a head that a language model does not have."""
    task = adapter.config.get("task_type")
    if task not in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"):
        return None
    return f"{_its_base(adapter)}, with the head that its task_type {task} means"


def _resized(model: nn.Module, adapter: Adapter) -> str | None:
    """What to do where the adapter was trained after tokens were added to the vocabulary."""
    found = input_embedding(model)
    if found is None:
        return None
    name, embedding = found
    factors, whole = adapter.factors.get(name), adapter.overrides.get(f"{name}.weight")
    trained = whole.shape[0] if whole is not None else None
    if trained is None and factors is not None:
        trained = factors.A.shape[1]
    if trained in (None, embedding.num_embeddings):
        return None
    return (
        f"the adapter has a vocabulary of {trained} tokens, the base one of "
        f"{embedding.num_embeddings}: model.resize_token_embeddings({trained}) before it is "
        "loaded; for a command, save the resized base and name that one"
    )


def _site_for(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    name: str,
    factors: Factors,
    *,
    name_bias: bool,
) -> Site | str:
    module = modules.get(factors.module)
    if module is None:
        close = nearest(factors.module, modules, n=1)
        hint = f" (nearest: {close[0]})" if close else ""
        return f"extra: {name}: the model has no such module{hint}"
    kind = kind_of(module)
    reason = kind.refusal(module) if kind else f"{type(module).__name__} cannot be adapted"
    if kind is None or reason:
        return f"extra: {name}: {reason}"
    shape = kind.shape(module)
    if factors.rows is not None:
        if factors.rows.whole != shape[0]:
            return (
                f"misshapen: {name}: parts of {factors.rows.whole} rows, the layer has {shape[0]}"
            )
        shape = (factors.rows.size, *shape[1:])
    expected = kind.factor_shapes(shape, factors.r)
    found = (tuple(factors.A.shape), tuple(factors.B.shape))
    if found != expected:
        return f"misshapen: {name}: expected A {expected[0]}, B {expected[1]}, found {found}"
    if factors.magnitude is not None and tuple(factors.magnitude.shape) != shape[:1]:
        found_m = tuple(factors.magnitude.shape)
        return f"misshapen: {name}: expected a magnitude {shape[:1]}, found {found_m}"
    return Site(
        name=name,
        module=factors.module,
        kind=kind.name,
        shape=shape,
        r=factors.r,
        alpha=factors.alpha,
        scaling=factors.scaling,
        rows=factors.rows,
        bias=name_bias,
        update="lora" if factors.magnitude is None else "dora",
    )


def _override_sites(
    modules: Mapping[str, nn.Module], overrides: Mapping[str, Tensor], problems: list[str]
) -> tuple[OverrideSite, ...]:
    """Group replaced parameters by the module that owns them."""
    grouped: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, value in overrides.items():
        owner, _, leaf = name.rpartition(".")
        module = modules.get(owner)
        parameter = dict(module.named_parameters(recurse=False)).get(leaf) if module else None
        if parameter is None:
            problems.append(f"extra: {name}: the model has no such parameter")
        elif parameter.shape != value.shape:
            problems.append(
                f"misshapen: {name}: expected {tuple(parameter.shape)}, found {tuple(value.shape)}"
            )
        else:
            grouped.setdefault(owner, {})[leaf] = tuple(value.shape)
    return tuple(OverrideSite(module=m, shapes=shapes) for m, shapes in grouped.items())


def _fill(model: nn.Module, adapter: Adapter, name: str) -> None:
    by_module = adapter.modules()
    with torch.no_grad():
        for module in outer_modules(model):
            if isinstance(module, OverriddenModule):
                override = module.override_of(name)
                for parameter, value in override.tensors().items() if override else ():
                    value.copy_(adapter.overrides[f"{module.name}.{parameter}"])
            branch = module.branch_of(name) if isinstance(module, AdaptedLayer) else None
            if branch is not None:
                layer = str(module.name)
                _fill_branch(branch, list(by_module[layer].values()), adapter.biases.get(layer))


def _fill_branch(branch: Branch, mine: Sequence[Factors], bias: Tensor | None) -> None:
    for update, factors in zip(branch.updates(), mine, strict=True):
        update.awaits_data = False
        update.lora_A.copy_(factors.A)
        update.lora_B.copy_(factors.B)
        if update.magnitude is not None and factors.magnitude is not None:
            update.magnitude.copy_(factors.magnitude)
    if branch.bias is not None and bias is not None:
        branch.bias.copy_(bias)
