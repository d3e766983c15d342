"""Write an analysis: JSON and CSV for programs, one HTML page for people."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from lorakit.analysis.page import page
from lorakit.analysis.run import Analysis, SiteFacts
from lorakit.files import atomic_directory, write_json, write_text
from lorakit.report.html import write_report

JSON_NAME = "analysis.json"
PAGE_NAME = "report.html"


def write_analysis(analysis: Analysis, path: str | Path, *, command: str = "") -> list[str]:
    """Write the directory, whole or not at all.

    Args:
        analysis: what was measured.
        path: a directory that does not exist yet, or is empty.
        command: what it was made with, for the page.

    Returns:
        The names of the files.

    Raises:
        OutputError: the directory is not empty, or the disk refuses.
    """
    with atomic_directory(path) as staging:
        write_json(staging / JSON_NAME, analysis.to_json())
        for name, table in _tables(analysis):
            write_text(staging / name, table)
        write_report(page(analysis, command), staging / PAGE_NAME)
        return sorted(file.name for file in staging.iterdir())


def _tables(analysis: Analysis) -> Iterable[tuple[str, str]]:
    yield "sites.csv", _csv(_SITE_COLUMNS, map(_site_row, analysis.sites))
    yield (
        "singular_values.csv",
        _csv(
            ("adapter", "site", "k", "singular_value"),
            (
                (site.adapter, site.site, k, value)
                for site in analysis.sites
                for k, value in enumerate(site.spectrum.singular_values, start=1)
            ),
        ),
    )
    if analysis.subspaces:
        yield (
            "subspaces.csv",
            _csv(
                ("site", "of", "i", "j", "phi", "gaussian"),
                (
                    (s.site, s.of, i + 1, j + 1, float(s.phi[i, j]), float(s.control[i, j]))
                    for s in analysis.subspaces
                    for i in range(s.phi.shape[0])
                    for j in range(s.phi.shape[1])
                ),
            ),
        )
    if analysis.agreement:
        columns = ("site", "norm_1", "norm_2", "cosine", "inputs", "outputs", "sign_conflict")
        rows = (
            (a.site, *a.norms, a.cosine, a.inputs, a.outputs, a.sign_conflict)
            for a in analysis.agreement
        )
        yield "agreement.csv", _csv(columns, rows)
    if analysis.norms:
        yield (
            "norms.csv",
            _csv(
                ("adapter", "step", "site", "norm", "effective_rank"),
                (
                    (label, row.step, row.site, row.norm, row.effective_rank)
                    for label, found in analysis.norms.items()
                    for row in found
                ),
            ),
        )


_SITE_COLUMNS = (
    "adapter", "site", "out", "in", "r", "scaling", "norm", "relative_norm", "rank",
    "effective_rank", "stable_rank", "directions_for_90", "amplification_r", "of_update", "of_base",
    "of_random", "base_norm", "amplification", "overlap_with_base", "intruders", "looked_at",
)  # fmt: skip


def _site_row(site: SiteFacts) -> tuple[object, ...]:
    size, found, new = site.spectrum, site.amplification, site.intruders
    amplified = (
        ("",) * 7
        if found is None
        else (
            found.r,
            found.of_update,
            found.of_base,
            found.of_random,
            found.base_norm,
            "" if found.factor is None else found.factor,
            found.overlap,
        )
    )
    return (
        site.adapter,
        site.site,
        *site.shape,
        size.r,
        site.scaling,
        size.norm,
        "" if site.relative_norm is None else site.relative_norm,
        size.rank,
        size.effective_rank,
        size.stable_rank,
        size.directions_for_90,
        *amplified,
        *(("", "") if new is None else (len(new.positions), new.looked_at)),
    )


def _csv(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return stream.getvalue()
