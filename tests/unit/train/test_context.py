from __future__ import annotations

import pytest

import tiny_models
from lorakit.data.encode import Example
from lorakit.data.preference import Answer, Judged
from lorakit.errors import DataError, SpecError
from lorakit.methods.registry import build_method
from lorakit.train.context import require_context


def test_a_prefix_and_the_longest_row_must_fit() -> None:
    model = tiny_models.build("gpt2")  # 64 positions
    plan = build_method("prefix_embedding", {"prefix": 8, "infix": 2}).plan(model)
    rows = [[1] * 20, [1] * 54]
    require_context(model, plan, "prefix_embedding", (rows, None))
    with pytest.raises(SpecError, match="longest row") as caught:
        require_context(model, plan, "prefix_embedding", (rows[:1], [[1] * 55]))
    assert caught.value.exit_code == 2
    assert caught.value.found == "55 tokens + 10 special positions"
    without = build_method("bitfit", {}).plan(model)
    require_context(model, without, "bitfit", ([[1] * 64], None))
    endless = tiny_models.build("bloom")
    require_context(endless, plan, "prefix_embedding", ([[1] * 200], None))


@pytest.mark.parametrize(("architecture", "context"), [("gpt2", 64), ("bert", 64), ("roberta", 65)])
def test_a_row_alone_must_fit(architecture: str, context: int) -> None:
    model = tiny_models.build(architecture)
    plan = build_method("lora", {}).plan(model)
    require_context(model, plan, "lora", ([[1] * context], None))
    with pytest.raises(DataError, match="longest row does not fit") as caught:
        require_context(model, plan, "lora", ([[1] * 3], [[1] * (context + 1)]))
    assert caught.value.exit_code == 2
    assert f"data.max_length: {context}" in str(caught.value)


def test_the_answers_of_a_pair_are_sequences_of_their_own() -> None:
    model = tiny_models.build("gpt2")  # 64 positions
    plan = build_method("lora", {}).plan(model)

    def pair(chosen: int, rejected: int) -> Judged:
        examples = [
            Example([1] * length, [-100] + [1] * (length - 1)) for length in (chosen, rejected)
        ]
        return Judged((Answer(examples[0], True), Answer(examples[1], False)), row=0)

    require_context(model, plan, "lora", ([pair(60, 64)], None))
    with pytest.raises(DataError, match="longest row does not fit") as caught:
        require_context(model, plan, "lora", ([pair(60, 65)], None))
    assert caught.value.found == "65 tokens"
