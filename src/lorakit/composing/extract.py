"""A fine-tuned model as an adapter: the best low-rank approximation of what training changed."""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from lorakit.adapters.adapter import Adapter, Factors
from lorakit.adapters.fingerprint import Sampled, fingerprint_of, sample
from lorakit.adapters.plan import AdapterPlan, Site, plan_adapter, whole_modules
from lorakit.adapters.spec import Bias, LoraSpec
from lorakit.composing.two_models import ModelPair, change_of, rounding_of
from lorakit.errors import LorakitWarning, ModelError, SpecError
from lorakit.layers.kinds import KINDS, as_matrix
from lorakit.layers.low_rank import take_rows
from lorakit.math.truncate import truncate_dense
from lorakit.models.empty import empty_model
from lorakit.models.load import Ref
from lorakit.models.resolve import resolve_model
from lorakit.progress import track

_NUM_SHOWN = 6
_MUCH_ROUNDING = 0.05
# Of a sum of squares in float64 that was taken in another order.
_SUMMED = 1e-12


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
        norm: ||tuned - base||_F; where parts of a fused projection are targeted, outside of them.
        relative: the same over ||base||_F; None where the base's is zero.
        kept: whether the adapter holds it whole.
    """

    name: str
    norm: float
    relative: float | None
    kept: bool


@dataclass(slots=True)
class Extraction:
    """An adapter and what it does not hold.

    Attributes:
        adapter: the result.
        sites: per changed weight.
        rest: changed parameters outside of the sites.
        rounding: what storing the base as coarsely as the tuned model would change at the sites,
            over what they should hold, in norm; 0 where it is stored as finely.
    """

    adapter: Adapter
    sites: list[ExtractedSite] = field(default_factory=list[ExtractedSite])
    rest: list[Rest] = field(default_factory=list[Rest])
    rounding: float = 0.0

    @property
    def relative_error(self) -> float:
        """What the sites' low ranks leave out, over what they should hold, in norm."""
        wanted = sum(site.norm**2 for site in self.sites)
        return (sum(site.error**2 for site in self.sites) / wanted) ** 0.5 if wanted else 0.0

    @property
    def relative_lost(self) -> float:
        """What the adapter does not hold of everything that changed, in norm, rest included."""
        lost = sum(site.error**2 for site in self.sites)
        lost += sum(rest.norm**2 for rest in self.rest if not rest.kept)
        everything = sum(one.norm**2 for one in (*self.sites, *self.rest))
        return (lost / everything) ** 0.5 if everything else 0.0


