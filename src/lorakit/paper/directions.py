"""Table 7 and Figures 3 and 4: where trained adapters point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import median, quantiles
from typing import Any

from lorakit.analysis.options import AnalyzeOptions
from lorakit.analysis.page import middle_sites
from lorakit.analysis.pairs import Similarity
from lorakit.analysis.run import analyze
from lorakit.analysis.updates import Base
from lorakit.formatting import format_number
from lorakit.models.load import load_base_model
from lorakit.paper.comparisons import Request, weights_of
from lorakit.paper.findings import Finding, compare_layers
from lorakit.report.layer_figures import layer_of, leaf_of

# ||U^T W_q V^T||_F of GPT-3's layer 48 along dW, W and a random matrix; ||dW||_F (Table 7).
TABLE_7 = {
    4: {"of_update": 0.32, "of_base": 21.67, "of_random": 0.02, "update_norm": 6.91},
    64: {"of_update": 1.90, "of_base": 37.71, "of_random": 0.33, "update_norm": 3.57},
}
BASE_NORM = 61.95
_QUERY, _VALUE = "q_proj", "v_proj"
_AMPLIFIED = AnalyzeOptions(measures=("amplification",), sites=(_QUERY,))
_SHARED = AnalyzeOptions(measures=("subspaces",), sites=(_QUERY, _VALUE))
Sites = dict[str, dict[str, Any]]


def amplification(request: Request, documents: Mapping[str, Any]) -> dict[str, Any]:
    """Table 7 for W_q of every layer, at both ranks.

    Returns:
        rank -> site -> the numbers.
    """
    (part,) = request.experiment.parts
    ref = documents[part.config]["config"]["base"]["model"]
    # The configs name it in one of two ways.
    base = Base(load_base_model(ref if isinstance(ref, str) else ref["ref"], dtype="float32"))
    found: dict[str, Any] = {}
    for rank in TABLE_7:
        weights = weights_of(request, documents, f"r={rank}", seed=0)
        analysis = analyze([weights], _AMPLIFIED, base=base)
        found[str(rank)] = {
            facts.site: asdict(facts.amplification)
            for facts in analysis.sites
            if facts.amplification is not None
        }
    return found


def shared_directions(request: Request, documents: Mapping[str, Any]) -> dict[str, Any]:
    """Figure 3 (two ranks) or Figure 4 (two seeds) for q and v of every layer.

    The two ranks are of two seeds: the same seed would let both start from the same numbers.

    Returns:
        labels, and sites: site -> phi of first and all directions, its mean over i = j, the same of
        two Gaussian matrices, and chance; maps: the whole phi of one site of each kind.
    """
    first = "r=8" if request.experiment.kind == "ranks" else "r=64"
    pair = [weights_of(request, documents, first, 0), weights_of(request, documents, "r=64", 1)]
    found = analyze(pair, _SHARED).subspaces
    shown = set(middle_sites([similarity.site for similarity in found], 2))
    return {
        "labels": [f"{first}, seed 0", "r=64, seed 1"],
        "sites": {similarity.site: _of_site(similarity) for similarity in found},
        "maps": [
            {**_of_site(s), "site": s.site, "of": s.of, "phi": s.phi.tolist(),
             "control": s.control.tolist()}
            for s in found
            if s.site in shown
        ],
    }  # fmt: skip


def _of_site(found: Similarity) -> dict[str, float]:
    return {
        "first": found.first,
        "whole": found.whole,
        "chance": found.chance,
        "diagonal": float(found.phi.diagonal().mean()),
        "control_diagonal": float(found.control.diagonal().mean()),
        "first_of_all": float(found.phi[0, -1]),
    }


def amplification_table(measured: Mapping[str, Sites]) -> dict[str, Any]:
    """The paper's rows beside the middle layer's and the median over the layers."""
    columns = ["", *(f"{label}, r={r}" for r in TABLE_7 for label in ("paper", "middle", "median"))]
    labels = {
        "of_update": "along dW",
        "of_base": "along W_q",
        "of_random": "along random",
        "update_norm": "||dW||",
        "base_norm": "||W_q||",
        "factor": "amplification",
    }
    rows: list[list[str]] = []
    for key, label in labels.items():
        row = [label]
        for rank in TABLE_7:
            sites = measured[str(rank)]
            (middle,) = middle_sites(list(sites), 1)
            row += [
                format_number(_paper_value(rank, key)),
                _number(sites[middle][key]),
                _number(_median(sites, key)),
            ]
        rows.append(row)
    return {"columns": columns, "rows": rows}


def amplification_findings(measured: Mapping[str, Sites]) -> list[Finding]:
    """The paper's three readings of Table 7, layer by layer."""
    found: list[Finding] = []
    for rank, paper in TABLE_7.items():
        sites = list(measured[str(rank)].values())
        found.append(
            compare_layers(
                f"dW of r={rank} lies along W_q more than chance",
                f"{paper['of_update']:g} along dW, {paper['of_random']:g} along random directions",
                [site["of_update"] > site["of_random"] for site in sites],
                f"medians {_median_of(sites, 'of_update')} and {_median_of(sites, 'of_random')}",
            )
        )
        found.append(
            compare_layers(
                f"dW of r={rank} does not repeat W_q's top directions (holds less than half)",
                f"{paper['of_update']:g} along dW, {paper['of_base']:g} along W_q's own",
                [site["of_update"] < site["of_base"] / 2 for site in sites],
                f"medians {_median_of(sites, 'of_update')} and {_median_of(sites, 'of_base')}",
            )
        )
    small, large = (measured[str(rank)] for rank in TABLE_7)
    pairs = [
        (small[site]["factor"], large[site]["factor"])
        for site in small
        if site in large and small[site]["factor"] and large[site]["factor"]
    ]
    found.append(
        compare_layers(
            "the amplification factor of r=4 is above that of r=64",
            f"{_paper_value(4, 'factor'):.3g} and {_paper_value(64, 'factor'):.3g}",
            [one > other for one, other in pairs],
            "medians "
            + " and ".join(format_number(median(side)) for side in zip(*pairs, strict=True))
            if pairs
            else "no layer has both",
        )
    )
    return found


