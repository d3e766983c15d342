"""Updates of parameters that are no module's own geometry: stacked experts, routers, token rows.

An expert's factors are those of one matrix of a stack, W[e] (d1, d2). Their kind says how it lies:
`linear` for (out, in), D[e] = B A, and `conv1d` for (in, out), D[e] = (B A)^T. PEFT took the second
for all of them up to 0.18, and since then only for classes that say so (`is_transposed`, GPT-OSS);
the change is the same with A' = B^T and B' = A^T. On a live model such a parameter is replaced as a
whole by W + s D, which is what PEFT computes in every forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from lorakit.adapters.adapter import Adapter, Factors
from lorakit.adapters.fold import merged_weight
from lorakit.adapters.token_rows import TokenRows
from lorakit.layers.kinds import CONV1D, EMBEDDING, LINEAR, kind_of
from lorakit.math.scaling import alpha_for


def stacked_parameters(adapter: Adapter) -> dict[str, dict[str, Factors]]:
    """Adapted parameter -> site name -> the factors of one of its matrices."""
    found: dict[str, dict[str, Factors]] = {}
    for name, factors in adapter.factors.items():
        if factors.stack is not None:
            found.setdefault(parameter_of(factors), {})[name] = factors
    return found


def parameter_of(factors: Factors) -> str:
    """The parameter that a stacked matrix belongs to."""
    return factors.module.rpartition(".")[0]


def matrix_of(parameter: Tensor, factors: Factors) -> Tensor:
    """The matrix W[e] (d1, d2) that stacked factors change, a view."""
    return parameter if parameter.ndim == 2 else parameter[int(factors.module.rpartition(".")[2])]


def find_parameter(modules: Mapping[str, nn.Module], name: str) -> Tensor | None:
    """A parameter by its full name."""
    owner, _, leaf = name.rpartition(".")
    module = modules.get(owner)
    return None if module is None else dict(module.named_parameters(recurse=False)).get(leaf)


def fit_parameters(modules: Mapping[str, nn.Module], adapter: Adapter) -> tuple[Adapter, list[str]]:
    """Factors of stacked matrices as this model's classes lay them, and what does not fit.

    A linear layer's weight that was adapted as a parameter becomes an ordinary site. Changes
    nothing and works on the meta device.
    """
    problems = _token_problems(modules, adapter.tokens) or _rows_of_dora(modules, adapter)
    factors: dict[str, Factors] = {}
    for name, given in adapter.factors.items():
        fitted = given if given.stack is None else _fitted(modules, name, given)
        if isinstance(fitted, str):
            problems.append(fitted)
        else:
            factors[name if fitted.stack == given.stack else fitted.module] = fitted
    return replace(adapter, factors=factors), problems


def _fitted(modules: Mapping[str, nn.Module], name: str, factors: Factors) -> Factors | str:
    whole = parameter_of(factors)
    owner, _, leaf = whole.rpartition(".")
    parameter = find_parameter(modules, whole)
    if parameter is None:
        return f"extra: {name}: the model has no such parameter"
    count = parameter.shape[0] if parameter.ndim == 3 else 1
    if parameter.ndim not in (2, 3) or factors.stack != count:
        return (
            f"misshapen: {name}: one of {factors.stack} matrices, the parameter is "
            f"{tuple(parameter.shape)}"
        )
    is_linear = kind_of(modules[owner]) is LINEAR and LINEAR.refusal(modules[owner]) is None
    if leaf == "weight" and is_linear:
        return replace(factors, module=owner, kind=LINEAR.name, stack=None)
    matrix = matrix_of(parameter, factors)
    transposed = parameter.ndim == 3 and bool(getattr(modules[owner], "is_transposed", False))
    fitted = replace(factors, kind=CONV1D.name) if transposed else factors
    if parameter.ndim == 2:
        fitted = replace(factors, kind=LINEAR.name)
    elif not transposed and factors.kind == CONV1D.name:
        fitted = replace(
            factors, A=factors.B.T.contiguous(), B=factors.A.T.contiguous(), kind=LINEAR.name
        )
    out, into = fitted.B.shape[0], fitted.A.shape[1]
    if tuple(matrix.shape) != ((into, out) if fitted.kind == CONV1D.name else (out, into)):
        return (
            f"misshapen: {name}: A {tuple(factors.A.shape)}, B {tuple(factors.B.shape)} for a "
            f"matrix {tuple(matrix.shape)}"
        )
    return fitted


def _token_problems(modules: Mapping[str, nn.Module], tokens: Mapping[str, TokenRows]) -> list[str]:
    problems: list[str] = []
    for name, given in tokens.items():
        weight = find_parameter(modules, f"{name}.weight")
        if weight is None or kind_of(modules[name]) not in (EMBEDDING, LINEAR):
            problems.append(f"extra: {name}: the model has no such embedding")
        elif weight.ndim != 2 or weight.shape[1] != given.rows.shape[1]:
            problems.append(
                f"misshapen: {name}: rows of {given.rows.shape[1]}, the weight is "
                f"{tuple(weight.shape)}"
            )
        elif max(given.indices) >= weight.shape[0]:
            problems.append(
                f"misshapen: {name}: token {max(given.indices)}, the vocabulary has "
                f"{weight.shape[0]}"
            )
    return problems


def _rows_of_dora(modules: Mapping[str, nn.Module], adapter: Adapter) -> list[str]:
    dora = {f.module for f in adapter.factors.values() if f.magnitude is not None}
    return [
        f"extra: {name}: rows of tokens are replaced, and DoRA changes all of them"
        for name in token_modules(modules, adapter)
        if name in dora
    ]


def token_modules(modules: Mapping[str, nn.Module], adapter: Adapter) -> dict[str, TokenRows]:
    """Every module whose rows change: those named, and those tied to them, with the new rows."""
    found = dict(adapter.tokens)
    for name, tokens in adapter.tokens.items():
        weight = find_parameter(modules, f"{name}.weight")
        for other in modules:
            if other not in found and find_parameter(modules, f"{other}.weight") is weight:
                found[other] = tokens
    return found


def whole_parameters(modules: Mapping[str, nn.Module], adapter: Adapter) -> Adapter:
    """The same adapter with stacked matrices and token rows as parameters that are replaced whole.

    Args:
        modules: of the live base.
        adapter: after `fit_parameters`, without a problem.

    Returns:
        An adapter that an ordinary model can carry; its new values lie on the CPU.
    """
    values: dict[str, Tensor] = {}
    if token_modules(modules, adapter).keys() & adapter.modules().keys():
        adapter = tokens_as_factors(modules, adapter)
    for name, tokens in token_modules(modules, adapter).items():
        values[f"{name}.weight"] = tokens.on(_required(modules, f"{name}.weight")).cpu()
    for name, parts in stacked_parameters(adapter).items():
        weight = _required(modules, name).detach()
        delta = torch.zeros(weight.shape, dtype=torch.float32)
        for factors in parts.values():
            matrix_of(delta, factors).add_(factors.delta())
        values[name] = merged_weight(weight, delta).cpu()
    return replace(
        adapter,
        factors={n: f for n, f in adapter.factors.items() if f.stack is None},
        tokens={},
        overrides={**adapter.overrides, **values},
    )


def tokens_as_factors(modules: Mapping[str, nn.Module], adapter: Adapter) -> Adapter:
    """The same adapter with its token rows as low-rank updates of the embedding and what is tied.

    One rank per token: for a look-up A picks the token and B is what its row changes; for a head B
    picks the token.

    Args:
        modules: of the base, with its weights.
        adapter: without a problem on this base.
    """
    factors = dict(adapter.factors)
    for name, tokens in token_modules(modules, adapter).items():
        weight = _required(modules, f"{name}.weight")
        change = tokens.change(weight)
        picks = torch.zeros(len(tokens.indices), weight.shape[0], dtype=change.dtype)
        picks[range(len(tokens.indices)), tokens.indices] = 1
        look_up = kind_of(modules[name]) is EMBEDDING
        rows = Factors(
            A=picks if look_up else change,
            B=(change if look_up else picks).T.contiguous(),
            alpha=alpha_for(1.0, len(tokens.indices), adapter.spec.scaling),
            scaling=1.0,
            kind=(EMBEDDING if look_up else LINEAR).name,
            module=name,
        )
        factors[name] = _joined(factors[name], rows, adapter) if name in factors else rows
    return replace(adapter, factors=factors, tokens={})


def _joined(first: Factors, rows: Factors, adapter: Adapter) -> Factors:
    """Both updates of one weight as one, with the first one's scaling."""
    r = first.r + rows.r
    B = torch.cat([first.B.to(rows.B.dtype), rows.B / first.scaling], dim=1)
    alpha = alpha_for(first.scaling, r, adapter.spec.scaling)
    return replace(first, A=torch.cat([first.A.to(rows.A.dtype), rows.A]), B=B, alpha=alpha)


def _required(modules: Mapping[str, nn.Module], name: str) -> Tensor:
    parameter = find_parameter(modules, name)
    if parameter is None:
        raise KeyError(name)
    return parameter
