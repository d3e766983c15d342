"""An adapter copied out of a live model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from lorakit.adapters.adapter import Adapter, Factors
from lorakit.adapters.attachments import (
    adapted_layers,
    attachments_of,
    overridden_modules,
    require_attached,
)
from lorakit.adapters.identity import base_facts
from lorakit.adapters.plan import AdapterPlan, Site, whole_modules
from lorakit.adapters.ranks import spec_of_factors
from lorakit.adapters.spec import NONZERO_INITS, LoraSpec
from lorakit.adapters.targets import bare_model, base_modules
from lorakit.layers.adapted import AdaptedLayer
from lorakit.layers.low_rank import Branch, LowRank
from lorakit.layers.updates import base_norms as rows_of_base
from lorakit.math.scaling import Scaling, alpha_for


def adapter_from_model(
    model: nn.Module, name: str = "default", *, passport: Mapping[str, Any] | None = None
) -> Adapter:
    """Copy an attached adapter out of the model; changes nothing.

    Args:
        model: a model with the adapter attached.
        name: the adapter.
        passport: what else is known of it (data, metrics ...); the base's fingerprint, the
            architecture and the method are filled in.

    Raises:
        StateError: no adapter of that name is attached.
    """
    model = bare_model(model)
    plan = require_attached(model, name)
    record = attachments_of(model)
    factors: dict[str, Factors] = {}
    biases: dict[str, Tensor] = {}
    base_norms: dict[str, Tensor] = {}
    by_module = plan.modules()
    for layer in adapted_layers(model):
        branch = layer.branch_of(name)
        if branch is None:
            continue
        for site, update in zip(by_module[layer.name], branch.updates(), strict=True):
            factors[site.name] = _factors_of(site, update, plan.spec.scaling)
        norms = _rest_norms(layer, branch)
        if norms is not None:
            base_norms[layer.name] = norms
        if branch.bias is not None:
            biases[layer.name] = _copy(branch.bias)
    overrides: dict[str, Tensor] = {}
    for module in overridden_modules(model):
        override = module.override_of(name)
        for parameter, value in override.tensors().items() if override else ():
            overrides[f"{module.name}.{parameter}"] = _copy(value)
    known = dict(record.passports.get(name, {}))
    known.update(passport or {})
    spec = _spec_as_saved(plan, factors)
    if spec != plan.spec and not any(site.learns_values for site in plan.sites):
        known["trained_as"] = plan.spec.to_dict()
    known["base"] = base_facts(model, whole_modules(plan))
    return Adapter(
        spec=spec,
        factors=factors,
        biases=biases,
        overrides=overrides,
        passport=known,
        base_norms=base_norms,
        target_modules=_short_names(model, list(by_module)),
        config=_foreign_facts(model, overrides),
    )


def _spec_as_saved(plan: AdapterPlan, factors: Mapping[str, Factors]) -> LoraSpec:
    """The request that the factors answer as they are saved."""
    if plan.spec.init in NONZERO_INITS:
        # Saved for the untouched base: s (B A - B0 A0), of twice the rank.
        return plan.spec.doubled()
    if any(site.learns_values or factors[site.name].r != site.r for site in plan.sites):
        # On top of a frozen update, which is saved as further ranks; or ranks have moved.
        return spec_of_factors(plan.spec, factors)
    return plan.spec


def _factors_of(site: Site, update: LowRank, rule: Scaling) -> Factors:
    A, B = update.effective()
    r = A.shape[0]
    return Factors(
        A=_copy(A),
        B=_copy(B),
        alpha=site.alpha if r == site.r else alpha_for(site.scaling, r, rule),
        scaling=site.scaling,
        kind=site.kind,
        module=site.module,
        rows=site.rows,
        magnitude=None if update.magnitude is None else _copy(update.magnitude),
    )


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _rest_norms(layer: AdaptedLayer, branch: Branch) -> Tensor | None:
    """Row norms of the base for the rows that no part owns, where DoRA adapts parts."""
    updates = branch.updates()
    if updates[0].magnitude is None or updates[0].rows is None:
        return None
    return _copy(rows_of_base(layer))


_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


# With such a task PEFT takes these modules for part of the adapter, and stops if they are not.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def _foreign_facts(model: nn.Module, overrides: Iterable[str]) -> dict[str, Any]:
    config: Any = getattr(model, "config", None)
    class_name = type(model).__name__
    task = next((task for ending, task in _TASKS.items() if class_name.endswith(ending)), None)
    heads = [name for name in base_modules(model) if name.endswith(_HEADS.get(task or "", ()))]
    saved = tuple(overrides)
    if not all(any(name.startswith(f"{head}.") for name in saved) for head in heads):
        task = None
    return {
        "base_model_name_or_path": getattr(config, "name_or_path", None) or None,
        "task_type": task,
    }


def _short_names(model: nn.Module, adapted: list[str]) -> tuple[str, ...]:
    """Leaf names, if they mean exactly the adapted modules; full names otherwise."""
    leaves = dict.fromkeys(name.rpartition(".")[2] for name in adapted)
    meant = {n for n in base_modules(model) if n.rpartition(".")[2] in leaves}
    return tuple(leaves) if meant == set(adapted) else tuple(adapted)
