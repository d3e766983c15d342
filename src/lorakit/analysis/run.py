"""Measure one adapter, or two side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from lorakit.adapters.composition.identity import require_common_base
from lorakit.adapters.composition.recipe import Part
from lorakit.analysis.options import AnalyzeOptions
from lorakit.analysis.pairs import Agreement, Similarity, agreement, common_sites, similarity
from lorakit.analysis.spectra import Amplification, Intruders, Spectrum, WeightView, spectrum
from lorakit.analysis.training import SiteAtStep, adapter_of, norms_over_training, run_of
from lorakit.analysis.updates import (
    Base,
    Source,
    Update,
    labels_of,
    on_base,
    read_source,
    require_sites,
)
from lorakit.errors import RequestError
from lorakit.progress import track


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteFacts:
    """What one adapter does to one weight; what was not measured is None.

    Attributes:
        adapter: the adapter's label.
        site: the site's name.
        shape: (out, in).
        scaling: s.
        spectrum: size and singular values.
        relative_norm: ||dW||_F / ||W0||_F.
        amplification: Table 7.
        intruders: new leading directions.
    """

    adapter: str
    site: str
    shape: tuple[int, int]
    scaling: float
    spectrum: Spectrum
    relative_norm: float | None = None
    amplification: Amplification | None = None
    intruders: Intruders | None = None


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """What was measured.

    Attributes:
        adapters: label -> what the adapter is.
        measures: what was asked for.
        sites: every site of every adapter.
        subspaces: Figures 3 and 4, one per common site.
        agreement: one per common site.
        norms: label -> size of every update at every checkpoint.
        notes: what the reader should know.
    """

    adapters: dict[str, dict[str, Any]]
    measures: tuple[str, ...]
    sites: list[SiteFacts]
    subspaces: list[Similarity] = field(default_factory=list[Similarity])
    agreement: list[Agreement] = field(default_factory=list[Agreement])
    norms: dict[str, list[SiteAtStep]] = field(default_factory=dict[str, list[SiteAtStep]])
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "adapters": self.adapters,
            "measures": list(self.measures),
            "sites": [asdict(site) for site in self.sites],
            "subspaces": [
                {**asdict(found), "phi": found.phi.tolist(), "control": found.control.tolist()}
                for found in self.subspaces
            ],
            "agreement": [asdict(found) for found in self.agreement],
            "norms": {label: [asdict(row) for row in rows] for label, rows in self.norms.items()},
            "notes": list(self.notes),
        }


def analyze(
    paths: Sequence[str | Path],
    options: AnalyzeOptions | None = None,
    *,
    base: Base | Callable[[], Base] | None = None,
) -> Analysis:
    """Measure what one adapter does to its base, or two adapters side by side.

    Args:
        paths: one or two directories: adapters in PEFT's layout, or runs of `lorakit train`.
        options: what is measured; everything that is possible by default.
        base: the weights that are changed, or what loads them: it is called when everything else
            is known to be possible. Without them, what needs them is left out.

    Raises:
        RequestError: not one or two adapters, no site in common, or something that cannot be
            measured with what is given.
        AdapterFileError: an adapter cannot be read, has numbers that are not finite, or does not
            fit the base.
        BaseMismatchError: an adapter was made for another base than the given one, or than the
            other adapter.
        StateError: a DoRA adapter without its base.
    """
    options = options or AnalyzeOptions()
    if not 1 <= len(paths) <= 2:
        raise RequestError(
            "one or two adapters can be analyzed at a time",
            where="adapters",
            expected="one, or two to compare",
            found=str(len(paths)),
        )
    runs = [run_of(path) for path in paths]
    given = {"base"} if base is not None else set[str]()
    given |= {"pair"} if len(paths) == 2 else set()
    given |= {"run"} if any(runs) else set()
    measures = options.chosen(frozenset(given))
    sources = [
        read_source(adapter_of(path), sites=options.sites, label=label)
        for path, label in zip(paths, labels_of(paths), strict=True)
    ]
    if not options.any_base:
        require_common_base([Part(s.label, s.adapter, 1.0) for s in sources], None)
    if not any(source.adapter.tokens for source in sources):
        _common(sources)  # what cannot be compared is refused before the base is loaded
    if callable(base):
        base = base()
    if base is not None:
        sources = [on_base(source, base, any_base=options.any_base) for source in sources]
    for source in sources:
        require_sites(source)
    common = _common(sources)
    generator = torch.Generator().manual_seed(options.seed)
    return Analysis(
        adapters={source.label: _facts(source) for source in sources},
        measures=measures,
        sites=_all_sites(sources, options, measures, base, generator),
        subspaces=_subspaces(sources, common, options, generator)
        if "subspaces" in measures
        else [],
        agreement=_agreement(sources, common) if "agreement" in measures else [],
        norms={
            source.label: norms_over_training(run, base=base, sites=options.sites)
            for source, run in zip(sources, runs, strict=True)
            if run is not None and "norms" in measures
        },
        notes=_notes(sources, common, base),
    )


def _common(sources: Sequence[Source]) -> list[str]:
    return common_sites(*sources) if len(sources) == 2 else []


def _facts(source: Source) -> dict[str, Any]:
    adapter = source.adapter
    ranks = sorted({update.r for update in source.updates.values()})
    return {
        "path": str(source.path),
        "update": adapter.spec.update,
        "ranks": ranks,
        "num_sites": len(source.updates),
        "num_params": adapter.num_params(),
        "base": adapter.config.get("base_model_name_or_path"),
    }


def _all_sites(
    sources: Sequence[Source],
    options: AnalyzeOptions,
    measures: Sequence[str],
    base: Base | None,
    generator: torch.Generator,
) -> list[SiteFacts]:
    """Site by site, so that W0 is decomposed once for both adapters and then let go."""
    needs_weight = bool({"amplification", "intruders"} & set(measures))
    names = list(dict.fromkeys(site for source in sources for site in source.updates))
    found: dict[tuple[str, str], SiteFacts] = {}
    for site in track(names, "measuring"):
        holders = [source for source in sources if site in source.updates]
        view: WeightView | None = None
        if base is not None and needs_weight:
            view = WeightView(base.weight(holders[0].adapter.factors[site]))
        for source in holders:
            update = source.updates[site]
            weight_norm = None
            if view is not None:
                weight_norm = float(view.values.norm())
            elif base is not None:
                weight_norm = float(base.weight(source.adapter.factors[site]).norm())
            size = spectrum(update)
            found[source.label, site] = SiteFacts(
                adapter=source.label,
                site=site,
                shape=update.shape,
                scaling=update.scaling,
                spectrum=size,
                relative_norm=size.norm / weight_norm if weight_norm else None,
                amplification=_amplification(view, update, options, generator)
                if "amplification" in measures
                else None,
                intruders=view.intruders(update) if view and "intruders" in measures else None,
            )
    return [found[source.label, site] for source in sources for site in source.updates]


def _amplification(
    view: WeightView | None, update: Update, options: AnalyzeOptions, generator: torch.Generator
) -> Amplification | None:
    if view is None:
        return None
    return view.amplification(update, options.directions or update.r, generator=generator)


def _subspaces(
    sources: Sequence[Source],
    common: Sequence[str],
    options: AnalyzeOptions,
    generator: torch.Generator,
) -> list[Similarity]:
    first, second = sources
    pairs = ((first.updates[site], second.updates[site]) for site in common)
    found = (similarity(one, other, options.of, generator=generator) for one, other in pairs)
    return [similarity for similarity in found if similarity is not None]


def _agreement(sources: Sequence[Source], common: Sequence[str]) -> list[Agreement]:
    first, second = sources
    return [
        agreement(first.updates[site], second.updates[site]) for site in track(common, "comparing")
    ]


def _notes(sources: Sequence[Source], common: Sequence[str], base: Base | None) -> tuple[str, ...]:
    notes: list[str] = []
    for source in sources:
        alone = [site for site in source.updates if site not in set(common)]
        if common and alone:
            notes.append(f"of {source.label} not in the other adapter: {_some(alone)}")
        zero = [site for site, update in source.updates.items() if not float(update.svd[1].norm())]
        if zero:
            notes.append(f"updates of {source.label} that are zero: {_some(zero)}")
        adapter = source.adapter
        beside = [*adapter.biases, *adapter.overrides]
        beside += [f"rows of tokens in {name}" for name in adapter.tokens]
        if beside:
            notes.append(f"{source.label} also replaces, not looked at: {_some(beside)}")
    named = {s.label: s.adapter.config.get("base_model_name_or_path") for s in sources}
    if len({name for name in named.values() if name}) > 1:
        bases = ", ".join(f"{label} names {name}" for label, name in named.items())
        notes.append(f"the adapters do not name the same base: {bases}")
    if base is None:
        notes.append("without the base, amplification, intruders and relative norms are left out")
    return tuple(notes)


def _some(names: Sequence[str]) -> str:
    """How many, and the first."""
    return names[0] if len(names) == 1 else f"{len(names)}, the first is {names[0]}"
