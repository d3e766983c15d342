from __future__ import annotations

import pytest

import tiny_models
from lorakit.errors import SpecError
from lorakit.methods.registry import build_method
from lorakit.train.context import require_context


def test_a_prefix_and_the_longest_row_must_fit() -> None:
    model = tiny_models.build("gpt2")  # 64 positions
    plan = build_method("prefix_embedding", {"prefix": 8, "infix": 2}).plan(model)
    rows = [[1] * 20, [1] * 54]
    require_context(model.config, plan, "prefix_embedding", (rows, None))
    with pytest.raises(SpecError, match="longest row") as caught:
        require_context(model.config, plan, "prefix_embedding", (rows[:1], [[1] * 55]))
    assert caught.value.exit_code == 2
    assert caught.value.found == "55 tokens + 10 special positions"
    without = build_method("bitfit", {}).plan(model)
    require_context(model.config, without, "bitfit", ([[1] * 200], None))
    endless = tiny_models.build("bloom")
    require_context(endless.config, plan, "prefix_embedding", ([[1] * 200], None))
