"""An analysis as one page: what was measured, drawn and in tables, with what it means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

from lorakit.analysis.pairs import Similarity
from lorakit.analysis.plots import heat_maps, over_steps, spectra
from lorakit.analysis.run import Analysis, SiteFacts
from lorakit.analysis.spectra import INTRUDER_THRESHOLD, NUM_LEADING
from lorakit.formatting import format_count, format_number, format_share
from lorakit.report.layer_figures import MAX_REFERENCES, Chart, by_layer, layer_of, short_names
from lorakit.report.schema import Report, Section, Tile

_MAX_MAPS = 7
_MAX_ROWS = 8
_OF = {
    "A": "the right singular vectors of A, as in the paper",
    "B": "the left singular vectors of B",
    "delta-in": "the right singular vectors of the weight's change",
    "delta-out": "the left singular vectors of the weight's change",
}


def page(analysis: Analysis, command: str = "") -> Report:
    """The report of an analysis."""
    labels = list(analysis.adapters)
    return {
        "title": f"Analysis: {' and '.join(labels)}",
        "subtitle": "; ".join(analysis.notes),
        "tiles": _tiles(analysis),
        "sections": [*_pair(analysis), *(s for label in labels for s in _single(analysis, label))],
        "details": {label: _facts(facts) for label, facts in analysis.adapters.items()},
        "command": command,
    }


def middle_sites(sites: Sequence[str], limit: int) -> list[str]:
    """For each kind of site the one in the middle of the model, at most `limit` of them."""
    kinds: dict[str, list[str]] = {}
    for site, kind in short_names(sites).items():
        kinds.setdefault(kind, []).append(site)
    chosen = [
        sorted(names, key=lambda name: layer_of(name) or 0)[len(names) // 2]
        for names in kinds.values()
    ]
    return chosen[:limit]


def _facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {key.replace("_", " "): value for key, value in facts.items() if value is not None}


def _tiles(analysis: Analysis) -> list[Tile]:
    tiles: list[Tile] = []
    for label, facts in analysis.adapters.items():
        sites = [site for site in analysis.sites if site.adapter == label]
        norm = sum(site.spectrum.norm**2 for site in sites) ** 0.5
        used = sum(site.spectrum.effective_rank for site in sites) / len(sites)
        ranks = facts["ranks"]
        rank = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        tiles.append(
            {
                "label": f"{label}: effective rank",
                "value": f"{used:.2f}",
                "note": f"mean over {len(sites)} sites of rank {rank}",
            }
        )
        tiles.append(
            {
                "label": f"{label}: size of the change",
                "value": format_number(norm),
                "note": f"Frobenius norm; {format_count(facts['num_params'])} parameters",
            }
        )
        tiles += _base_tiles(label, sites)
    return tiles


def _base_tiles(label: str, sites: Sequence[SiteFacts]) -> list[Tile]:
    """What one adapter does to its base, where that was measured."""
    tiles: list[Tile] = []
    factors = [s.amplification.factor for s in sites if s.amplification]
    known = [factor for factor in factors if factor is not None]
    if known:
        tiles.append(
            {
                "label": f"{label}: amplification",
                "value": format_number(median(known)),
                "note": "median; how much the update amplifies what the weight has there",
            }
        )
    new = [len(site.intruders.positions) for site in sites if site.intruders]
    if new:
        tiles.append(
            {
                "label": f"{label}: intruder dimensions",
                "value": format_count(sum(new)),
                "note": f"in {sum(n > 0 for n in new)} of {len(new)} weights",
            }
        )
    return tiles


def _pair(analysis: Analysis) -> list[Section]:
    sections: list[Section] = []
    if analysis.subspaces:
        sections += _subspace_sections(analysis.subspaces, list(analysis.adapters))
    if analysis.agreement:
        found = analysis.agreement
        sections.append(
            {
                "title": "Where the two adapters agree",
                "svg": by_layer(
                    {a.site: a.cosine for a in found},
                    Chart(label="cosine of the two changes", references=((0.0, "unrelated"),)),
                ),
                "note": "The cosine of the two changes as vectors: 1 the same direction, -1 the "
                "opposite. Shares of input and output directions and conflicts of sign are in "
                "agreement.csv; the table has the weights that agree most and least.",
                "columns": ["site", "cosine", "inputs", "outputs", "sign conflict"],
                "rows": [
                    [
                        a.site,
                        format_number(a.cosine),
                        format_number(a.inputs),
                        format_number(a.outputs),
                        format_share(a.sign_conflict),
                    ]
                    for a in _ends(sorted(found, key=lambda a: -a.cosine))
                ],
            }
        )
    return sections


def _ends(ordered: list[Any]) -> list[Any]:
    half = _MAX_ROWS // 2
    return ordered if len(ordered) <= _MAX_ROWS else [*ordered[:half], *ordered[-half:]]


def _subspace_sections(found: Sequence[Similarity], labels: list[str]) -> list[Section]:
    by_site = {s.site: s for s in found}
    shown = [by_site[site] for site in middle_sites(list(by_site), _MAX_MAPS)]
    return [
        {
            "title": "Subspaces in common",
            "svg": heat_maps(shown, (labels[0], labels[1])),
            "note": "phi(i, j) of the leading i and j directions (Hu et al. 2021, eq. 4): 1 where "
            "one subspace contains the other, 0 where they are orthogonal. Directions: "
            f"{_OF[found[0].of]}. One weight of each kind, in the middle of the model; the "
            "Gaussian panels are chance for inputs or outputs of size d. All weights are in "
            "subspaces.csv.",
        },
        {
            "title": "The first direction of each weight",
            "svg": by_layer(
                {s.site: s.first for s in found},
                Chart(label="phi(1, 1)", bottom=0, top=1.03),
            ),
            "note": "Whether the strongest direction is the same in both adapters.",
        },
        {
            "title": "All directions of each weight",
            "svg": by_layer(
                {s.site: s.whole for s in found},
                Chart(label="phi(r1, r2)", bottom=0, top=1.03, references=_chances(found)),
            ),
            "note": "Random subspaces would share max(r1, r2) / d.",
        },
    ]


def _chances(found: Sequence[Similarity]) -> tuple[tuple[float, str], ...]:
    """What random subspaces of the weights' sizes would share: each level, or one for all."""
    levels = sorted({s.chance for s in found})
    if len(levels) > MAX_REFERENCES:
        return ((fmean(s.chance for s in found), "chance, mean"),)
    if len(levels) == 1:
        return ((levels[0], "chance"),)
    sizes = {s.chance: s.d for s in found}
    if len(set(sizes.values())) < len(levels):
        return tuple((level, f"chance, {format_number(level)}") for level in levels)
    return tuple((level, f"chance, d = {sizes[level]}") for level in levels)


