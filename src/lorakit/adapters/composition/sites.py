"""What the parts do at each site, as matrices: adapters on different sites, parts, geometries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lorakit.adapters.adapter import Factors
from lorakit.adapters.composition.recipe import Part
from lorakit.adapters.targets import base_modules
from lorakit.errors import BaseMismatchError, SpecError
from lorakit.layers.kinds import KINDS, as_matrix
from lorakit.layers.low_rank import take_rows
from lorakit.layers.rows import Rows
from lorakit.weights.storage import base_weight


@dataclass(frozen=True, slots=True)
class Term:
    """The change of one part at one site, its weight not yet applied.

    Attributes:
        weight: the part's.
        A: (n, in), everything behind the rank as one axis.
        B: (out, n).
        scaling: the change is `scaling` B A.
        dense: the change itself, (out, in), where it is not B A: DoRA.
        source: the factors as they came, where the part has exactly one update here.
    """

    part: int
    weight: float
    A: Tensor
    B: Tensor
    scaling: float
    dense: Tensor | None = None
    source: Factors | None = None

    def matrix(self) -> Tensor:
        """The change, (out, in) float32."""
        if self.dense is not None:
            return self.dense
        return (self.B.float() @ self.A.float()) * self.scaling

    def product(self) -> tuple[Tensor, Tensor]:
        """B and A of the weighted change, float64; only where it is low-rank."""
        if self.dense is not None:
            raise ValueError("a DoRA change is no product")
        return self.B.double() * (self.scaling * self.weight), self.A.double()


@dataclass(frozen=True, slots=True)
class CommonSite:
    """One place that at least one part changes.

    Attributes:
        name: the module's name, with the part behind it for a fused projection.
        module: the module's name.
        kind: the geometry.
        rows: the part's rows of a fused output, or None.
        inputs: what stands behind the rank in A's shape: (in,), or (in, h, w).
        terms: one per part that changes this place.
        stack: see `Factors`.
    """

    name: str
    module: str
    kind: str
    rows: Rows | None
    inputs: tuple[int, ...]
    terms: tuple[Term, ...]
    stack: int | None = None

    def factors(self, A: Tensor, B: Tensor, *, scaling: float, alpha: float) -> Factors:
        """Factors in this place's geometry.

        Args:
            A: (r, in).
            B: (out, r).
            scaling: s.
            alpha: the numerator that gives it.
        """
        shaped = B[:, :, None, None] if self.kind == "conv2d" else B
        return Factors(
            A=A.reshape(A.shape[0], *self.inputs).contiguous(),
            B=shaped.contiguous(),
            alpha=alpha,
            scaling=scaling,
            kind=self.kind,
            module=self.module,
            rows=self.rows,
            stack=self.stack,
        )


class _Update(NamedTuple):
    part: int
    weight: float
    name: str
    factors: Factors


def common_sites(parts: Sequence[Part], base: nn.Module | None) -> list[CommonSite]:
    """Every place that a part changes, in the model's order as far as the names tell it.

    Parts of a fused projection stay parts where all adapters cut it alike; where one changes the
    whole and another a part, all are taken for changes of the whole.

    Args:
        parts: the adapters.
        base: the model, where an adapter is DoRA.

    Raises:
        BaseMismatchError: two parts have different shapes at one place.
        SpecError: a DoRA adapter without the base.
    """
    by_module: dict[str, list[_Update]] = {}
    for index, part in enumerate(parts):
        for name, factors in part.adapter.factors.items():
            update = _Update(index, part.weight, name, factors)
            by_module.setdefault(factors.module, []).append(update)
    weights = _weights(parts, base)
    sites: list[CommonSite] = []
    for module in sorted(by_module, key=_natural):
        updates = by_module[module]
        _require_one_shape(module, updates, parts)
        sites += _sites_of(module, updates, weights.get(module))
    return sites


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in name.split(".")]


def _weights(parts: Sequence[Part], base: nn.Module | None) -> Mapping[str, Tensor]:
    """Module -> W0, for modules that a DoRA part changes."""
    needed = {
        f.module: part.name
        for part in parts
        for f in part.adapter.factors.values()
        if f.magnitude is not None
    }
    if not needed:
        return {}
    if base is None:
        raise SpecError(
            "the change that a DoRA adapter makes depends on the base weight",
            where=next(iter(needed.values())),
            remedy="give the base: compose(..., base=model), --base REF",
        )
    modules = base_modules(base)
    return {module: base_weight(modules[module]).read() for module in needed}


def _require_one_shape(module: str, updates: Sequence[_Update], parts: Sequence[Part]) -> None:
    shapes: dict[tuple[int, ...], str] = {}
    for update in updates:
        f = update.factors
        out = f.rows.whole if f.rows is not None else f.B.shape[0]
        shapes.setdefault((out, *f.A.shape[1:]), parts[update.part].name)
    if len({(u.factors.kind, u.factors.stack) for u in updates if u.factors.stack}) > 1:
        raise SpecError(
            "PEFT turned expert weights around in 0.19: only the base tells how they lie in it",
            where=module,
            found=", ".join(sorted({parts[u.part].name for u in updates})),
            remedy="give the base: compose(..., base=model), --base REF",
        )
    kinds = {u.factors.kind for u in updates} - {"linear", "conv1d"}
    if len(shapes) > 1 or len(kinds) > 1:
        raise BaseMismatchError(
            "the parts do not fit on one base",
            where=module,
            found=", ".join(f"{name} {shape}" for shape, name in shapes.items()),
            remedy="compose adapters of one base model",
        )


def _sites_of(module: str, updates: Sequence[_Update], weight: Tensor | None) -> list[CommonSite]:
    names = {u.factors.rows: u.name for u in updates}
    alike = len(names) == 1 or _disjoint([rows for rows in names if rows is not None], names)
    # A foreign file does not tell a Conv1D from a Linear; who knows better, decides.
    kinds = sorted({u.factors.kind for u in updates})
    kind = "conv1d" if "conv1d" in kinds else kinds[0]
    inputs = tuple(updates[0].factors.A.shape[1:])
    if not alike:
        groups: dict[int, list[_Update]] = {}
        for update in updates:
            groups.setdefault(update.part, []).append(update)
        terms = tuple(_whole_term(group, kind, weight) for group in groups.values())
        return [CommonSite(module, module, kind, None, inputs, terms)]
    return [
        CommonSite(
            name=name,
            module=module,
            kind=kind,
            rows=rows,
            inputs=inputs,
            terms=tuple(_term(u, kind, weight) for u in updates if u.factors.rows == rows),
            stack=updates[0].factors.stack,
        )
        for rows, name in names.items()
    ]


def _disjoint(rows: Sequence[Rows], names: Mapping[Rows | None, str]) -> bool:
    if len(rows) < len(names):
        return False  # one part changes the whole projection
    pairs = [(a, b) for i, a in enumerate(rows) for b in rows[i + 1 :]]
    return not any(a.overlaps(b) for a, b in pairs)


def _term(update: _Update, kind: str, weight: Tensor | None) -> Term:
    f = update.factors
    dense = None
    if f.magnitude is not None and weight is not None:
        dense = take_rows(as_matrix(KINDS[kind], f.delta(weight)), f.rows).float()
    return Term(
        part=update.part,
        weight=update.weight,
        A=f.A.flatten(1),
        B=f.B.flatten(1),
        scaling=f.scaling,
        dense=dense,
        source=f,
    )


def _whole_term(group: Sequence[_Update], kind: str, weight: Tensor | None) -> Term:
    """All updates of one part in a module as one change of the whole output."""
    if len(group) == 1 and group[0].factors.rows is None:
        return _term(group[0], kind, weight)
    blocks: list[Tensor] = []
    dense: Tensor | None = None
    for update in group:
        f = update.factors
        B = f.B.flatten(1).double() * f.scaling
        blocks.append(B if f.rows is None else f.rows.spread(B.T).T)
        if f.magnitude is not None and weight is not None:
            change = as_matrix(KINDS[kind], f.delta(weight)).float()
            dense = change if dense is None else dense + change
    return Term(
        part=group[0].part,
        weight=group[0].weight,
        A=torch.cat([u.factors.A.flatten(1) for u in group]),
        B=torch.cat(blocks, dim=1),
        scaling=1.0,
        dense=dense,
    )
