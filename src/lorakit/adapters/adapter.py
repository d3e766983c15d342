"""Adapter: spec, factors and passport, with no model inside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor

from lorakit.adapters.spec import LoraSpec
from lorakit.adapters.token_rows import TokenRows
from lorakit.errors import StateError
from lorakit.layers.kinds import KINDS
from lorakit.layers.low_rank import UpdateValues
from lorakit.layers.rows import Rows

# Knows how adapters lie on disk. It builds on this module, so it is imported when it is needed.
_LAYOUT = "lorakit.formats.peft"


@dataclass(frozen=True, slots=True)
class Factors:
    """One update: s B A, and for DoRA the magnitude of the sum's rows.

    Attributes:
        A: (r, in), or the kind's shape.
        B: (out, r), or the kind's shape; out is the part's own size.
        alpha: the numerator of the scaling.
        scaling: s.
        kind: the geometry, a key of `lorakit.layers.kinds.KINDS`.
        module: the adapted module's name.
        rows: the part's rows of a fused output, or None.
        magnitude: DoRA's m, (out,), or None for LoRA.
        stack: where `module` names one matrix of a parameter, `<parameter>.<index>`, as experts
            are: how many matrices it stacks. None for a module.
    """

    A: Tensor
    B: Tensor
    alpha: float
    scaling: float
    kind: str
    module: str
    rows: Rows | None = None
    magnitude: Tensor | None = None
    stack: int | None = None

    @property
    def r(self) -> int:
        """The rank."""
        return self.A.shape[0]

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """The change of the whole base weight, float32, in its layout.

        Args:
            weight: W0, needed for DoRA alone: LoRA's change s B A does not depend on it.

        Raises:
            StateError: a DoRA update without `weight`.
        """
        if self.magnitude is not None and weight is None:
            raise StateError(
                "the change that a DoRA adapter makes depends on the base weight",
                where=self.module,
                remedy="give the weight: adapter.delta(module, weight)",
            )
        return self.values().delta(weight)

    def values(self) -> UpdateValues:
        """The same as a live layer has them."""
        return UpdateValues(
            kind=KINDS[self.kind],
            A=self.A,
            B=self.B,
            scaling=self.scaling,
            rows=self.rows,
            magnitude=self.magnitude,
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class Adapter:
    """A trained update that can be bound to a model, saved, merged, composed, analysed or served.

    Attributes:
        spec: the request it was made from.
        factors: site name -> update.
        biases: adapted module -> its trained bias, (out,).
        overrides: full parameter name -> value, for modules and biases trained beside.
        tokens: embedding -> rows that are replaced, and the modules tied to it with them.
        passport: where it comes from: base fingerprint, data, seed, versions, metrics.
        base_norms: module -> row norms of W0, (out,), where DoRA adapts only parts of a fused
            output: PEFT's file needs a number for every row.
        base_weights: module -> frozen weight that a foreign file carries; it must be the base's.
        target_modules: the shortest names that mean exactly the adapted modules; may be empty.
        config: keys of a foreign adapter_config.json that are kept as they came.
    """

    spec: LoraSpec
    factors: Mapping[str, Factors]
    biases: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    overrides: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    tokens: Mapping[str, TokenRows] = field(default_factory=dict[str, TokenRows])
    passport: Mapping[str, Any] = field(default_factory=dict[str, Any])
    base_norms: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    base_weights: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    target_modules: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def num_params(self) -> int:
        """All learned numbers."""
        low_rank = sum(f.A.numel() + f.B.numel() for f in self.factors.values())
        low_rank += sum(
            f.magnitude.numel() for f in self.factors.values() if f.magnitude is not None
        )
        beside = [*self.biases.values(), *self.overrides.values()]
        beside += [tokens.rows for tokens in self.tokens.values()]
        return low_rank + sum(t.numel() for t in beside)

    def modules(self) -> dict[str, dict[str, Factors]]:
        """Adapted module -> site name -> factors."""
        grouped: dict[str, dict[str, Factors]] = {}
        for name, factors in self.factors.items():
            grouped.setdefault(factors.module, {})[name] = factors
        return grouped

    def delta(self, module: str, weight: Tensor | None = None) -> Tensor:
        """The whole change of one module's weight, float32, in the base weight's layout.

        Args:
            module: the adapted module.
            weight: its W0, in the base's layout; needed for DoRA alone.

        Raises:
            KeyError: the adapter does not adapt this module.
            StateError: a DoRA adapter without `weight`.
        """
        parts = [f.delta(weight) for f in self.modules()[module].values()]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    @classmethod
    def load(cls, path: str | Path) -> Adapter:
        """Read an adapter in PEFT's layout, without a model.

        Raises:
            AdapterFileError: the files cannot be read, or ask for what is not supported.
        """
        return import_module(_LAYOUT).read_adapter(Path(path))

    def save(self, path: str | Path) -> None:
        """Write the adapter in PEFT's layout, with its passport beside; whole or not at all.

        Raises:
            OutputError: the directory is not empty, or the disk refuses.
        """
        import_module(_LAYOUT).write_adapter(self, Path(path))
