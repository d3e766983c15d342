"""Bottleneck adapters on the real models: SmolLM2 learns an answer, MiniLM keeps its vectors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from lorakit.methods.registry import build_method
from lorakit.methods.saved import load_saved
from lorakit.models.load import load_model

pytestmark = pytest.mark.real

ANSWER = " Saffron seven"


@pytest.mark.slow
def test_smollm2_learns_is_saved_loaded_and_generates(smollm2_path: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(smollm2_path)
    question = tokenizer("The word of the day is", return_tensors="pt")
    whole = tokenizer("The word of the day is" + ANSWER, return_tensors="pt")
    labels = whole["input_ids"].clone()
    labels[:, : question["input_ids"].shape[1]] = -100
    with torch.no_grad():
        base = model(**question).logits
    method = build_method("houlsby", {"bottleneck": 16})
    report = method.attach(model)
    assert len(report.sites) == 30 * 2
    with torch.no_grad():
        assert model(**question).logits.equal(base)
    optimizer = torch.optim.AdamW(method.param_groups(model, 3e-3))
    losses: list[float] = []
    for _ in range(12):
        loss = model(**whole, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    method.save(model, tmp_path / "adapter", {"seed": 1})
    fresh, _ = load_model(smollm2_path)
    loaded = load_saved(fresh, tmp_path / "adapter")
    num_new = labels.shape[1] - question["input_ids"].shape[1]
    ids = fresh.generate(**question, max_new_tokens=num_new, do_sample=False)
    assert tokenizer.decode(ids[0]).endswith(ANSWER)
    with torch.no_grad(), loaded.disabled(fresh):
        assert fresh(**question).logits.equal(base)


@pytest.mark.parametrize("design", ["houlsby", "lin", "pfeiffer", "adapterdrop"])
def test_minilm_keeps_its_vectors_and_takes_gradients(minilm_path: Path, design: str) -> None:
    model = AutoModel.from_pretrained(minilm_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(minilm_path)
    batch = tokenizer(["a cat sleeps", "the bank raised its rates today"], padding=True)
    given = {name: torch.tensor(batch[name]) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        base = model(**given).last_hidden_state
    method = build_method(design, {"bottleneck": 8})
    method.attach(model)
    live = model(**given).last_hidden_state
    assert live.equal(base)
    (live * torch.randn_like(live)).sum().backward()
    state = method.state(model)
    assert all(t.grad is not None for t in state.values())
    with torch.no_grad():
        for tensor in state.values():
            tensor.add_(0.1 * torch.randn_like(tensor))
        assert not torch.allclose(model(**given).last_hidden_state, base, atol=1e-2)
        with method.disabled(model):
            assert model(**given).last_hidden_state.equal(base)
