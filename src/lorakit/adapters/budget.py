"""What a budget pays for: parameters or bytes, and the rank that all sites can have."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Protocol

from lorakit.errors import SpecError
from lorakit.formatting import format_count

_FLOAT32_BYTES = 4
_PARAMS = {"": 1, "k": 1e3, "m": 1e6}
_BYTES = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_BUDGET = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[A-Za-z]*)")


class Priced(Protocol):
    """Something whose size depends on its rank."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in), or the kind's shape."""
        ...

    def num_params_at(self, r: int) -> int:
        """Learned numbers at this rank."""
        ...


def budget_params(budget: int | str, *, bytes_per_param: int = _FLOAT32_BYTES) -> int:
    """A budget as a number of parameters.

    Args:
        budget: parameters (400000, "400k", "1.5M"), or bytes ("1.5 MB", "64 KiB").
        bytes_per_param: what one number takes where bytes are counted; learned ones are float32.

    Raises:
        SpecError: it cannot be understood, is nothing, or has a lone B, which is a billion
            parameters to one reader and bytes to another.
    """
    found = _BUDGET.fullmatch(str(budget).strip().replace("_", ""))
    if found is not None and found["unit"].lower() == "b":
        number = float(found["number"])
        raise SpecError(
            "the budget may mean billions of parameters, or bytes",
            where="budget",
            found=repr(budget),
            remedy=f'"{number * 1000:g}M" for parameters, "{number / 1000:g} kB" for bytes',
        )
    units = {**_PARAMS, **{name: size / bytes_per_param for name, size in _BYTES.items()}}
    unit = units.get(found["unit"].lower()) if found else None
    if isinstance(budget, bool) or found is None or unit is None:
        raise SpecError(
            "the budget cannot be understood",
            where="budget",
            expected='parameters (400000, "400k", "1.5M") or bytes ("1.5 MB", "64 KiB")',
            found=repr(budget),
        )
    num_params = int(float(found["number"]) * unit)
    if num_params < 1:
        raise SpecError("the budget is empty", where="budget", expected=">= 1", found=repr(budget))
    return num_params


def equal_rank(sites: Sequence[Priced], num_params: int) -> int:
    """The largest rank that all sites can have within the budget.

    Raises:
        SpecError: rank 1 everywhere is already more, or the rank of every matrix less.
    """
    least = sum(site.num_params_at(1) for site in sites)
    if least > num_params:
        raise SpecError(
            "the budget does not pay for rank 1 at every target",
            where="budget",
            expected=f"at least {format_count(least)} parameters for {len(sites)} targets",
            found=f"{format_count(num_params)} parameters",
            remedy="raise the budget, or name fewer targets",
        )
    most = sum(site.num_params_at(full_rank(site)) for site in sites)
    if most < num_params:
        raise SpecError(
            "the budget is more than the targets can use",
            where="budget",
            expected=f"at most {format_count(most)} parameters: every matrix at its full rank",
            found=f"{format_count(num_params)} parameters",
            remedy="lower the budget, or name more targets",
        )
    each = sum(cost_of(site) for site in sites)
    return 1 + (num_params - least) // each


def full_rank(site: Priced) -> int:
    """The rank that a site's matrix can have at most."""
    out, *rest = site.shape
    return min(out, math.prod(rest))


def cost_of(site: Priced) -> int:
    """What one more rank costs at a site, in parameters."""
    return site.num_params_at(2) - site.num_params_at(1)
