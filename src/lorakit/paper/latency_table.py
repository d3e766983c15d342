"""Table 1 beside ours: what each method adds to a forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorakit.formatting import format_count
from lorakit.paper.findings import Finding, Value, compare_order
from lorakit.paper.latency import AGAIN, BASE, TITLES

SOURCE = "Table 1, GPT-2 medium on a Quadro RTX 8000, mean of 100 trials"
_ADAPTERS = {"lin": "lin_percent", "houlsby": "houlsby_percent"}
# The paper prints one digit behind the point.
_ROUNDING = 0.05


def latency_table(measured: Mapping[str, Any]) -> dict[str, Any]:
    """What every method adds (percent of the base's pass), cell by cell, beside the paper's."""
    columns = ["method"]
    for cell in measured["cells"]:
        columns += [f"batch {cell['batch']}, {cell['length']} tokens", _paper_head(cell["paper"])]
    rows = [
        [TITLES[name], *(text for cell in measured["cells"] for text in _pair(cell, name))]
        for name in TITLES
        if name != BASE
    ]
    sizes = ["learned parameters"]
    for cell in measured["cells"]:
        sizes += [f"about {format_count(cell['budget'])}", format_count(cell["paper"]["budget"])]
    return {"columns": columns, "rows": [*rows, sizes]}


def latency_findings(measured: Mapping[str, Any]) -> list[Finding]:
    """The paper's readings: merged LoRA adds nothing, adapters do, most on small batches."""
    cells = measured["cells"]
    found: list[Finding] = []
    for cell in cells:
        where = f"batch {cell['batch']}, {cell['length']} tokens, percent added"
        zero = Value(value=0.0)
        found.append(
            compare_order(
                f"{where}: merged LoRA against the base",
                ("merged LoRA", "the base"),
                (zero, zero),
                (_added(cell, "lora merged"), _noise(cell)),
            )
        )
        for name, key in _ADAPTERS.items():
            found.append(
                compare_order(
                    f"{where}: {TITLES[name]} against merged LoRA",
                    (TITLES[name], "merged LoRA"),
                    (Value(value=cell["paper"][key], spread=_ROUNDING), zero),
                    (_added(cell, name), _added(cell, "lora merged")),
                )
            )
    first, last = cells[0], cells[-1]
    for name, key in _ADAPTERS.items():
        found.append(
            compare_order(
                f"{TITLES[name]}, percent added: the smallest batch against the largest",
                ("the smallest batch", "the largest"),
                (
                    Value(value=last["paper"][key], spread=_ROUNDING),
                    Value(value=first["paper"][key], spread=_ROUNDING),
                ),
                (_added(last, name), _added(first, name)),
            )
        )
    return found


def _added(cell: Mapping[str, Any], name: str) -> Value:
    """Percent over the base, with half the 95 % interval of the median."""
    found = cell["variants"][name]
    low, high = found["ratio_95"]
    return Value(value=100 * (found["ratio"] - 1), spread=50 * (high - low))


def _noise(cell: Mapping[str, Any]) -> Value:
    """Zero, as far as the base timed twice leaves it open."""
    again = _added(cell, AGAIN)
    return Value(value=0.0, spread=abs(again.value) + again.spread)


def _pair(cell: Mapping[str, Any], name: str) -> tuple[str, str]:
    found = _added(cell, name)
    key = _ADAPTERS.get(name)
    paper = "" if key is None else f"{cell['paper'][key]:+.1f} %"
    if name == "lora merged":
        paper = "0 %"
    return f"{found.value:+.1f} % ± {found.spread:.1f}", paper


def _paper_head(paper: Mapping[str, Any]) -> str:
    return f"paper: batch {paper['batch']}"
