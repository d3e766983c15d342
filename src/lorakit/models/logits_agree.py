"""Whether two ways to the same logits agree, asked on a small piece of a batch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_FULL_PRECISION_TOLERANCE = 1e-4
# Two orders of summation in bfloat16 leave SmolLM2's logits 4 % apart at the worst position, wrong
# positions 33 %, a token that sees the next one 80 %.
_HALF_PRECISION_TOLERANCE = 0.15
# Whole logits of long rows would be the fullest moment of the run: 32 MB in float32 are enough.
_NUM_COMPARED = 1 << 23
_MIN_COLUMNS = 16


def excerpt(
    batch: Mapping[str, Tensor], mask: Tensor, *, rows: Tensor, vocabulary: int, whole_rows: bool
) -> tuple[dict[str, Tensor], Tensor]:
    """A few rows of a batch, and of these the columns around the first that is asked for.

    Args:
        batch: what the model takes, (rows, positions, ...) each.
        mask: (rows, positions) bool, where logits are asked for; some in the chosen rows.
        rows: (n,) int64, the rows to keep.
        vocabulary: logits of one position.
        whole_rows: keep all columns: inputs and labels are different sequences.

    Returns:
        The same entries, and their mask, on their devices.
    """
    num_rows, num_columns = mask.shape
    width = max(_MIN_COLUMNS, _NUM_COMPARED // (len(rows) * vocabulary))
    first = int(mask[rows].any(dim=0).nonzero()[0])
    start = 0 if whole_rows else max(0, min(first - width // 2, num_columns - width))
    columns = slice(start, num_columns if whole_rows else start + width)

    def part(values: Tensor) -> Tensor:
        if values.ndim == 0 or values.shape[0] != num_rows:
            return values
        kept = values[rows.to(values.device)]
        in_columns = values.ndim > 1 and values.shape[1] == num_columns
        return kept[:, columns] if in_columns else kept

    return {name: part(values) for name, values in batch.items()}, mask[rows][:, columns]


def agree(short: Tensor, whole: Tensor) -> bool:
    """Whether (n, vocabulary) logits are the same but for the order of their sums.

    In half precision the noise of a position is spread over all its logits, and one of them is far
    out somewhere; so each position is taken as a whole, by the norm of what differs.
    """
    half = whole.dtype in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled(
        whole.device.type
    )
    short, whole = short.float(), whole.float()
    if not half:
        scale = max(1.0, whole.abs().max().item())
        bound = _FULL_PRECISION_TOLERANCE * scale
        return torch.allclose(short, whole, rtol=0.0, atol=bound, equal_nan=True)
    if not torch.equal(short.isfinite(), whole.isfinite()):
        return False
    short, whole = short.nan_to_num(0.0, 0.0, 0.0), whole.nan_to_num(0.0, 0.0, 0.0)
    # A softmax does not see what all logits of a position have in common.
    spread = (whole - whole.mean(-1, keepdim=True)).norm(dim=-1)
    apart = short - whole
    apart = (apart - apart.mean(-1, keepdim=True)).norm(dim=-1)
    return bool((apart <= _HALF_PRECISION_TOLERANCE * spread.clamp(min=1.0)).all())


def difference(short: Tensor, whole: Tensor) -> float:
    """The largest difference of two logits."""
    return (short.float() - whole.float()).abs().max().item()
