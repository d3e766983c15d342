"""The change of a weight block by block is the change as a whole."""

from __future__ import annotations

import pytest
import torch

from lorakit.layers.kinds import KINDS
from lorakit.layers.low_rank import UpdateValues
from lorakit.layers.rows import Rows

# kind -> shapes of A and B, and the length of the weight's first axis
SHAPES = {
    "linear": ((3, 7), (11, 3), 11),
    "conv1d": ((3, 7), (11, 3), 7),
    "embedding": ((3, 13), (5, 3), 13),
    "conv2d": ((3, 4, 2, 2), (9, 3, 1, 1), 9),
}


def values(kind: str, dtype: torch.dtype, rows: Rows | None = None) -> UpdateValues:
    generator = torch.Generator().manual_seed(0)
    shape_A, shape_B, _ = SHAPES[kind]
    if rows is not None:
        shape_B = (rows.size, *shape_B[1:])
    A, B = (torch.randn(s, generator=generator).to(dtype) for s in (shape_A, shape_B))
    return UpdateValues(kind=KINDS[kind], A=A, B=B, scaling=2.5, rows=rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_make_up_the_whole(kind: str, dtype: torch.dtype) -> None:
    update, length = values(kind, dtype), SHAPES[kind][2]
    before = update.A.clone(), update.B.clone()
    blocks = [update.delta_block(slice(i, i + 4)) for i in range(0, length, 4)]
    torch.testing.assert_close(torch.cat(blocks), update.delta(), rtol=1e-6, atol=1e-6)
    assert all(map(torch.equal, before, (update.A, update.B)))


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_blocks_of_a_part_of_a_fused_projection(kind: str) -> None:
    update = values(kind, torch.float32, Rows(start=2, length=3, step=11))
    blocks = [update.delta_block(slice(i, i + 4)) for i in range(0, SHAPES[kind][2], 4)]
    whole = update.delta()
    torch.testing.assert_close(torch.cat(blocks), whole, rtol=1e-6, atol=1e-6)
    assert 0 < int((whole != 0).sum()) < whole.numel()
