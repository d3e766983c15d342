"""Ranks that move while the adapter learns (AdaLoRA): the plan it begins with."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from lorakit.adapters.plan import AdapterPlan, Site, plan_adapter
from lorakit.adapters.spec import LoraSpec
from lorakit.math.scaling import alpha_for


def plan_moving(model: nn.Module, spec: LoraSpec, start: float) -> AdapterPlan:
    """The plan of P diag(lambda) Q with more directions than the budget pays for at the end.

    Every site keeps the scaling s that the equal rank within the budget would have; that is the
    rank of the plan's spec. Changes nothing and works on the meta device.

    Args:
        model: the base.
        spec: with r "auto", a budget, and ranks "adalora".
        start: the rank to begin with, as a multiple of the equal one; no more than a matrix has.

    Raises:
        SpecError: the budget is too small, or a target is no linear layer.
        TargetError: see `plan_adapter`.
    """
    plan = plan_adapter(model, spec)
    return replace(plan, sites=tuple(_wider(site, spec, start) for site in plan.sites))


def _wider(site: Site, spec: LoraSpec, start: float) -> Site:
    r = max(1, min(round(start * site.r), *site.shape))
    return replace(site, r=r, alpha=alpha_for(site.scaling, r, spec.scaling), learns_values=True)
