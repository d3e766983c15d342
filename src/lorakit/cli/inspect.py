"""`lorakit inspect`: an adapter's spec, updates, spectra and passport, without its base."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorakit.adapters.adapter import Adapter, Factors
from lorakit.adapters.strict import require_finite
from lorakit.cli import console
from lorakit.cli.inspect_method import measure, record, show
from lorakit.cli.numbers import count
from lorakit.data.task_facts import saved_task
from lorakit.formats.peft import read_adapter
from lorakit.formatting import format_bytes, format_count, format_estimate, format_number
from lorakit.math.svd import effective_rank, product_singular_values
from lorakit.methods.files import Saved, read_saved
from lorakit.methods.lora import LoraMethod

SUMMARY = "look inside an adapter's files"

_NUM_SHOWN = 3
_HASH_DIGITS = 12
_VERSIONS = ("lorakit", "torch", "transformers")


@dataclass(frozen=True, slots=True)
class Spectrum:
    """What one update s B A does: its size and how many directions it uses."""

    site: str
    shape: list[int]
    r: int
    scaling: float
    norm: float
    singular_values: list[float]
    effective_rank: float
    magnitude_norm: float | None = None  # of DoRA's m

    @classmethod
    def of(cls, site: str, factors: Factors) -> Spectrum:
        """Measure one site; convolution kernels count as one long input axis."""
        A, B = factors.A.flatten(1), factors.B.flatten(1)
        values = product_singular_values(B, A) * abs(factors.scaling)
        return cls(
            site=site,
            shape=[B.shape[0], A.shape[1]],
            r=factors.r,
            scaling=factors.scaling,
            norm=float(values.norm()),
            singular_values=values.tolist(),
            effective_rank=effective_rank(values),
            magnitude_norm=None if factors.magnitude is None else float(factors.magnitude.norm()),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "site": self.site,
            "shape": self.shape,
            "r": self.r,
            "scaling": self.scaling,
            "norm": self.norm,
            "singular_values": self.singular_values,
            "effective_rank": self.effective_rank,
            "magnitude_norm": self.magnitude_norm,
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `lorakit inspect`."""
    parser.add_argument("adapter", help="an adapter's directory")
    parser.add_argument(
        "--sort", choices=["model", "norm"], default="model", help="order of the sites"
    )
    parser.add_argument("--top", type=count, metavar="N", help="only the first N sites")


def run(args: argparse.Namespace) -> int:
    """Read, measure and print; returns the exit code."""
    saved = read_saved(args.adapter)
    if saved.name != LoraMethod.name:
        _inspect_method(saved, args)
        return 0
    adapter = read_adapter(Path(args.adapter))
    require_finite(adapter, Path(args.adapter))
    spectra = [Spectrum.of(site, factors) for site, factors in adapter.factors.items()]
    if args.sort == "norm":
        spectra.sort(key=lambda spectrum: -spectrum.norm)
    files = [file for file in Path(args.adapter).iterdir() if file.is_file()]
    num_bytes = sum(file.stat().st_size for file in files)
    if args.json:
        console.print_json(
            {
                "adapter": args.adapter,
                "bytes": num_bytes,
                "num_params": adapter.num_params(),
                "spec": adapter.spec.to_dict(),
                "sites": [spectrum.to_json() for spectrum in spectra[: args.top]],
                "trained_beside": sorted(_beside(adapter)),
                "passport": dict(adapter.passport),
            }
        )
        return 0
    _show(args.adapter, adapter, num_bytes)
    _show_sites(spectra, args.top)
    return 0


def _inspect_method(saved: Saved, args: argparse.Namespace) -> None:
    learned, note = measure(saved)
    if args.sort == "norm":
        learned.sort(key=lambda item: -item.norm)
    found = record(saved, learned, note)
    if args.json:
        console.print_json({**found, "sites": found["sites"][: args.top]})
    else:
        show(found, learned[: args.top], passport_facts({**saved.passport, "method": saved.name}))


