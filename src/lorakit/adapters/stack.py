"""A new adapter that begins with a saved one: it goes on from its values, or lies on top of it.

Stacked, the saved update stays frozen beneath: W0 + s1 B1 A1 + s B A, with B = 0 at the start. Both
are saved as one adapter whose ranks are [A; A1] and [B, s1/s B1], which every reader of the format
loads.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.attach import attach, detach
from lorakit.adapters.attachments import adapted_layers
from lorakit.adapters.bind import plan_binding
from lorakit.adapters.identity import require_same_base
from lorakit.adapters.parameters import stacked_parameters
from lorakit.adapters.plan import AdapterPlan, plan_adapter
from lorakit.adapters.ranks import spec_of_factors
from lorakit.adapters.spec import DATA_INITS, NONZERO_INITS, LoraSpec
from lorakit.errors import SpecError

_SHOWN = 4


def spec_to_continue(adapter: Adapter, *, dropout: float) -> LoraSpec:
    """The request whose answer is this adapter as it stands, with a dropout of its own.

    Raises:
        SpecError: it changes parameters that would be trained as a whole.
    """
    if adapter.tokens or stacked_parameters(adapter):
        raise SpecError(
            "expert weights and rows of tokens would be trained on as whole parameters",
            where="continue_from",
            found=", ".join([*stacked_parameters(adapter), *adapter.tokens][:_SHOWN]),
            remedy="merge it, and train a new adapter on the merged model: lorakit merge",
        )
    spec = spec_of_factors(adapter.spec, adapter.factors)
    return replace(spec, targets=tuple(adapter.factors) or spec.targets, dropout=dropout)


def check_beneath(first: Adapter, spec: LoraSpec) -> None:
    """Refuse what cannot lie beneath another adapter, or on top of one.

    Args:
        first: the saved adapter.
        spec: the new one's.

    Raises:
        SpecError: one of them is more than a plain low-rank update.
    """
    reason = None
    if "dora" in (first.spec.update, spec.update):
        reason = "DoRA's change is no sum of low-rank updates"
    elif first.biases or first.overrides or first.tokens:
        reason = "the saved adapter also replaces biases, whole modules or rows of tokens"
    elif stacked_parameters(first):
        reason = "the saved adapter changes parameters that stack experts"
    elif spec.init in NONZERO_INITS | DATA_INITS or spec.ranks != "uniform":
        reason = "starts and ranks taken from weights or data look at the base without the adapter"
    elif spec.bias != "none" or spec.also_train:
        reason = "biases and modules trained beside are not written as ranks"
    if reason:
        raise SpecError(
            f"an adapter cannot be put on top of this one: {reason}",
            where="on_top_of",
            expected="two plain LoRA adapters; init gaussian or kaiming",
            remedy="go on training the saved adapter: continue_from",
        )


def plan_stacked(model: nn.Module, spec: LoraSpec, first: Adapter) -> AdapterPlan:
    """The plan of a new adapter on top of a saved one; changes nothing, works on the meta device.

    Raises:
        SpecError: see `check_beneath`; or the new adapter leaves out a site of the saved one.
        AdapterFileError: the saved adapter does not bind to this model.
        TargetError: see `plan_adapter`.
    """
    check_beneath(first, spec)
    first = plan_binding(model, first)
    plan = plan_adapter(model, spec)
    sites = {site.name: site for site in plan.sites}
    missing = [
        name for name, f in first.factors.items() if name not in sites or sites[name].rows != f.rows
    ]
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        leaves = dict.fromkeys(f.module.rpartition(".")[2] for f in first.factors.values())
        raise SpecError(
            "the adapter on top must change every site that the one beneath changes",
            where="targets",
            expected=f"at least {', '.join(leaves)}",
            found=f"without {', '.join(missing[:_SHOWN])}{more}",
            remedy="add these targets, or go on training the saved adapter: continue_from",
        )
    return plan


def attach_stacked(
    model: nn.Module, plan: AdapterPlan, first: Adapter, name: str, *, any_base: bool = False
) -> None:
    """Attach a new adapter on top of a saved one; the model then computes what the saved one does.

    Mutates `model`; the new adapter is active. What is saved under its name holds both.

    Args:
        model: the base.
        plan: of `plan_stacked` for this model.
        first: the saved adapter.
        name: the new adapter's name.
        any_base: also where the passport names another base.

    Raises:
        BaseMismatchError: the saved adapter's passport names another base.
        StateError: see `attach`.
    """
    if not any_base:
        require_same_base(model, first.passport)
    attach(model, plan, name)
    try:
        for layer in adapted_layers(model):
            branch = layer.branch_of(name)
            if branch is None:
                continue
            for site, update in zip(plan.modules()[layer.name], branch.updates(), strict=True):
                beneath = first.factors.get(site.name)
                if beneath is not None:
                    update.put_on(beneath.A, beneath.B, beneath.scaling)
    except BaseException:
        detach(model, name)
        raise
