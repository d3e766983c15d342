"""The rank of every site, where they differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorakit.report.layer_figures import Chart, by_layer
from lorakit.report.schema import Section


def rank_section(record: Mapping[str, Any]) -> Section | None:
    """Rank per layer of a training record; None where all sites have the same."""
    adapter = record.get("adapter")
    ranks = adapter.get("ranks") if isinstance(adapter, Mapping) else None
    if not isinstance(ranks, Mapping) or len(set(ranks.values())) < 2:
        return None
    mean = sum(ranks.values()) / len(ranks)
    return {
        "title": "Rank per layer",
        "svg": by_layer(
            {str(site): float(r) for site, r in ranks.items()}, Chart(label="rank", bottom=0)
        ),
        "note": f"{len(ranks)} sites, ranks {min(ranks.values())} to {max(ranks.values())}, "
        f"mean {mean:.1f}.",
    }
