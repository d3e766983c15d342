"""What the formats of other tools have in common: resolved names, whole updates, refusals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from lorakit.adapters.adapter import Adapter, Factors
from lorakit.adapters.parameters import stacked_parameters
from lorakit.adapters.spec import LoraSpec
from lorakit.adapters.targets import base_modules
from lorakit.errors import AdapterFileError, RequestError, nearest
from lorakit.formats.peft_parts import FACTOR_DTYPES, stack_parts
from lorakit.layers.kinds import LayerKind, kind_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversion:
    """What a foreign file does not say of itself.

    Attributes:
        model: the base without its weights: names, shapes, geometry.
        base: how the base is named, for PEFT's configuration.
        alpha: the numerator of the scaling, where the format has none (loralib).
        parts: the parts of fused projections that were adapted, in order (loralib).
        prefix: what stands before every name (kohya); None writes lora_te and reads any known one.
    """

    model: nn.Module
    base: str
    alpha: float | None = None
    parts: tuple[str, ...] = ()
    prefix: str | None = None


class ForeignFormat(Protocol):
    """One format of another tool."""

    name: str
    about: str

    def recognises(self, path: Path) -> bool:
        """Whether this path looks like the format, from its names alone."""
        ...

    def read(self, path: Path, given: Conversion) -> Adapter:
        """Read an adapter.

        Raises:
            AdapterFileError: tensors that have no place, or are missing.
            RequestError: something the file does not say is not given.
        """
        ...

    def write(self, adapter: Adapter, path: Path, given: Conversion) -> Path:
        """Write an adapter; returns what was written. The path is a fresh staging directory.

        Raises:
            RequestError: the format cannot hold this adapter, with the reason.
        """
        ...


@dataclass(frozen=True, slots=True)
class WholeUpdate:
    """The update of one whole module: scaling B A, parts of fused projections joined.

    Attributes:
        A: (r, in).
        B: (out, r).
    """

    module: str
    kind: str
    A: Tensor
    B: Tensor
    scaling: float

    def at(self, scaling: float) -> Tensor:
        """B such that `scaling` B A is the same change.

        The same bits where nothing is folded; else rounded once, halves to float32.
        """
        if self.scaling == scaling:
            return self.B
        folded = self.B.double() * (self.scaling / scaling)
        return folded.to(torch.promote_types(self.B.dtype, torch.float32))


def whole_updates(adapter: Adapter, target: str, kinds: Sequence[str]) -> list[WholeUpdate]:
    """One low-rank update per module, for formats that know nothing else.

    Args:
        adapter: what is written.
        target: the format's name, for the error.
        kinds: the geometries it can hold.

    Raises:
        RequestError: DoRA, trained biases, modules trained beside, or another geometry.
    """
    refuse_dora(adapter, target)
    refuse_beside(adapter, target)
    updates: list[WholeUpdate] = []
    for module, sites in adapter.modules().items():
        parts = list(sites.values())
        if parts[0].kind not in kinds:
            raise RequestError(
                f"{target} holds no updates of this geometry",
                where=module,
                expected=", ".join(kinds),
                found=parts[0].kind,
            )
        A, B, scaling = stack_parts(parts)
        updates.append(WholeUpdate(module, parts[0].kind, A, B, scaling))
    return updates


def refuse_dora(adapter: Adapter, target: str) -> None:
    """Refuse DoRA where the format has no place for magnitudes."""
    if adapter.spec.update == "dora":
        raise RequestError(
            f"{target} has no place for the magnitudes of a DoRA adapter",
            where="--to",
            remedy="approximate it by plain LoRA first: lorakit compose DIR --how svd -r R "
            "--base REF, or merge it",
        )


def refuse_beside(adapter: Adapter, target: str) -> None:
    """Refuse what is trained beside where the format has no place for it."""
    beside = [*(f"{module}.bias" for module in adapter.biases), *adapter.overrides]
    beside += [f"rows of tokens in {name}" for name in adapter.tokens]
    beside += stacked_parameters(adapter)
    if beside:
        raise RequestError(
            f"{target} holds low-rank updates only; this adapter trained parameters beside",
            where="--to",
            found=", ".join(beside[:6]) + (" ..." if len(beside) > 6 else ""),
            remedy="merge the adapter, and convert the merged model",
        )


def refuse_tied(adapter: Adapter, given: Conversion, target: str) -> None:
    """Refuse an update of a weight that the base uses twice, where the format's tool changes both.

    Here, as in PEFT, an adapter on a tied embedding changes the look-up alone.

    Raises:
        RequestError: embedding and head are tied, and the adapter is on one of them.
    """
    owners: dict[int, list[str]] = {}
    for name, module in base_modules(given.model).items():
        for own, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if own == "weight":
                owners.setdefault(id(parameter), []).append(name)
    tied = {name for names in owners.values() if len(names) > 1 for name in names}
    for module in adapter.modules():
        if module in tied:
            raise RequestError(
                f"{target} would change embedding and head, which are tied; the adapter is on one",
                where=module,
                remedy="merge the adapter, and convert the merged model",
            )


def commonest_scaling(updates: Sequence[WholeUpdate]) -> float:
    """The scaling most updates have, so that few factors change."""
    scalings = [update.scaling for update in updates]
    return max(scalings, key=scalings.count)


def common_alpha(scalings: Sequence[float], ranks: Sequence[int]) -> float:
    """One alpha for a file that has no other: that of the commonest scaling and rank.

    Args:
        scalings: of each update.
        ranks: of each update.
    """
    return max(scalings, key=scalings.count) * max(ranks, key=ranks.count)


class Names:
    """Finds modules of the base under the names that other tools give them.

    Args:
        model: the base, with or without weights.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = {n: m for n, m in base_modules(model).items() if n}
        self.prefix = str(getattr(model, "base_model_prefix", "") or "")

    def find(self, name: str) -> str | None:
        """The module's own name: the same, or with the base's prefix added or taken away."""
        for candidate in (
            name,
            name.removeprefix("module."),
            name.removeprefix(f"{self.prefix}."),
            f"{self.prefix}.{name}",
            f"{self.prefix}.{name.removeprefix('model.')}",
        ):
            if candidate in self.modules:
                return candidate
        return None

    def require(self, names: Sequence[str], where: Path) -> dict[str, str]:
        """Every name with the module it means.

        Raises:
            AdapterFileError: a name that means no module, or two names that mean one.
        """
        found = {name: self.find(name) for name in names}
        lost = [name for name, module in found.items() if module is None]
        if lost:
            close = nearest(lost[0], self.modules, n=2)
            raise AdapterFileError(
                "the file has updates of modules that the base does not have",
                where=str(where),
                found=", ".join(lost[:6]) + (" ..." if len(lost) > 6 else ""),
                remedy=f"is --base right? The nearest names are {', '.join(close)}"
                if close
                else "is --base right?",
            )
        meant = {name: module for name, module in found.items() if module is not None}
        one_name_each(meant, where)
        return meant

    def kind(self, module: str, where: Path) -> LayerKind:
        """The geometry of a module.

        Raises:
            AdapterFileError: it has none.
        """
        kind = kind_of(self.modules[module])
        if kind is None:
            raise AdapterFileError(
                "the file has an update of a module that cannot be adapted",
                where=f"{where}: {module}",
                found=type(self.modules[module]).__name__,
            )
        return kind

    def factors(self, module: str, A: Tensor, B: Tensor, *, scaling: float, where: Path) -> Factors:
        """Factors of a whole module, their shapes checked.

        Raises:
            AdapterFileError: the shapes are not the module's.
        """
        kind = self.kind(module, where)
        r = A.shape[0]
        expected = kind.factor_shapes(kind.shape(self.modules[module]), r)
        if (tuple(A.shape), tuple(B.shape)) != expected:
            raise AdapterFileError(
                "an update has other shapes than the base's module",
                where=f"{where}: {module}",
                expected=f"A {expected[0]}, B {expected[1]}",
                found=f"A {tuple(A.shape)}, B {tuple(B.shape)}",
                remedy="is --base right?",
            )
        return Factors(
            A=A.contiguous(),
            B=B.contiguous(),
            alpha=scaling * r,
            scaling=scaling,
            kind=kind.name,
            module=module,
        )


