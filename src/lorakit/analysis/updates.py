"""The updates of an adapter as matrices, with the weights they change where a base is given."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorakit.adapters.adapter import Adapter, Factors
from lorakit.adapters.identity import require_same_base
from lorakit.adapters.parameters import (
    find_parameter,
    fit_parameters,
    matrix_of,
    parameter_of,
    tokens_as_factors,
)
from lorakit.adapters.renamed import under_its_names
from lorakit.adapters.strict import require_finite
from lorakit.adapters.targets import base_modules, matches
from lorakit.errors import AdapterFileError, RequestError, StateError
from lorakit.formats.peft import read_adapter
from lorakit.layers.kinds import KINDS, LayerKind, as_matrix, kind_of
from lorakit.layers.low_rank import take_rows
from lorakit.math.svd import product_svd
from lorakit.weights.storage import base_weight

_MIN_DIRECTIONS = 64
# Of what is wrong with an adapter.
_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class Update:
    """One site's change, everything flattened to matrices (out, in).

    A convolution counts its kernel as inputs; an embedding maps a token (in = vocabulary) to its
    row; a part of a fused projection has its own rows only.

    Attributes:
        site: the site's name.
        module: the adapted module's name.
        A: (r, in) float32.
        B: (out, r) float32.
        scaling: s.
        change: computes DoRA's change of the weight, (out, in) float32; None where it is s B A.
        magnitude: whether there is a magnitude (DoRA).
    """

    site: str
    module: str
    A: Tensor
    B: Tensor
    scaling: float
    change: Callable[[], Tensor] | None = None
    magnitude: bool = False

    @property
    def r(self) -> int:
        """The rank of the factors."""
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.B.shape[0], self.A.shape[1]

    @cached_property
    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """U (out, n), S and V (in, n) of the change of the weight, float64.

        n is r for LoRA, whose product is never formed. DoRA's change has no low rank: S is whole,
        and the leading directions are kept, at least 4 r of them.

        Raises:
            StateError: DoRA without its base weight.
        """
        if self.change is not None:
            left, values, rows = torch.linalg.svd(self.change(), full_matrices=False)
            n = max(4 * self.r, _MIN_DIRECTIONS)
            return left[:, :n].double(), values.double(), rows[:n].T.double()
        self._require_change()
        left, values, right = product_svd(self.B, self.A)
        # Singular values are not negative: a negative scaling turns the left directions round.
        return left * math.copysign(1.0, self.scaling), values * abs(self.scaling), right

    def dense(self) -> Tensor:
        """The change of the weight, (out, in) float32.

        Raises:
            StateError: DoRA without its base weight.
        """
        if self.change is not None:
            return self.change()
        self._require_change()
        return self.scaling * (self.B @ self.A)

    def _require_change(self) -> None:
        if self.magnitude and self.change is None:
            raise StateError(
                "the change that a DoRA adapter makes depends on the base weight",
                where=self.site,
                remedy="name the base: --model REF",
            )


@dataclass(frozen=True, kw_only=True)
class Source:
    """An adapter that is looked at.

    Attributes:
        label: its name in tables: the last parts of its path that tell it from the others.
        path: its directory.
        adapter: what was read.
        updates: site -> update, in the model's order.
        sites: what was asked for, see `read_source`.
    """

    label: str
    path: Path
    adapter: Adapter
    updates: Mapping[str, Update]
    sites: Sequence[str] = ()

    def means(self, site: str) -> bool:
        """Whether this site was asked for."""
        return not self.sites or any(matches(pattern, site) for pattern in self.sites)


class Base:
    """The weights that adapters change.

    Args:
        model: the base, loaded; not changed.
    """

    def __init__(self, model: PreTrainedModel | nn.Module) -> None:
        self.model = model
        self.modules = base_modules(model)
        prefix = getattr(model, "base_model_prefix", "")
        self._prefix = prefix if isinstance(prefix, str) else ""

    def module(self, name: str) -> nn.Module | None:
        """The module of a name, which another head's adapter may know with or without a prefix."""
        for known in (name, name.removeprefix(f"{self._prefix}."), f"{self._prefix}.{name}"):
            if known in self.modules:
                return self.modules[known]
        return None

    def layer(self, factors: Factors) -> tuple[nn.Module, LayerKind]:
        """The layer that a site changes, and its geometry.

        Raises:
            AdapterFileError: the model has no such layer, or one of another shape.
        """
        module = self.module(factors.module)
        kind = None if module is None else kind_of(module)
        if module is None or kind is None:
            raise AdapterFileError(
                "the adapter changes a layer that the base does not have",
                where=factors.module,
                found=type(self.model).__name__,
                remedy="name the base it was made for: --model REF",
            )
        rows, *rest = kind.shape(module)
        whole = factors.B.shape[0] if factors.rows is None else factors.rows.whole
        inputs = factors.A.flatten(1).shape[1]
        if (rows, math.prod(rest)) != (whole, inputs):
            raise AdapterFileError(
                "the adapter's factors do not have the shape of the base's layer",
                where=factors.module,
                expected=f"out x in = {whole} x {inputs}",
                found=f"{rows} x {math.prod(rest)}",
                remedy="name the base it was made for: --model REF",
            )
        return module, kind

    def weight(self, factors: Factors) -> Tensor:
        """The site's own rows of W0 as (out, in), float32; it must not be changed.

        Raises:
            AdapterFileError: see `layer`.
        """
        if factors.stack is not None:
            parameter = find_parameter(self.modules, parameter_of(factors))
            if parameter is not None:
                matrix = matrix_of(parameter.detach(), factors)
                return as_matrix(KINDS[factors.kind], matrix).cpu().float()
        module, kind = self.layer(factors)
        return take_rows(as_matrix(kind, base_weight(module).read()).float(), factors.rows)

    def change(self, factors: Factors) -> Tensor:
        """What the site adds to its own rows of W0, (out, in) float32.

        Raises:
            AdapterFileError: see `layer`.
        """
        module, kind = self.layer(factors)
        # A foreign file does not always tell a Linear from a Conv1D.
        typed = replace(factors, kind=kind.name)
        whole = as_matrix(kind, typed.delta(base_weight(module).read().float()))
        return take_rows(whole, factors.rows)