def shared_table(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Medians and quartiles over the layers, for each kind of weight."""
    columns = ["weight", "phi(1, 1)", "phi(1, 64)", "phi, mean of i = j", "two Gaussians", "chance"]
    keys = ("first", "first_of_all", "diagonal", "control_diagonal", "chance")
    rows = [
        [kind, *(_with_quartiles([site[key] for site in sites]) for key in keys)]
        for kind, sites in _by_kind(measured).items()
    ]
    columns[2] = f"phi(1, {len(measured['maps'][0]['phi'][0])})"
    return {"columns": columns, "rows": rows}


def rank_findings(measured: Mapping[str, Any]) -> list[Finding]:
    """Figure 3: the top direction is shared, and more than by chance; most others are not."""
    found: list[Finding] = []
    for kind, sites in _by_kind(measured).items():
        first = _median_of(sites, "first_of_all")
        found.append(
            compare_layers(
                f"{kind}: the top direction of r=8 lies in the subspace of r=64, phi > 0.5",
                "phi > 0.5 for the top direction of W_q and W_v in layer 48 of GPT-3",
                [site["first_of_all"] > 0.5 for site in sites],
                f"median {first}",
            )
        )
        found.append(
            compare_layers(
                f"{kind}: the top direction is shared more than all directions on average",
                "the top direction overlaps, others do not",
                [site["first_of_all"] > site["whole"] for site in sites],
                f"medians {first} and {_median_of(sites, 'whole')}",
            )
        )
    return found


def seed_findings(measured: Mapping[str, Any]) -> list[Finding]:
    """Figure 4: two seeds share more than two Gaussian matrices; q more than v."""
    kinds = _by_kind(measured)
    found = [
        compare_layers(
            f"{kind}: two seeds share more directions than two Gaussian matrices",
            "common directions in both W_q and W_v, none in the Gaussian matrices",
            [site["diagonal"] > site["control_diagonal"] for site in sites],
            f"medians {_median_of(sites, 'diagonal')} and {_median_of(sites, 'control_diagonal')}",
        )
        for kind, sites in kinds.items()
    ]
    if {_QUERY, _VALUE} <= set(kinds):
        query, value = kinds[_QUERY], kinds[_VALUE]
        found.append(
            compare_layers(
                "the two seeds share more of q than of v",
                "dW_q shows more common directions than dW_v",
                [q["diagonal"] > v["diagonal"] for q, v in zip(query, value, strict=True)],
                f"medians {_median_of(query, 'diagonal')} and {_median_of(value, 'diagonal')}",
            )
        )
    return found


def _by_kind(measured: Mapping[str, Any]) -> dict[str, list[dict[str, float]]]:
    sites: Sites = measured["sites"]
    kinds: dict[str, list[dict[str, float]]] = {}
    for name in sorted(sites, key=lambda name: layer_of(name) or 0):
        kinds.setdefault(leaf_of(name).rpartition(".")[2], []).append(sites[name])
    return kinds


def _paper_value(rank: int, key: str) -> float:
    row = {**TABLE_7[rank], "base_norm": BASE_NORM}
    return row["update_norm"] / row["of_update"] if key == "factor" else row[key]


def _median(sites: Sites, key: str) -> float | None:
    values = [site[key] for site in sites.values() if site[key] is not None]
    return median(values) if values else None


def _median_of(sites: Sequence[Mapping[str, float]], key: str) -> str:
    return format_number(median(site[key] for site in sites))


def _number(value: float | None) -> str:
    return "–" if value is None else format_number(value)


def _with_quartiles(values: Sequence[float]) -> str:
    if len(values) < 2:
        return format_number(values[0])
    low, _, high = quantiles(values, n=4, method="inclusive")
    return f"{median(values):.3f} ({low:.3f} to {high:.3f})"
