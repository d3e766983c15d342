"""From cells to the comparison: one row per method, plain values only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from statistics import mean, median
from typing import Any

from lorakit.compare.arms import Arm
from lorakit.compare.cells import Records, chosen_rates, plan_cells
from lorakit.compare.config import CompareConfig
from lorakit.compare.files import DataFiles
from lorakit.compare.intervals import over_seeds
from lorakit.environment import hardware, versions
from lorakit.train.merit import merit_name

Record = Mapping[str, Any]


def document(
    config: CompareConfig, data: DataFiles, records: Records, *, seconds: float, command: str
) -> dict[str, Any]:
    """The content of compare.json.

    Args:
        config: the comparison.
        data: its rows.
        records: the finished cells by name.
        seconds: wall time of this call.
        command: the command line.
    """
    planned = plan_cells(config, data, records)
    rates = chosen_rates(config, data, records)
    finished = [_with_fate(records[cell.name], rates) for cell in planned if cell.name in records]
    return {
        "kind": "compare",
        "title": config.title or config.output,
        "command": command,
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "complete": len(finished) == len(planned),
        "num_cells": {"finished": len(finished), "planned": len(planned)},
        "metric": _metric(finished),
        "methods": [_method(config, arm, rates.get(arm.name), finished) for arm in config.arms],
        "data": {"sha256": dict(data.sha256), "num_rows": dict(data.num_rows)},
        "config": config.to_dict(),
        "seconds": {
            "this_call": seconds,
            "all_cells": sum(record["seconds"] for record in finished),
        },
        "versions": versions(),
        "hardware": hardware(),
        "cells": [_without_identity(record) for record in finished],
    }


def _metric(finished: Sequence[Record]) -> dict[str, Any] | None:
    """The score: the first metric of the final runs."""
    for record in finished:
        for name, score in record["scores"].items():
            return {"name": name, "higher_is_better": score["higher_is_better"]}
    return None


def _with_fate(record: Record, rates: Mapping[str, float]) -> Record:
    """A whole run whose rate did not hold is called abandoned: it is no score of the method."""
    if record["kind"] != "final" or rates.get(record["arm"], record["lr"]) == record["lr"]:
        return record
    return {**record, "kind": "abandoned"}


def _method(
    config: CompareConfig, arm: Arm, rate: float | None, finished: Sequence[Record]
) -> dict[str, Any]:
    mine = [record for record in finished if record["arm"] == arm.name]
    search = [record for record in mine if record["kind"] == "search"]
    final = [record for record in mine if record["kind"] == "final" and not record["failed"]]
    # Time and memory of runs that were trained together are no single run's.
    alone = [record for record in final if record.get("trained", "alone") == "alone"]
    known = final or [record for record in mine if not record["failed"]]
    return {
        "name": arm.name,
        "method": arm.method,
        "lr": _rate(config, arm, rate, mine),
        "trainable_params": _first(known, "trainable_params"),
        "trainable_share": _first(known, "trainable_share"),
        "checkpoint_bytes": _first(known, "checkpoint_bytes"),
        "scores": _scores(final),
        "eval_loss": _over(final, "eval_loss"),
        "memory": _memory(alone),
        "speed": {
            key: median(record["speed"][key] for record in alone) if alone else None
            for key in ("tokens_per_s", "examples_per_s")
        },
        "together": len(final) - len(alone),
        "latency": next((record["latency"] for record in final if record["latency"]), None),
        "steps": _first(final, "steps"),
        "seconds": {
            "search": sum(record["seconds"] for record in search),
            "per_run": mean(record["seconds"] for record in final) if final else None,
        },
        "failures": [
            {"cell": record["cell"], "what": str(record["failed"]).splitlines()[0]}
            for record in mine
            if record["failed"]
        ],
        "notes": list(dict.fromkeys(note for record in known for note in record["notes"])),
    }


def _rate(
    config: CompareConfig, arm: Arm, chosen: float | None, mine: Sequence[Record]
) -> dict[str, Any]:
    """The learning rate that was chosen, from which, and whether it lies at their edge."""
    rates = list(arm.rates)
    edge = None
    if chosen is not None and len(rates) > 1:
        edge = {rates[0]: "lowest", rates[-1]: "highest"}.get(chosen)
    return {
        "chosen": chosen,
        "searched": _validated(mine, "search"),
        "abandoned": _validated(mine, "abandoned"),
        "edge": edge,
        "search_seed": config.lr_search.seed,
    }


def _validated(mine: Sequence[Record], kind: str) -> list[dict[str, Any]]:
    """Rates with their validation loss, and the name and value of what decides between them."""
    return [
        {
            "lr": record["lr"],
            "eval_loss": record["eval_loss"],
            "by": None if record["failed"] else merit_name(record["by"]),
            "value": record["final"].get(f"eval_{record['by']}"),
            "failed": bool(record["failed"]),
        }
        for record in mine
        if record["kind"] == kind
    ]


def _scores(final: Sequence[Record]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in dict.fromkeys(name for record in final for name in record["scores"]):
        scores = [record["scores"][name] for record in final if name in record["scores"]]
        found[name] = {
            **over_seeds([score["value"] for score in scores]),
            "higher_is_better": scores[0]["higher_is_better"],
        }
    return found


def _over(final: Sequence[Record], key: str) -> dict[str, Any] | None:
    values = [record[key] for record in final if record[key] is not None]
    return over_seeds(values) if values else None


def _memory(final: Sequence[Record]) -> dict[str, Any]:
    """The peak of the training process, in all and above what the loaded base took (bytes)."""
    above = [
        record["peak_bytes"] - record["base_bytes"]
        for record in final
        if record["base_bytes"] is not None
    ]
    return {
        "peak_bytes": median(record["peak_bytes"] for record in final) if final else None,
        "above_base_bytes": median(above) if above else None,
    }


def _first(records: Sequence[Record], key: str) -> Any:
    return next((record[key] for record in records), None)


def _without_identity(record: Record) -> dict[str, Any]:
    # The config stands in the document once; versions and hardware too.
    left_out = ("identity", "versions", "hardware")
    return {key: value for key, value in record.items() if key not in left_out}
