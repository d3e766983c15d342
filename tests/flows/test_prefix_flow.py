"""The prefix methods on the real SmolLM2: a few steps, save, load, answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.evaluate.generate import generate_answers
from lorakit.evaluate.likelihood import answer_nll
from lorakit.methods.registry import build_method
from lorakit.methods.saved import load_saved
from lorakit.models.label_head import LabelHead
from lorakit.models.load import load_model

ROWS = [("The word for cat is", " zorp"), ("The word for a big grey dog is", " blick blick")]


@pytest.mark.real
@pytest.mark.parametrize(("name", "lr"), [("prefix_embedding", 0.02), ("prefix_layer", 0.2)])
@pytest.mark.slow
def test_it_learns_two_answers_and_keeps_them(
    name: str, lr: float, smollm2_path: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, tokenizer = load_model(smollm2_path)
    prompts = [tokenizer(prompt)["input_ids"] for prompt, _ in ROWS]
    answers = [[*tokenizer(answer)["input_ids"], tokenizer.eos_token_id] for _, answer in ROWS]
    batch = _batch(prompts, answers)
    with torch.no_grad():
        base = model(**batch).logits
    method = build_method(name, {"prefix": 6, "infix": 2})
    method.attach(model)
    head = LabelHead(model)
    optimizer = torch.optim.AdamW(method.param_groups(model, lr))
    losses = []
    for _ in range(25):
        loss = head.loss(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    assert not head.full_forward
    method.save(model, tmp_path / "out", {})
    fresh, _ = load_model(smollm2_path)
    loaded = load_saved(fresh, tmp_path / "out")
    # Prompts of different lengths: one of them is padded on the left.
    found = generate_answers(fresh, tokenizer, prompts, max_new_tokens=8)
    assert [answer.text for answer in found] == [answer.strip() for _, answer in ROWS]
    assert all(answer.finished for answer in found)
    nll = answer_nll(fresh, [_Row(p, a) for p, a in zip(prompts, answers, strict=True)])
    assert float(nll[:, 0].sum() / nll[:, 1].sum()) == pytest.approx(losses[-1], abs=0.1)
    with loaded.disabled(fresh), torch.no_grad():
        assert fresh(**batch).logits.equal(base)


class _Row:
    def __init__(self, prompt: list[int], answer: list[int]) -> None:
        self.input_ids = [*prompt, *answer]
        self.labels = [*[-100] * len(prompt), *answer]


def _batch(prompts: list[list[int]], answers: list[list[int]]) -> dict[str, Any]:
    rows = [_Row(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    width = max(len(row.input_ids) for row in rows)

    def padded(values: list[int], fill: int) -> list[int]:
        return [*values, *[fill] * (width - len(values))]

    return {
        "input_ids": torch.tensor([padded(row.input_ids, 0) for row in rows]),
        "attention_mask": torch.tensor([padded([1] * len(row.input_ids), 0) for row in rows]),
        "labels": torch.tensor([padded(row.labels, -100) for row in rows]),
    }
