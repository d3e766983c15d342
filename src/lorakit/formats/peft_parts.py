"""Parts of a fused projection in PEFT's file, which knows whole modules only."""

from __future__ import annotations

from dataclasses import replace as replaced

import torch
from torch import Tensor

from lorakit.adapters.adapter import Factors
from lorakit.errors import AdapterFileError
from lorakit.formats.passport import SiteRecord
from lorakit.math.scaling import Scaling, alpha_for

# What a factor may be stored in; eight-bit floats and whole numbers are other tools' own encodings.
FACTOR_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def stack_parts(parts: list[Factors]) -> tuple[Tensor, Tensor, float]:
    """One (A, B, scaling) for the whole module: A stacked, B block-wise, one scaling for all."""
    if len(parts) == 1 and parts[0].rows is None:
        return parts[0].A, parts[0].B, parts[0].scaling
    scaling = parts[0].scaling
    blocks = [
        (p.rows.spread(p.B.T).T if p.rows else p.B)
        * (1.0 if p.scaling == scaling else p.scaling / scaling)
        for p in parts
    ]
    return torch.cat([p.A for p in parts]), torch.cat(blocks, dim=1), scaling


def stack_magnitudes(parts: list[Factors], base_norms: Tensor | None) -> Tensor:
    """One magnitude for the whole module, shaped as PEFT has it."""
    magnitudes = [p.magnitude for p in parts if p.magnitude is not None]
    if len(magnitudes) != len(parts):
        raise AdapterFileError(
            "a DoRA adapter needs a magnitude for every update",
            where=parts[0].module,
            found=f"{len(magnitudes)} of {len(parts)}",
        )
    whole = magnitudes[0]
    if parts[0].rows is not None:
        rows = [p.rows for p in parts if p.rows is not None]
        pairs = list(zip(rows, magnitudes, strict=True))
        whole = torch.stack([r.spread(m) for r, m in pairs]).sum(0)
        owned = torch.stack([r.spread(torch.ones_like(m)) for r, m in pairs]).sum(0) > 0
        if base_norms is not None:
            whole = torch.where(owned, whole, base_norms.to(whole.dtype))
        elif not bool(owned.all()):
            raise AdapterFileError(
                "PEFT's file needs a magnitude for every row of a fused projection",
                where=parts[0].module,
                expected="Adapter.base_norms for the rows that no part owns",
                found="none",
                remedy="save the adapter from the model it is attached to: save_adapter",
            )
    return whole[None, :, None, None] if parts[0].kind == "conv2d" else whole


def parts_fit(records: list[SiteRecord], whole: Factors) -> bool:
    """Whether the passport's sites can be cut from this update."""
    if not records or records[0].rows is None:
        return len(records) <= 1
    parts = [r.rows for r in records if r.rows is not None]
    inside = all(p.start >= 0 and 0 < p.length <= p.step - p.start for p in parts)
    rank = sum(r.r for r in records)
    whole_rows = {p.whole for p in parts}
    if whole.magnitude is not None and whole.magnitude.shape != whole.B.shape[:1]:
        return False
    return inside and rank == whole.r and whole_rows == {whole.B.shape[0]} and whole.B.ndim == 2


def split_parts(whole: Factors, records: list[SiteRecord], rule: Scaling) -> dict[str, Factors]:
    """The parts of a fused projection again, where the passport tells them."""
    if not records:
        return {whole.module: whole}
    if records[0].rows is None:
        record = records[0]
        return {record.name: replaced(whole, kind=record.kind)}
    factors: dict[str, Factors] = {}
    start = 0
    for record in records:
        if record.rows is None:
            continue
        columns = whole.B[:, start : start + record.r]
        # The file has one scaling for all parts, folded into B where they differ: it stays folded,
        # so that reading and writing again changes no bit.
        same = record.scaling == whole.scaling
        factors[record.name] = Factors(
            A=whole.A[start : start + record.r],
            B=record.rows.take(columns.T).T.contiguous(),
            alpha=record.alpha if same else alpha_for(whole.scaling, record.r, rule),
            scaling=whole.scaling,
            kind=record.kind,
            module=whole.module,
            rows=record.rows,
            magnitude=None if whole.magnitude is None else record.rows.take(whole.magnitude),
        )
        start += record.r
    return factors