def extract(
    base: Ref,
    tuned: Ref,
    r: int = 16,
    *,
    targets: str | tuple[str, ...] = "all-linear",
    also_train: tuple[str, ...] = (),
    bias: Bias = "none",
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
        bias: biases that it holds whole: none, those of the targets (lora_only), or all.

    Raises:
        ModelError: other architectures, shapes or quantized weights; or nothing differs.
        TargetError: targets that match nothing.

    Warns:
        LorakitWarning: parameters changed that the adapter does not hold.
    """
    if not isinstance(r, int) or r < 1:
        raise SpecError("the rank must be a whole number of at least 1", where="r", found=repr(r))
    spec = LoraSpec(r=r, alpha=float(r), targets=targets, also_train=also_train, bias=bias)
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
    model = empty_model(base)
    pair = ModelPair(base, tuned, model, empty_model(tuned))
    with warnings.catch_warnings():
        # Notes on training (tied weights, ranks) are not about what was trained already.
        warnings.simplefilter("ignore", LorakitWarning)
        plan = plan_adapter(model, spec)
    work = _Work(plan)
    sampled: list[Sampled] = []
    left_out = whole_modules(plan)
    for first, names in track(list(pair.names.items()), "comparing weights"):
        before = pair.before(first)
        known = next((n for n in names if not _inside(n, left_out)), None)
        if known is not None:
            sampled.append(Sampled(known, tuple(before.shape), before.dtype, sample(before)))
        for name in work.places_of(names, one=pair.one_in_tuned(names)):
            work.compare(name, before, pair.after(name))
    work.settle_biases()
    found = Extraction(
        Adapter(spec=spec, factors={}), work.sites, work.rest, rounding=work.rounding_share()
    )
    _require_some(work.factors, found, base, tuned)
    facts = fingerprint_of(sampled, left_out=left_out).to_json()
    found.adapter = _adapter(model, work, _facts(found, base, tuned, model, facts))
    _warn_of_rest(found)
    _warn_of_settings(pair)
    return found


class _Work:
    """What an extraction has found so far.

    Args:
        plan: what is approximated, and what is kept whole.
    """

    def __init__(self, plan: AdapterPlan) -> None:
        self.plan = plan
        self.factors: dict[str, Factors] = {}
        self.whole: dict[str, Tensor] = {}
        self.biases: dict[str, Tensor] = {}
        self.sites: list[ExtractedSite] = []
        self.rest: list[Rest] = []
        self._targeted = plan.modules()
        self._kept = {f"{o.module}.{leaf}" for o in plan.overrides for leaf in o.shapes}
        self._squared_rounding = 0.0

    def places_of(self, names: list[str], *, one: bool) -> list[str]:
        """Which names of one parameter of the base to look at.

        Args:
            names: several where weights are tied; adapted or kept, each place has its own values.
            one: whether they are one parameter in the tuned model too.
        """
        held = [n for n in names if n in self._kept or self._sites(n)]
        return names if held or not one else names[:1]

    def _sites(self, name: str) -> list[Site]:
        module, _, leaf = name.rpartition(".")
        return self._targeted.get(module, []) if leaf == "weight" else []

    def compare(self, name: str, before: Tensor, after: Tensor) -> None:
        """Take what the adapter will hold of a parameter, and note what it will not."""
        module, _, leaf = name.rpartition(".")
        keep = name in self._kept
        if keep:
            self.whole[name] = after.float().contiguous()
        if leaf == "bias" and module in (self.plan.bias_sizes or {}):
            self.biases[module] = after.float().contiguous()
        change = change_of(before, after)
        if change is None:
            return
        sites = self._sites(name)
        for site in sites:
            self._approximate(site, change)
        if sites:
            self._squared_rounding += rounding_of(before, after) ** 2
        norm = _outside(sites, change) if sites else float(change.norm())
        if norm:
            size = float(before.float().norm())
            self.rest.append(Rest(name, norm, norm / size if size else None, keep))

    def _approximate(self, site: Site, change: Tensor) -> None:
        kind = KINDS[site.kind]
        matrix = take_rows(as_matrix(kind, change), site.rows)
        if not bool(matrix.any()):
            return
        cut = truncate_dense(matrix, site.r)
        r = cut.A.shape[0]
        # A given scaling stays: the factors carry the rest.
        shape_A, shape_B = kind.factor_shapes(site.shape, r)
        root = abs(site.scaling) ** 0.5
        self.factors[site.name] = Factors(
            A=(cut.A / root).reshape(shape_A).contiguous(),
            B=(cut.B / root).reshape(shape_B).contiguous(),
            alpha=site.alpha * r / site.r,
            scaling=site.scaling,
            kind=site.kind,
            module=site.module,
            rows=site.rows,
        )
        self.sites.append(ExtractedSite(site.name, r, cut.norm, cut.error))

    def settle_biases(self) -> None:
        """A bias is beside a layer's factors, or where the layer has none, on its own or lost."""
        adapted = {factors.module for factors in self.factors.values()}
        kept = {f"{module}.bias" for module in self.biases if module in adapted}
        alone = {m: bias for m, bias in self.biases.items() if m not in adapted}
        if self.plan.spec.bias == "all":
            self.whole.update({f"{module}.bias": bias for module, bias in alone.items()})
            kept |= {f"{module}.bias" for module in alone}
        self.biases = {m: bias for m, bias in self.biases.items() if m in adapted}
        self.rest = [replace(r, kept=r.kept or r.name in kept) for r in self.rest]

    def rounding_share(self) -> float:
        """What rounding explains of the sites' change, in norm."""
        wanted = sum(site.norm**2 for site in self.sites)
        return (self._squared_rounding / wanted) ** 0.5 if wanted else 0.0


def _outside(sites: list[Site], change: Tensor) -> float:
    """The norm of what lies outside of the parts of a fused projection that are targeted."""
    if any(site.rows is None for site in sites):
        return 0.0
    matrix = as_matrix(KINDS[sites[0].kind], change).double()
    inside = sum(float(take_rows(matrix, site.rows).square().sum()) for site in sites)
    total = float(matrix.square().sum())
    return (total - inside) ** 0.5 if total - inside > _SUMMED * total else 0.0


def _inside(parameter: str, owners: tuple[str, ...]) -> bool:
    return any(parameter.startswith(owner + ".") for owner in owners)


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
            "relative_lost": found.relative_lost,
            "rounding": found.rounding,
            "sites": [asdict(site) for site in found.sites],
            "rest": [asdict(rest) for rest in found.rest],
        },
    }


def _adapter(model: PreTrainedModel, work: _Work, passport: dict[str, Any]) -> Adapter:
    task = "CAUSAL_LM" if type(model).__name__.endswith(("CausalLM", "LMHeadModel")) else None
    return Adapter(
        spec=work.plan.spec,
        factors=work.factors,
        biases=work.biases,
        overrides=work.whole,
        passport=passport,
        config={"base_model_name_or_path": passport["model"], "task_type": task},
    )


def by_size(rest: Rest) -> float:
    """For sorting: what moved away from zero comes first."""
    return -(math.inf if rest.relative is None else rest.relative)


def _warn_of_rest(found: Extraction) -> None:
    lost = sorted((r for r in found.rest if not r.kept), key=by_size)
    if lost:
        shown = ", ".join(f"{r.name} ({_size(r)})" for r in lost[:_NUM_SHOWN])
        biases = any(r.name.endswith(".bias") for r in lost)
        _warn(
            f"{len(lost)} changed parameters are not in the adapter, which holds low-rank changes "
            f"of its targets: {shown}{' ...' if len(lost) > _NUM_SHOWN else ''}; also_train keeps "
            f"whole modules{', bias biases' if biases else ''}"
        )
    if found.rounding > _MUCH_ROUNDING:
        _warn(
            "the tuned model is stored more coarsely than the base: rounding alone changes its "
            f"weights by {found.rounding:.0%} of what is extracted, and no low rank holds that"
        )


def _size(rest: Rest) -> str:
    return "from zero" if rest.relative is None else f"by {rest.relative:.1%} of its norm"


def _warn_of_settings(pair: ModelPair) -> None:
    other = pair.other_settings()
    if other:
        shown = [f"{key} {mine!r} and {theirs!r}" for key, (mine, theirs) in other.items()]
        _warn(
            "the two configurations differ, and an adapter holds weights only: "
            + ", ".join(shown[:_NUM_SHOWN])
        )


def _warn(text: str) -> None:
    warnings.warn(text, LorakitWarning, stacklevel=5)
