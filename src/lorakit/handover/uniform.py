"""One rank and one scaling for all modules, exactly: factors padded with zeros, s moved into B.

vLLM takes r and lora_alpha from the configuration once for all modules; `rank_pattern` and
`alpha_pattern` it does not read, and the result would differ without a word.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.nn import functional as F

from lorakit.adapters.adapter import Adapter, Factors
from lorakit.formats.peft_parts import stack_parts


def uniform(adapter: Adapter) -> tuple[Adapter, list[str]]:
    """The same change W0 + s B A of every module, written with one rank and scaling 1.

    Args:
        adapter: LoRA on linear layers; not changed.

    Returns:
        The adapter, itself if nothing had to be changed; and what was changed.
    """
    whole = {module: stack_parts(list(p.values())) for module, p in adapter.modules().items()}
    ranks = {A.shape[0] for A, _, _ in whole.values()}
    scalings = {scaling for _, _, scaling in whole.values()}
    parted = any(factors.rows is not None for factors in adapter.factors.values())
    if len(ranks) == 1 and len(scalings) == 1 and not parted:
        return adapter, []
    r = max(ranks)
    changes: list[str] = []
    if len(ranks) > 1:
        changes.append(f"ranks {', '.join(map(str, sorted(ranks)))} padded with zeros to {r}")
    if len(scalings) > 1:
        changes.append("each module's scaling moved into its B: alpha = r")
    if parted:
        changes.append("parts of fused projections written as one update of the whole")
    one_scaling = scalings.pop() if len(scalings) == 1 else None
    factors: dict[str, Factors] = {}
    for module, (A, B, scaling) in whole.items():
        kept = scaling if one_scaling is not None else 1.0
        padding = r - A.shape[0]
        factors[module] = Factors(
            A=F.pad(A, (0, 0, 0, padding)),
            B=F.pad(B if one_scaling is not None else _scaled(B, scaling), (0, padding)),
            alpha=kept * r,
            scaling=kept,
            kind="linear",
            module=module,
        )
    spec = replace(
        adapter.spec,
        r=r,
        alpha=float((one_scaling or 1.0) * r),
        scaling="alpha/r",
        rank_pattern={},
        alpha_pattern={},
    )
    return replace(adapter, spec=spec, factors=factors), changes


def _scaled(B: torch.Tensor, scaling: float) -> torch.Tensor:
    """S B, computed in float64 and rounded once."""
    return (B.double() * scaling).to(B.dtype)