def _show(path: str, adapter: Adapter, num_bytes: int) -> None:
    beside = _beside(adapter)
    facts: dict[str, object] = {
        "size": f"{format_bytes(num_bytes)}, {format_count(adapter.num_params())} parameters",
        "sites": f"{len(adapter.factors)} in {len(adapter.modules())} modules",
    }
    if beside:
        facts["trained beside"] = ", ".join(sorted(beside))
    console.print_facts(path, facts)
    console.print_facts(
        "spec", {key: value for key, value in adapter.spec.to_dict().items() if _is_set(value)}
    )
    passport = passport_facts(adapter.passport)
    console.print_facts("passport", passport or {"": "none: another tool wrote this adapter"})
    if passport:
        console.note("the whole passport: --json")


def _beside(adapter: Adapter) -> set[str]:
    rows = {f"{len(t.indices)} rows of {name}" for name, t in adapter.tokens.items()}
    return {*adapter.biases, *adapter.overrides, *rows}


def passport_facts(passport: Mapping[str, Any]) -> dict[str, str]:
    """Where an adapter comes from, in a few lines; what the passport does not say is left out."""
    base, versions = _section(passport, "base"), _section(passport, "versions")
    facts = {
        "base": _joined(base.get("name") or passport.get("model"), _hash(base.get("sha256"))),
        "architecture": _joined(base.get("architecture")),
    }
    for split, found in _section(passport, "data").items():
        if isinstance(found, Mapping):
            rows = found.get("num_rows")
            counted = f"{format_count(rows)} rows" if isinstance(rows, int) else None
            facts[split] = _joined(found.get("source"), counted, _hash(found.get("sha256")))
    task = saved_task(passport, where="the passport")
    if task is not None:
        facts |= task.lines()
    facts["seed"] = _joined(passport.get("seed"))
    facts["method"] = _joined(passport.get("method"))
    facts["versions"] = _joined(
        *(f"{name} {versions[name]}" for name in _VERSIONS if name in versions)
    )
    facts["metrics"] = _joined(*_metrics(_section(passport, "metrics")))
    return {name: text for name, text in facts.items() if text}


def _section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = values.get(name)
    return found if isinstance(found, Mapping) else {}


def _metrics(metrics: Mapping[str, Any]) -> Iterator[str]:
    for name, value in metrics.items():
        label = name.replace("_", " ")
        if isinstance(value, Mapping) and isinstance(value.get("value"), int | float):
            yield f"{label} {format_estimate(value, share=False)}"
        elif isinstance(value, int | float):
            yield f"{label} {format_number(value)}"


def _hash(value: object) -> str | None:
    return f"sha256 {value[:_HASH_DIGITS]}..." if isinstance(value, str) and value else None


def _joined(*values: object) -> str:
    return ", ".join(str(value) for value in values if value is not None)


def _show_sites(spectra: list[Spectrum], top: int | None) -> None:
    columns = ["site", "out x in", "r", "scaling", "norm", "largest singular values", "eff. rank"]
    table = console.table("updates s B A", columns, numbers=columns[1:])
    for spectrum in spectra[:top]:
        largest = "  ".join(format_number(v) for v in spectrum.singular_values[:_NUM_SHOWN])
        table.add_row(
            spectrum.site,
            " x ".join(map(str, spectrum.shape)),
            str(spectrum.r),
            format_number(float(spectrum.scaling)),
            format_number(spectrum.norm),
            largest,
            f"{spectrum.effective_rank:.2f}",
        )
    console.stdout().print(table)
    if spectra:
        total = float(torch.tensor([spectrum.norm for spectrum in spectra]).norm())
        console.note(f"norm of the whole update: {format_number(total)}")
        magnitudes = [s.magnitude_norm for s in spectra if s.magnitude_norm is not None]
        if magnitudes:
            whole = float(torch.tensor(magnitudes).norm())
            console.note(
                f"DoRA: norm of all magnitudes {format_number(whole)}; s B A is added first"
            )
        silent = [spectrum.site for spectrum in spectra if spectrum.norm == 0]
        if silent:
            console.warn(f"{len(silent)} of {len(spectra)} updates are zero: {silent[0]}, ...")


def _is_set(value: object) -> bool:
    return value not in (None, "", (), [], {})
