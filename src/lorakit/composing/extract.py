"""A fine-tuned model as an adapter: the best low-rank approximation of what training changed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

# The format registers itself as the writer behind Adapter.save.
import lorakit.formats.peft  # noqa: F401  # pyright: ignore[reportUnusedImport]
from lorakit.adapters.adapter import Adapter, Factors
from lorakit.adapters.fingerprint import Sampled, fingerprint_of, sample
from lorakit.adapters.plan import AdapterPlan, Site, plan_adapter, whole_modules
from lorakit.adapters.spec import LoraSpec
from lorakit.errors import LorakitWarning, ModelError, SpecError
from lorakit.layers.kinds import KINDS, as_matrix
from lorakit.layers.low_rank import take_rows
from lorakit.math.truncate import truncate_dense
from lorakit.models.empty import empty_model
from lorakit.models.load import Ref, load_base_model
from lorakit.models.resolve import resolve_model
from lorakit.models.stored import StoredParameters
from lorakit.progress import track

_NUM_SHOWN = 6
Read = Callable[[str], Tensor]


@dataclass(frozen=True, slots=True)
class ExtractedSite:
    """One weight's change and what the adapter holds of it.

    Attributes:
        name: the site.
        r: its rank.
        norm: ||W_tuned - W_base||_F.
        error: the norm of what is left out.
    """

    name: str
    r: int
    norm: float
    error: float


@dataclass(frozen=True, slots=True)
class Rest:
    """A parameter that changed and is not approximated by a low rank.

    Attributes:
        name: the parameter.
        norm: ||tuned - base||_F.
        relative: the same over ||base||_F.
        kept: whether the adapter holds it whole.
    """

    name: str
    norm: float
    relative: float
    kept: bool


@dataclass(slots=True)
class Extraction:
    """An adapter and what it does not hold.

    Attributes:
        adapter: the result.
        sites: per changed weight.
        rest: changed parameters outside of the sites.
    """

    adapter: Adapter
    sites: list[ExtractedSite] = field(default_factory=list[ExtractedSite])
    rest: list[Rest] = field(default_factory=list[Rest])

    @property
    def relative_error(self) -> float:
        """What the sites' low ranks leave out, over what they should hold, in norm."""
        wanted = sum(site.norm**2 for site in self.sites)
        return (sum(site.error**2 for site in self.sites) / wanted) ** 0.5 if wanted else 0.0


def extract(
    base: Ref,
    tuned: Ref,
    r: int = 16,
    *,
    targets: str | tuple[str, ...] = "all-linear",
    also_train: tuple[str, ...] = (),
) -> Adapter:
    """The difference of two models of one architecture as an adapter on the first.

    Per targeted weight the singular value decomposition of W_tuned - W_base is cut to rank r
    (Eckart and Young 1936: the best approximation there is). The error of every site, and what
    changed elsewhere, stand in `passport["extraction"]`.

    Args:
        base: a hub id, a directory, a .gguf file or a named model.
        tuned: the same model after full fine-tuning.
        r: the rank.
        targets: what is approximated; see `LoraSpec`.
        also_train: modules that the adapter holds whole.

    Raises:
        ModelError: other architectures, shapes or quantized weights; or nothing differs.
        TargetError: targets that match nothing.

    Warns:
        LorakitWarning: parameters changed that the adapter does not hold.
    """
    if not isinstance(r, int) or r < 1:
        raise SpecError("the rank must be a whole number of at least 1", where="r", found=repr(r))
    spec = LoraSpec(r=r, alpha=float(r), targets=targets, also_train=also_train)
    return extract_with_report(base, tuned, spec).adapter


def extract_with_report(base: Ref, tuned: Ref, spec: LoraSpec) -> Extraction:
    """See `extract`; also tells the error of each site and what is left out.

    Args:
        base: the model the adapter will be for.
        tuned: the same model after full fine-tuning.
        spec: rank, targets, biases and modules kept whole; alpha = r makes the scaling 1.

    Raises:
        ModelError, TargetError: see `extract`.
    """
    model, other = empty_model(base), empty_model(tuned)
    _require_same_layout(model, other)
    with warnings.catch_warnings():
        # Notes on training (tied weights, ranks) are not about what was trained already.
        warnings.simplefilter("ignore", LorakitWarning)
        plan = plan_adapter(model, spec)
    read_base, read_tuned = _reader(base, model), _reader(tuned, other)
    found = Extraction(Adapter(spec=spec, factors={}))
    factors: dict[str, Factors] = {}
    whole: dict[str, Tensor] = {}
    sampled: list[Sampled] = []
    left_out = whole_modules(plan)
    sites = plan.modules()
    names = _all_names(model)
    for name in track(list(names), "comparing weights"):
        before = read_base(name)
        module, _, leaf = name.rpartition(".")
        known = next((n for n in names[name] if not _inside(n, left_out)), None)
        if known is not None:
            sampled.append(Sampled(known, tuple(before.shape), before.dtype, sample(before)))
        keep = _is_whole(plan, module, leaf)
        after = read_tuned(name)
        if keep:
            whole[name] = after.float().contiguous()
        change = after.float() - before.float()
        if not bool(change.any()):
            continue
        if leaf == "weight" and module in sites:
            for site in sites[module]:
                _approximate(site, change, factors, found)
        else:
            norm, size = float(change.norm()), float(before.float().norm())
            found.rest.append(Rest(name, norm, norm / size if size else float("inf"), keep))
    _require_some(factors, found, base, tuned)
    facts = fingerprint_of(sampled, left_out=left_out).to_json()
    found.adapter = _adapter(model, plan, factors, whole, _facts(found, base, tuned, model, facts))
    _warn_of_rest(found)
    return found


