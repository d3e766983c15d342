from __future__ import annotations

import pytest
import torch

from lorakit.errors import StateError
from lorakit.layers.routing import row_groups
from lorakit.layers.rows import Rows

_ROWS = [Rows(2, 3, 12), Rows(0, 4, 12, 3), Rows(8, 4, 12, 3), Rows(0, 5, 5)]


@pytest.mark.parametrize("rows", _ROWS, ids=str)
def test_spread_puts_each_value_on_its_own_row_and_take_gets_it_back(rows: Rows) -> None:
    own = [rows.start + i * rows.step + j for i in range(rows.count) for j in range(rows.length)]
    assert rows.size == len(own)
    assert rows.whole == rows.step * rows.count
    part = torch.randn(2, 3, rows.size)
    whole = rows.spread(part)
    assert whole.shape == (2, 3, rows.whole)
    assert whole[..., own].equal(part)
    assert whole.ne(0).sum() == part.ne(0).sum()
    assert rows.take(whole).equal(part)


def test_overlap() -> None:
    q, k = Rows(0, 4, 12, 3), Rows(4, 4, 12, 3)
    assert not q.overlaps(k)
    assert not k.overlaps(q)
    assert q.overlaps(q)
    assert q.overlaps(Rows(3, 2, 12, 3))
    assert q.overlaps(Rows(0, 36, 36))


def test_row_i_owns_the_ith_block_of_the_batch() -> None:
    groups = row_groups(["a", None, "b", "a"], 8, "here")
    assert {n: i.tolist() for n, i in groups.items()} == {"a": [0, 1, 6, 7], "b": [4, 5]}
    with pytest.raises(StateError, match="here"):
        row_groups(["a", "b", "a"], 8, "here")
