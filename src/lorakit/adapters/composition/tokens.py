"""Rows of tokens that parts replace: combined in their difference from the base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor, nn

from lorakit.adapters.composition.recipe import Part
from lorakit.adapters.parameters import token_modules, tokens_as_factors
from lorakit.adapters.targets import base_modules
from lorakit.adapters.token_rows import TokenRows
from lorakit.errors import BaseMismatchError, SpecError

# A head that may be tied to the embedding: without the base nobody knows.
_HEAD = "lm_head"


def tokens_need_base(parts: Sequence[Part]) -> bool:
    """Whether rows of tokens cannot be combined without the base's own."""
    return _meets_others(parts) or not all(
        abs(sum(part.weight for part in having) - 1) <= 1e-12
        for name in _names(parts)
        for having in _by_token(parts, name).values()
    )


def with_rows_of_tokens(parts: Sequence[Part], base: nn.Module | None) -> list[Part]:
    """The parts with their rows of tokens in a form that can be combined.

    Where another part changes the same weight in another way, rows become low-rank updates; where
    parts have rows of different modules, what is tied is named too.

    Raises:
        SpecError: the base is needed for that and not given.
    """
    if not _meets_others(parts):
        return list(parts)
    if base is None:
        raise SpecError(
            "the parts change rows of tokens and the same or other weights beside them; what is "
            "tied, and what a row changes, depends on the base",
            where=", ".join(part.name for part in parts if part.adapter.tokens),
            remedy="give the base: compose(..., base=model), --base REF",
        )
    modules = base_modules(base)
    named = [replace(p.adapter, tokens=token_modules(modules, p.adapter)) for p in parts]
    rows = {module for adapter in named for module in adapter.tokens}
    others = {f.module for adapter in named for f in adapter.factors.values()}
    others |= {name.removesuffix(".weight") for adapter in named for name in adapter.overrides}
    if rows & others:
        named = [tokens_as_factors(modules, adapter) for adapter in named]
    return [replace(part, adapter=own) for part, own in zip(parts, named, strict=True)]


def combined_tokens(parts: Sequence[Part], base: nn.Module | None) -> dict[str, TokenRows]:
    """New rows w0 + the sum of w (row - w0), over the parts that have the token.

    One part alone with weight 1 keeps its rows bit for bit.

    Raises:
        BaseMismatchError: rows of different widths.
        SpecError: the base is needed and not given.
    """
    combined: dict[str, TokenRows] = {}
    for name in _names(parts):
        having = [part for part in parts if name in part.adapter.tokens]
        given = [part.adapter.tokens[name] for part in having]
        if len(having) == 1 and having[0].weight == 1:
            combined[name] = given[0]
            continue
        if len({tokens.rows.shape[1] for tokens in given}) > 1:
            raise BaseMismatchError(
                "two parts replace rows of one embedding with different widths",
                where=name,
                found=", ".join(
                    f"{p.name} {tuple(p.adapter.tokens[name].rows.shape)}" for p in having
                ),
                remedy="compose adapters of one base model",
            )
        dtype = reduce(torch.promote_types, (tokens.rows.dtype for tokens in given))
        by_token = _by_token(parts, name)
        rows = [_row(name, token, those, base) for token, those in by_token.items()]
        combined[name] = TokenRows(tuple(by_token), torch.stack(rows).to(dtype))
    return combined


def _names(parts: Sequence[Part]) -> list[str]:
    return list(dict.fromkeys(name for part in parts for name in part.adapter.tokens))


def _by_token(parts: Sequence[Part], name: str) -> dict[int, list[Part]]:
    """Token -> the parts that have a row for it."""
    found: dict[int, list[Part]] = {}
    for part in parts:
        tokens = part.adapter.tokens.get(name)
        for token in tokens.indices if tokens else ():
            found.setdefault(token, []).append(part)
    return found


def _row(name: str, token: int, parts: Sequence[Part], base: nn.Module | None) -> Tensor:
    """One combined row, float64."""
    row = torch.zeros((), dtype=torch.float64)
    for part in parts:
        tokens = part.adapter.tokens[name]
        row = row + part.weight * tokens.rows[tokens.indices.index(token)].double()
    rest = 1 - sum(part.weight for part in parts)
    if abs(rest) <= 1e-12:
        return row
    if base is None:
        raise SpecError(
            "rows of tokens are replaced; what an adapter changes of them depends on the base",
            where=f"{name}, token {token}",
            found=", ".join(f"{part.name}={part.weight:g}" for part in parts),
            remedy="give the base (compose(..., base=model), --base REF), or weights that sum to 1 "
            "over the parts that have the token",
        )
    weight = base_modules(base)[name].get_parameter("weight").detach()
    return row + rest * weight[token].cpu().double()


def _meets_others(parts: Sequence[Part]) -> bool:
    """Whether what else is changed may be the same weights, tied ones included."""
    if not any(part.adapter.tokens for part in parts):
        return False
    if len({tuple(sorted(p.adapter.tokens)) for p in parts if p.adapter.tokens}) > 1:
        return True
    changed = {f.module for part in parts for f in part.adapter.factors.values()}
    changed |= {n.rpartition(".")[0] for part in parts for n in part.adapter.overrides}
    own = {name for part in parts for name in part.adapter.tokens}
    return bool(changed & own) or any(name.endswith(_HEAD) for name in changed)