def one_name_each(meant: Mapping[str, str], where: Path, *, remedy: str | None = None) -> None:
    """Refuse two names of one module: the second would replace the first without a word.

    Args:
        meant: name in the file -> module.
        where: the file.
        remedy: what to do.

    Raises:
        AdapterFileError: two names mean one module.
    """
    first: dict[str, str] = {}
    for name, module in meant.items():
        earlier = first.setdefault(module, name)
        if earlier != name:
            raise AdapterFileError(
                "two names in the file mean one module of the base",
                where=f"{where}: {module}",
                expected="one update",
                found=f"{earlier} and {name}",
                remedy=remedy or "leave one of the two out of the file",
            )


def made_adapter(
    factors: Mapping[str, Factors], given: Conversion, *, source: Path, format_name: str
) -> Adapter:
    """An adapter of foreign factors, in the model's order.

    Raises:
        AdapterFileError: there are none, or a number is not finite.
    """
    if not factors:
        raise AdapterFileError("the file has no low-rank update", where=str(source))
    broken = [
        n for n, f in factors.items() if not bool(f.A.isfinite().all() & f.B.isfinite().all())
    ]
    if broken:
        raise AdapterFileError(
            "the file has numbers that are not finite", where=f"{source}: {broken[0]}"
        )
    order = {name: i for i, name in enumerate(base_modules(given.model))}
    ordered = dict(sorted(factors.items(), key=lambda item: order[item[1].module]))
    ranks = [f.r for f in ordered.values()]
    r = max(ranks, key=ranks.count)
    alphas = [f.alpha for f in ordered.values()]
    alpha = max(alphas, key=alphas.count)
    spec = LoraSpec(
        r=r,
        alpha=alpha,
        targets=tuple(ordered),
        rank_pattern={n: f.r for n, f in ordered.items() if f.r != r},
        alpha_pattern={n: f.alpha for n, f in ordered.items() if f.alpha != alpha},
    )
    task = "CAUSAL_LM" if type(given.model).__name__.endswith(("CausalLM", "LMHeadModel")) else None
    return Adapter(
        spec=spec,
        factors=ordered,
        passport={"method": "lora", "converted_from": {"format": format_name}},
        config={"base_model_name_or_path": given.base, "task_type": task},
    )


def pairs_of(
    tensors: Mapping[str, Tensor], endings: tuple[str, str], where: Path
) -> dict[str, tuple[Tensor, Tensor]]:
    """Module's name in the file -> the two factors.

    Raises:
        AdapterFileError: one factor without the other, or one that is no matrix of numbers.
    """
    first, second = endings
    names = dict.fromkeys(
        key.removesuffix(end) for key in tensors for end in endings if key.endswith(end)
    )
    alone = [n for n in names if f"{n}{first}" not in tensors or f"{n}{second}" not in tensors]
    if alone:
        raise AdapterFileError(
            "a factor stands without the other", where=f"{where}: {alone[0]}", expected=str(endings)
        )
    pairs = {n: (tensors[f"{n}{first}"], tensors[f"{n}{second}"]) for n in names}
    for name, factors in pairs.items():
        for factor in factors:
            if factor.ndim < 2 or not factor.numel() or factor.dtype not in FACTOR_DTYPES:
                raise AdapterFileError(
                    "a factor that is no matrix of numbers",
                    where=f"{where}: {name}",
                    expected="a rank of at least 1, floating point",
                    found=f"{tuple(factor.shape)}, {str(factor.dtype).removeprefix('torch.')}",
                )
    return pairs
