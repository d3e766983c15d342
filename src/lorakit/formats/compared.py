"""How far two adapters are apart, thing by thing, without forming a weight's whole change."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lorakit.adapters.adapter import Adapter, Factors
from lorakit.formats.peft_parts import stack_magnitudes


def differences(first: Adapter, second: Adapter) -> dict[str, float]:
    """The relative difference of every change, magnitude, bias and parameter beside.

    Args:
        first: what the differences are relative to.
        second: an adapter of the same base; its factors may be others with the same product.

    Returns:
        Name -> norm of the difference over the norm of the first's value (the difference itself
        where that is zero); infinite where only one of the two has it. In float64.
    """
    found: dict[str, float] = {}
    mine, theirs = _updates(first), _updates(second)
    for module in mine.keys() | theirs.keys():
        both = module in mine and module in theirs
        found[module] = _product_difference(mine[module], theirs[module]) if both else math.inf
    tensors, others = _beside(first), _beside(second)
    for name in tensors.keys() | others.keys():
        both = name in tensors and name in others
        found[name] = _tensor_difference(tensors[name], others[name]) if both else math.inf
    return found


def _updates(adapter: Adapter) -> dict[str, tuple[Tensor, Tensor]]:
    """Module -> (A, s B) of the whole module, (r, in) and (out, r), in float64."""
    return {
        module: (
            torch.cat([f.A.flatten(1).double() for f in sites.values()]),
            torch.cat([_scaled_rows(f) for f in sites.values()], dim=1),
        )
        for module, sites in adapter.modules().items()
    }


def _scaled_rows(factors: Factors) -> Tensor:
    B = factors.B.flatten(1).double() * factors.scaling
    return B if factors.rows is None else factors.rows.spread(B.T).T


def _beside(adapter: Adapter) -> dict[str, Tensor]:
    """Everything but the factors, by name."""
    magnitudes = {
        f"{module}.magnitude": stack_magnitudes(
            list(sites.values()), adapter.base_norms.get(module)
        )
        for module, sites in adapter.modules().items()
        if any(f.magnitude is not None for f in sites.values())
    }
    biases = {f"{module}.bias": bias for module, bias in adapter.biases.items()}
    rows = {f"{n}, tokens {t.indices}": t.rows for n, t in adapter.tokens.items()}
    return {**magnitudes, **biases, **adapter.overrides, **rows}


def _product_difference(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> float:
    (A, B), (other_A, other_B) = first, second
    if (A.shape[1], B.shape[0]) != (other_A.shape[1], other_B.shape[0]):
        return math.inf
    if A.shape == other_A.shape and A.equal(other_A):
        difference = _product_norm(A, B - other_B)
    else:
        difference = _product_norm(torch.cat([A, other_A]), torch.cat([B, -other_B], dim=1))
    return _relative(difference, lambda: _product_norm(A, B))


def _product_norm(A: Tensor, B: Tensor) -> float:
    """The Frobenius norm of B A from two small triangles: orthogonal factors do not change it."""
    if not bool(B.any()):
        return 0.0
    left = torch.linalg.qr(B, mode="r").R
    right = torch.linalg.qr(A.T, mode="r").R
    return float((left @ right.T).norm())


def _tensor_difference(first: Tensor, second: Tensor) -> float:
    if first.shape != second.shape:
        return math.inf
    if first.dtype == second.dtype and first.equal(second):
        return 0.0
    difference = float((first.double() - second.double()).norm())
    return _relative(difference, lambda: float(first.double().norm()))


def _relative(difference: float, size: Callable[[], float]) -> float:
    """A NaN stays one; the size is asked for only where there is a difference."""
    if difference == 0.0:
        return 0.0
    whole = size()
    return difference / whole if whole else difference