def _approximate(
    site: Site, change: Tensor, factors: dict[str, Factors], found: Extraction
) -> None:
    kind = KINDS[site.kind]
    matrix = take_rows(as_matrix(kind, change), site.rows)
    if not bool(matrix.any()):
        return
    cut = truncate_dense(matrix, site.r)
    r = cut.A.shape[0]
    # A given scaling stays: the factors carry the rest.
    shape_A, shape_B = kind.factor_shapes(site.shape, r)
    root = abs(site.scaling) ** 0.5
    factors[site.name] = Factors(
        A=(cut.A / root).reshape(shape_A).contiguous(),
        B=(cut.B / root).reshape(shape_B).contiguous(),
        alpha=site.alpha * r / site.r,
        scaling=site.scaling,
        kind=site.kind,
        module=site.module,
        rows=site.rows,
    )
    found.sites.append(ExtractedSite(site.name, r, cut.norm, cut.error))


def _all_names(model: PreTrainedModel) -> dict[str, list[str]]:
    """Parameter -> all names it has, itself first: tied weights have several."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {group[0]: group for group in groups.values()}


def _inside(parameter: str, owners: tuple[str, ...]) -> bool:
    return any(parameter.startswith(owner + ".") for owner in owners)


def _is_whole(plan: AdapterPlan, module: str, leaf: str) -> bool:
    """Whether the adapter holds this parameter as it is."""
    name = f"{module}.{leaf}"
    return any(
        name.startswith(o.module + ".") and name.removeprefix(o.module + ".") in o.shapes
        for o in plan.overrides
    )


def _reader(ref: Ref, model: PreTrainedModel) -> Read:
    """From the files, or where transformers renames tensors on load, from the loaded model."""
    stored = StoredParameters(resolve_model(ref).path, model)
    if not stored.missing:
        return stored.read
    loaded = dict(load_base_model(ref, dtype="auto", device="cpu").named_parameters())
    return lambda name: loaded[name].detach()


def _require_same_layout(base: PreTrainedModel, tuned: PreTrainedModel) -> None:
    mine = {name: tuple(p.shape) for name, p in base.named_parameters()}
    theirs = {name: tuple(p.shape) for name, p in tuned.named_parameters()}
    if type(base) is not type(tuned):
        raise ModelError(
            "the two models have different architectures",
            where="tuned",
            expected=type(base).__name__,
            found=type(tuned).__name__,
            remedy="give the base that this model was fine-tuned from",
        )
    wrong = [
        f"{name}: {mine.get(name, 'absent')} and {theirs.get(name, 'absent')}"
        for name in {**mine, **theirs}
        if mine.get(name) != theirs.get(name)
    ]
    if wrong:
        raise ModelError(
            "the two models have different layers or shapes",
            where="tuned",
            found="\n".join(wrong[:_NUM_SHOWN])
            + (f"\nand {len(wrong) - _NUM_SHOWN} more" if len(wrong) > _NUM_SHOWN else ""),
            remedy="an adapter cannot add tokens or layers: give a base of the same shape",
        )


def _require_some(factors: dict[str, Factors], found: Extraction, base: Ref, tuned: Ref) -> None:
    if factors:
        return
    changed = ", ".join(rest.name for rest in found.rest[:_NUM_SHOWN])
    raise ModelError(
        "no targeted weight differs" if changed else "the two models are the same",
        where=str(tuned),
        expected=f"a model that was trained from {base}",
        found=f"changed: {changed}" if changed else "every parameter is equal",
        remedy="target what changed" if changed else None,
    )


def _facts(
    found: Extraction,
    base: Ref,
    tuned: Ref,
    model: PreTrainedModel,
    fingerprint: dict[str, Any],
) -> dict[str, Any]:
    resolved = resolve_model(base)
    return {
        "method": "lora",
        "model": str(base),
        "base": {
            **fingerprint,
            "name": resolved.name,
            "architecture": type(model).__name__,
            "model_type": str(model.config.model_type),
            "storage": "dense",
        },
        "extraction": {
            "tuned": str(tuned),
            "relative_error": found.relative_error,
            "sites": [asdict(site) for site in found.sites],
            "rest": [asdict(rest) for rest in found.rest],
        },
    }


def _adapter(
    model: PreTrainedModel,
    plan: AdapterPlan,
    factors: dict[str, Factors],
    whole: dict[str, Tensor],
    passport: dict[str, Any],
) -> Adapter:
    task = "CAUSAL_LM" if type(model).__name__.endswith(("CausalLM", "LMHeadModel")) else None
    return Adapter(
        spec=plan.spec,
        factors=factors,
        overrides=whole,
        passport=passport,
        config={"base_model_name_or_path": passport["model"], "task_type": task},
    )


def _warn_of_rest(found: Extraction) -> None:
    lost = sorted((r for r in found.rest if not r.kept), key=lambda rest: -rest.relative)
    if lost:
        shown = ", ".join(f"{r.name} ({r.relative:.1%} of its norm)" for r in lost[:_NUM_SHOWN])
        warnings.warn(
            f"{len(lost)} changed parameters are not in the adapter, which holds low-rank changes "
            f"of its targets: {shown}; also_train keeps whole modules",
            LorakitWarning,
            stacklevel=4,
        )
