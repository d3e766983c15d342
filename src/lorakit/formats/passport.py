"""lorakit.json, the passport beside an adapter: which base, which data, how, and with what result.

PEFT and every other reader of the directory ignore the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.fingerprint import Fingerprint
from lorakit.adapters.spec import LoraSpec
from lorakit.errors import AdapterFileError, SpecError
from lorakit.files import read_json, write_json
from lorakit.layers.rows import Rows

PASSPORT_NAME = "lorakit.json"
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class SiteRecord:
    """What the tensor file alone does not tell of one site."""

    name: str
    module: str
    kind: str
    r: int
    alpha: float
    scaling: float
    rows: Rows | None


def write_passport(adapter: Adapter, directory: Path) -> None:
    """Write the passport of an adapter into its directory."""
    sites = [
        asdict(SiteRecord(n, f.module, f.kind, f.r, f.alpha, f.scaling, f.rows))
        for n, f in adapter.factors.items()
        if f.stack is None  # the configuration tells what they are
    ]
    document = {
        "format": _FORMAT,
        "spec": adapter.spec.to_dict(),
        "num_params": adapter.num_params(),
        **{k: v for k, v in adapter.passport.items() if k not in ("format", "spec", "sites")},
        "sites": sites,
    }
    write_json(directory / PASSPORT_NAME, document)


def read_passport(
    directory: Path,
) -> tuple[dict[str, Any], dict[str, list[SiteRecord]], LoraSpec | None]:
    """The passport's facts, the site records by module, and the spec; empty without the file.

    Raises:
        AdapterFileError: the file is there and cannot be understood.
    """
    path = directory / PASSPORT_NAME
    if not path.is_file():
        return {}, {}, None
    try:
        document = read_json(path)
        if document["format"] != _FORMAT:
            raise AdapterFileError(
                "the passport has a format this version does not know",
                where=str(path),
                expected=str(_FORMAT),
                found=str(document["format"]),
                remedy="update lorakit",
            )
        records: dict[str, list[SiteRecord]] = {}
        for values in document["sites"]:
            record = _record(values)
            records.setdefault(record.module, []).append(record)
        spec = LoraSpec.from_dict(document["spec"])
        facts = {k: v for k, v in document.items() if k not in ("format", "spec", "sites")}
        if "samples" in facts.get("base", {}):
            Fingerprint.from_json(facts["base"])
    except (OSError, KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        if isinstance(error, AdapterFileError) and not isinstance(error, SpecError):
            raise
        raise AdapterFileError(
            "the passport cannot be understood",
            where=str(path),
            found=f"{type(error).__name__}: {error}".splitlines()[0],
            remedy="delete the file to load the adapter without its passport",
        ) from error
    return facts, records, spec


def _record(values: Mapping[str, Any]) -> SiteRecord:
    rows = Rows(**values["rows"]) if values.get("rows") else None
    return SiteRecord(
        name=str(values["name"]),
        module=str(values["module"]),
        kind=str(values["kind"]),
        r=int(values["r"]),
        alpha=float(values["alpha"]),
        scaling=float(values["scaling"]),
        rows=rows,
    )
