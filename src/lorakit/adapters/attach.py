"""Attach, use, detach: adapters on a live model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from lorakit.adapters.architectures import rows_not_apart
from lorakit.adapters.attachments import (
    Attachments,
    adapted_layers,
    attachments_of,
    check_name,
    end_attachments,
    find_attachments,
    outer_modules,
    overridden_modules,
    places,
    refuse_merged,
    require_attached,
    start_attachments,
)
from lorakit.adapters.branches import new_branch, trainable_copy
from lorakit.adapters.occupied import refuse_occupied
from lorakit.adapters.plan import AdapterPlan, plan_adapter
from lorakit.adapters.saving import AttachedAdapters, save_learned_only, save_whole_again
from lorakit.adapters.spec import LoraSpec, require_chosen
from lorakit.adapters.targets import bare_model, base_modules, text_config
from lorakit.errors import StateError
from lorakit.layers.adapted import AdaptedLayer, Wrapper, module_key
from lorakit.layers.kinds import KINDS, kind_of
from lorakit.layers.overridden import OverriddenModule, Override
from lorakit.weights.nf4 import is_four_bit, settle


def attach(model: nn.Module, plan: AdapterPlan | LoraSpec, name: str = "default") -> AdapterPlan:
    """Put a new adapter on the model, freeze the base, and leave the adapter active.

    The model computes exactly what it did before: what is added starts at zero, and DoRA's
    magnitude at the norms of the weight's rows. Mutates `model`:
    targeted modules are wrapped in place; the base's parameters no longer require gradients, and
    neither do those of adapters attached before.

    Args:
        model: any nn.Module.
        plan: a plan for this model, or a spec to plan with.
        name: the new adapter's name.

    Returns:
        The plan.

    Raises:
        StateError: the name is taken or cannot be a name, an adapter is merged, or another method
            is on the model.
        TargetError, SpecError: see `plan_adapter`.
    """
    return place_adapter(model, plan, name, fill=True)


def place_adapter(
    model: nn.Module, plan: AdapterPlan | LoraSpec, name: str, *, fill: bool
) -> AdapterPlan:
    """See `attach`; without `fill` the factors have no values yet, the caller gives them."""
    model = bare_model(model)
    check_name(name)
    record = find_attachments(model)
    if record and name in record.plans:
        raise StateError(
            f"an adapter named {name!r} is attached already",
            found=", ".join(record.plans),
            remedy="choose another name, or detach it first",
        )
    refuse_merged(model)
    refuse_occupied(model, "lora")
    if isinstance(plan, LoraSpec):
        require_chosen(plan)
        plan = plan_adapter(model, plan)
    modules, outer = base_modules(model), tuple(outer_modules(model))
    _refuse_foreign(model, plan, modules)
    _refuse_nesting(outer, plan)
    record = start_attachments(model)
    frozen = _freeze(model, record, outer)
    try:
        _install(record, plan, name, modules=modules, outer=outer, fill=fill)
    except BaseException:
        _take_off(model, name)
        for parameter in frozen:
            parameter.requires_grad_(True)
        if not record.plans:
            end_attachments(model)
        raise
    if not record.plans:
        save_learned_only(model, AttachedAdapters())
    record.plans[name] = plan
    record.routing.select(name)
    return plan


def _refuse_foreign(model: nn.Module, plan: AdapterPlan, modules: dict[str, nn.Module]) -> None:
    """A plan holds for the model it was made for, and for its like."""
    wrong: list[str] = []
    for site in plan.sites:
        module = modules.get(site.module)
        kind = kind_of(module) if module is not None else None
        shape = kind.shape(module) if module is not None and kind is not None else ()
        rows = site.rows.whole if site.rows else site.shape[0]
        if kind is None or kind.name != site.kind or shape != (rows, *site.shape[1:]):
            wrong.append(site.name)
    for override in plan.overrides:
        own = (
            {n: tuple(p.shape) for n, p in (modules[override.module].named_parameters())}
            if override.module in modules
            else {}
        )
        if any(own.get(n) != tuple(shape) for n, shape in override.shapes.items()):
            wrong.append(override.module)
    if wrong:
        raise StateError(
            "the plan was made for another model",
            where=wrong[0],
            found=f"{len(wrong)} of its sites are missing in this {type(model).__name__}, or have "
            "other shapes",
            remedy="plan_adapter(model, spec) on this model",
        )


def _refuse_nesting(outer: Sequence[nn.Module], plan: AdapterPlan) -> None:
    """One adapter's whole-module copy cannot hold another adapter's layer inside."""
    wholes = {site.module for site in plan.overrides}
    wholes |= {module.name for module in outer if isinstance(module, OverriddenModule)}
    parts = [site.module for site in (*plan.sites, *plan.overrides)]
    parts += [m.name for m in outer if isinstance(m, Wrapper)]
    for whole in wholes:
        inside = [part for part in parts if part.startswith(whole + ".")]
        if inside:
            raise StateError(
                "one adapter trains a module as a whole, another changes a layer inside it",
                where=whole,
                found=inside[0],
                remedy="detach one of the two",
            )


def _freeze(
    model: nn.Module, record: Attachments, outer: Sequence[nn.Module]
) -> list[nn.Parameter]:
    """Freeze the base and every adapter; returns what was not frozen before."""
    if not record.plans:
        record.required_grad = {n: p.requires_grad for n, p in model.named_parameters()}
    frozen: list[nn.Parameter] = []
    wrappers: dict[str, Wrapper] = {}
    for module in outer:
        frozen += [p for p in module._parameters.values() if p is not None and p.requires_grad]
        if isinstance(module, Wrapper):
            wrappers[module.name] = module
    for name, plan in record.plans.items():
        firsts = [*plan.sites[:1], *plan.overrides[:1]]
        # One look per adapter, so that the hundredth is attached as fast as the first.
        if any(_learning(wrappers, first.module, name) for first in firsts):
            for site in (*plan.sites, *plan.overrides):
                frozen += _learning(wrappers, site.module, name)
    for parameter in frozen:
        parameter.requires_grad_(False)
    return frozen


def _learning(wrappers: dict[str, Wrapper], module: str, name: str) -> list[nn.Parameter]:
    """The parameters of one adapter at one module that require a gradient."""
    wrapper, held = wrappers.get(module), None
    if isinstance(wrapper, AdaptedLayer):
        held = wrapper.branch_of(name)
    elif isinstance(wrapper, OverriddenModule):
        held = wrapper.override_of(name)
    return [p for p in held.parameters() if p.requires_grad] if held is not None else []


def _install(
    record: Attachments,
    plan: AdapterPlan,
    name: str,
    *,
    modules: dict[str, nn.Module],
    outer: Sequence[nn.Module],
    fill: bool,
) -> None:
    wrappers = {m.name: m for m in outer if isinstance(m, Wrapper)}
    holders = places(outer)
    for module_name, sites in plan.modules().items():
        wrapper = wrappers.get(module_name)
        if not isinstance(wrapper, AdaptedLayer):
            base = _unwrapped(wrapper, modules[module_name], plan)
            kind = KINDS[sites[0].kind]
            if is_four_bit(base):
                settle(base)
            wrapper = AdaptedLayer(base, kind=kind, routing=record.routing, name=module_name)
            _replace(holders, base, wrapper)
        wrapper.factors[module_key(name)] = new_branch(wrapper, sites, plan.spec, fill=fill)
    for site in plan.overrides:
        wrapper = wrappers.get(site.module)
        base = modules[site.module]
        if not isinstance(wrapper, OverriddenModule):
            base = _unwrapped(wrapper, base, plan)
            wrapper = OverriddenModule(base, routing=record.routing, name=site.module)
            _replace(holders, base, wrapper)
        values = {n: trainable_copy(wrapper.base.get_parameter(n)) for n in site.shapes}
        wrapper.overrides[module_key(name)] = Override(values)


def _unwrapped(wrapper: Wrapper | None, base: nn.Module, plan: AdapterPlan) -> nn.Module:
    if wrapper is not None:
        raise StateError(
            "one adapter trains this module as a whole, another adds a low-rank update to it",
            where=wrapper.name,
            remedy="detach one of the two",
        )
    return base


def _replace(
    holders: dict[int, list[tuple[nn.Module, str]]], old: nn.Module, new: nn.Module
) -> None:
    for parent, attribute in holders[id(old)]:
        setattr(parent, attribute, new)


def active_adapter(model: nn.Module) -> str | tuple[str | None, ...] | None:
    """What runs now: a name, None for the base, or one of those per row."""
    record = find_attachments(bare_model(model))
    return record.routing.active if record else None


@contextmanager
def use(model: nn.Module, selection: str | Sequence[str | None] | None) -> Iterator[nn.Module]:
    """Run one adapter, the base, or one adapter per row inside this block.

    What was selected before comes back at the end, also after an error; blocks nest. `generate()`
    works inside, and so does training, as long as the backward pass runs inside too where gradient
    checkpointing recomputes the forward pass.

    Args:
        model: a model with adapters attached.
        selection: an adapter's name, None for the base alone, or one of those per batch row.

    Raises:
        StateError: an unknown name, an empty list, a merged adapter that would be left out, or rows
            of an architecture whose adapted layers do not see them one by one.
    """
    bare = bare_model(model)
    if selection is None and find_attachments(bare) is None:
        _refuse_attached_elsewhere(bare)
        yield model
        return
    record = attachments_of(bare)
    wanted = selection if selection is None or isinstance(selection, str) else tuple(selection)
    if wanted == ():
        raise StateError("no row is named", expected="one adapter name (or None) per row")
    for name in dict.fromkeys(wanted if isinstance(wanted, tuple) else (wanted,)):
        if name is not None:
            require_attached(bare, name)
    if isinstance(wanted, tuple) and len(wanted) > 1:
        _require_own_rows(bare)
    before = record.routing.active
    record.routing.select(wanted)
    try:
        yield model
    finally:
        record.routing.resume(before)


def _refuse_attached_elsewhere(model: nn.Module) -> None:
    """A part of the model, or what it is a part of, would run with the adapter on."""
    for module in model.modules():
        if isinstance(module, Wrapper) or find_attachments(module) is not None:
            raise StateError(
                "adapters are in this module, and were attached to another one",
                where=type(model).__name__,
                expected="the model that was given to attach",
                remedy="use(that model, None)",
            )


def _require_own_rows(model: nn.Module) -> None:
    leaves = [layer.name.rpartition(".")[2] for layer in adapted_layers(model)]
    reason = rows_not_apart(text_config(model), leaves)
    if reason is not None:
        raise StateError(
            "rows cannot have adapters of their own in this architecture",
            where=type(model).__name__,
            expected="one adapter (or None) for the whole batch",
            found=reason,
            remedy="run a batch per adapter: use(model, name)",
        )


def detach(model: nn.Module, name: str | None = None) -> None:
    """Take one adapter off the model, or all of them; the original modules come back.

    Mutates `model`. Where no adapter is left on a layer, the very module that was there before
    `attach` is put back. Weights into which an adapter was merged stay merged: merging and then
    detaching gives an ordinary model with the adapter folded in.

    Args:
        model: a model with adapters attached.
        name: the adapter, or None for all.

    Raises:
        StateError: no adapter of that name is attached.
    """
    model = bare_model(model)
    record = attachments_of(model)
    names = list(record.plans) if name is None else [name]
    for gone in names:
        require_attached(model, gone)
        _take_off(model, gone)
        del record.plans[gone]
        record.passports.pop(gone, None)
        _forget(record, gone)
    if not record.plans:
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(record.required_grad.get(parameter_name, True))
        save_whole_again(model)
        end_attachments(model)


def _forget(record: Attachments, name: str) -> None:
    """Take a name out of the routing; a merged one stays in the weights for good."""
    routing = record.routing
    if name in routing.merged:
        routing.merged.remove(name)
        if not routing.merged:
            record.kept = []
            record.untied_config = None
            record.base_fingerprint = None
    if routing.active == name or (isinstance(routing.active, tuple) and name in routing.active):
        routing.active = None


def _take_off(model: nn.Module, name: str) -> None:
    """Remove an adapter's tensors, and the wrappers that nothing needs any more."""
    key = module_key(name)
    for layer in adapted_layers(model):
        if key in layer.factors:
            del layer.factors[key]
    for module in overridden_modules(model):
        if key in module.overrides:
            del module.overrides[key]
    outer = tuple(outer_modules(model))
    holders = places(outer)
    for wrapper in [m for m in outer if isinstance(m, Wrapper)]:
        empty = (isinstance(wrapper, AdaptedLayer) and not len(wrapper.factors)) or (
            isinstance(wrapper, OverriddenModule) and not len(wrapper.overrides)
        )
        if empty:
            _replace(holders, wrapper, wrapper.base)