def read_source(
    path: str | Path,
    *,
    base: Base | None = None,
    sites: Sequence[str] = (),
    any_base: bool = False,
    label: str | None = None,
) -> Source:
    """Read an adapter's directory, lorakit's or another tool's in PEFT's layout.

    Args:
        path: the directory.
        base: the weights it changes; DoRA needs them.
        sites: only the sites that one of these names, suffixes or expressions means; all if empty.
        any_base: accept another base than the passport's.
        label: its name in tables.

    Raises:
        AdapterFileError: the files cannot be read, hold numbers that are not finite, or do not fit
            the base.
        BaseMismatchError: the passport names another base.
        RequestError: no site is meant.
    """
    path = Path(path)
    adapter = read_adapter(path)
    require_finite(adapter, path)
    source = Source(
        label=label or path.name, path=path, adapter=adapter, updates={}, sites=tuple(sites)
    )
    updates = {
        name: _update(name, factors, None)
        for name, factors in adapter.factors.items()
        if source.means(name)
    }
    source = replace(source, updates=updates)
    if base is not None:
        return on_base(source, base, any_base=any_base)
    if not adapter.tokens:
        require_sites(source)
    return source


def require_sites(source: Source) -> None:
    """Refuse a source of which nothing is looked at.

    Raises:
        RequestError: no site is meant.
    """
    if source.updates:
        return
    adapter = source.adapter
    leaves = sorted({name.rpartition(".")[2] for name in adapter.factors})
    raise RequestError(
        "no site of this adapter is meant",
        where=str(source.path),
        expected=f"a name, suffix or expression of a site: {', '.join(leaves[:8])}",
        found=", ".join(source.sites) or "an adapter without low-rank updates",
        remedy="what rows of tokens change is seen with the base: --model REF"
        if adapter.tokens
        else None,
    )


def on_base(source: Source, base: Base, *, any_base: bool = False) -> Source:
    """The same source with the weights that it changes; rows of tokens become sites.

    Raises:
        AdapterFileError: it does not fit the base.
        BaseMismatchError: the passport names another base.
        RequestError: no site is meant.
    """
    if not any_base:
        require_same_base(base.model, source.adapter.passport)
    adapter = source.adapter
    if any(base.module(f.module) is None for f in adapter.factors.values() if f.stack is None):
        adapter = under_its_names(base.model, base.modules, adapter)
    adapter, problems = fit_parameters(base.modules, adapter)
    if problems:
        raise AdapterFileError(
            "the adapter changes parameters that the base does not have",
            where=str(source.path),
            found="\n".join(problems[:_SHOWN]),
            remedy="name the base it was made for: --model REF",
        )
    adapter = tokens_as_factors(base.modules, adapter)
    updates = {
        name: _update(name, factors, base)
        for name, factors in adapter.factors.items()
        if source.means(name)
    }
    placed = replace(source, adapter=adapter, updates=updates)
    require_sites(placed)
    return placed


def _update(name: str, factors: Factors, base: Base | None) -> Update:
    if base is not None and factors.stack is None:
        base.layer(factors)  # the shapes must agree before anything is computed
    is_dora = factors.magnitude is not None
    change = partial(base.change, factors) if base is not None and is_dora else None
    return Update(
        site=name,
        module=factors.module,
        A=factors.A.detach().flatten(1).float(),
        B=factors.B.detach().flatten(1).float(),
        scaling=factors.scaling,
        change=change,
        magnitude=is_dora,
    )


def labels_of(paths: Sequence[str | Path]) -> list[str]:
    """A short label for each path: as few of its last parts as tell them apart."""
    parts = [Path(path).resolve().parts for path in paths]
    longest = max(len(p) for p in parts)
    for length in range(1, longest + 1):
        labels = ["/".join(p[-length:]) for p in parts]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{i + 1}: {'/'.join(p[-1:])}" for i, p in enumerate(parts)]