def _single(analysis: Analysis, label: str) -> list[Section]:
    sites = [site for site in analysis.sites if site.adapter == label]
    of = "" if len(analysis.adapters) == 1 else f": {label}"
    sections: list[Section] = []
    relative = {s.site: s.relative_norm for s in sites if s.relative_norm is not None}
    if "spectra" in analysis.measures:
        sections += _spectrum_sections(sites, of)
    if "spectra" in analysis.measures and relative:
        sections.append(
            {
                "title": f"Size of the change{of}",
                "svg": by_layer(relative, Chart(label="||dW|| / ||W0||", log=_spread(relative))),
                "note": "Frobenius norms.",
            }
        )
    if label in analysis.norms:
        sections.append(
            {
                "title": f"Norms over training{of}",
                "svg": over_steps(analysis.norms[label], Chart(label="||dW||", bottom=0)),
                "note": "Mean over the layers at each checkpoint that the run kept; pale: from the "
                "smallest to the largest.",
            }
        )
    amplified = [site for site in sites if site.amplification is not None]
    if amplified:
        sections += _amplification_sections(amplified, of)
    new = {s.site: float(len(s.intruders.positions)) for s in sites if s.intruders is not None}
    if new:
        sections.append(_intruder_section(new, of))
    return sections


def _intruder_section(new: Mapping[str, float], of: str) -> Section:
    section: Section = {
        "title": f"Intruder dimensions{of}",
        "note": "Leading left singular vectors of W0 + dW whose cosine with every one of W0's is "
        f"below {INTRUDER_THRESHOLD} (Shuttleworth et al. 2024).",
    }
    if any(new.values()):
        chart = Chart(label=f"of the {NUM_LEADING} leading directions", bottom=0)
        section["svg"] = by_layer(new, chart)
    else:
        section["note"] = f"None in {len(new)} weights. {section['note']}"
    return section


def _spectrum_sections(sites: Sequence[SiteFacts], of: str) -> list[Section]:
    if not any(site.spectrum.norm for site in sites):
        return []
    return [
        {
            "title": f"Singular values of the change{of}",
            "svg": spectra({s.site: s.spectrum for s in sites}),
            "note": "Relative to the first; the median over the layers.",
        },
        {
            "title": f"Effective rank{of}",
            "svg": by_layer(
                {s.site: s.spectrum.effective_rank for s in sites},
                Chart(label="effective rank", bottom=0),
            ),
            "note": "exp of the entropy of the singular values (Roy and Vetterli 2007): how many "
            f"directions are in use. The ranks here are {_ranks(sites)}.",
        },
    ]


def _ranks(sites: Sequence[SiteFacts]) -> str:
    ranks = sorted({site.spectrum.r for site in sites})
    return ", ".join(map(str, ranks[:12]))


def _amplification_sections(sites: Sequence[SiteFacts], of: str) -> list[Section]:
    factors = {
        s.site: s.amplification.factor
        for s in sites
        if s.amplification is not None and s.amplification.factor is not None
    }
    shown = set(middle_sites([site.site for site in sites], _MAX_ROWS))
    rows: list[list[str]] = []
    for site in sites:
        found = site.amplification
        if site.site not in shown or found is None:
            continue
        rows.append(
            [
                site.site,
                str(found.r),
                format_number(found.of_update),
                format_number(found.of_base),
                format_number(found.of_random),
                format_number(found.base_norm),
                format_number(found.update_norm),
                "–" if found.factor is None else format_number(found.factor),
            ]
        )
    section: Section = {
        "title": f"Amplification{of}",
        "columns": ["site", "r", "along dW", "along W0", "random", "||W0||", "||dW||", "factor"],
        "rows": rows,
        "note": "||U^T W0 V^T|| for the leading directions U, V of dW, of W0 itself, and of a "
        "random matrix (the paper's Table 7), for one weight of each kind in the middle of the "
        "model. The factor is ||dW|| over the first: how much the update amplifies directions "
        "that W0 has but does not emphasise.",
    }
    if factors:
        section["svg"] = by_layer(
            factors, Chart(label="amplification factor", log=_spread(factors))
        )
    return [section]


def _spread(values: Mapping[str, float]) -> bool:
    """Whether the values need a logarithmic axis: all positive, and more than a factor of ten."""
    low, high = min(values.values()), max(values.values())
    return low > 0 and high > 30 * low
