"""BitFit learns in float32 whatever the base is kept in."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import tiny_models
from learned import trainable
from lorakit.methods.registry import build_method
from lorakit.methods.saved import load_saved
from lorakit.models.load import load_base_model

CASES = [("llama", {"add": True}), ("qwen2", {"add": True}), ("gpt2", {}), ("bert", {})]
# A hundred of these are 0.01, and one beside 1.0 is lost in bfloat16.
STEP = 1e-4


@pytest.mark.parametrize(("architecture", "options"), CASES)
def test_biases_are_float32_masters_and_the_layer_computes_in_its_own_dtype(
    architecture: str, options: dict[str, bool]
) -> None:
    model = tiny_models.build(architecture).to(torch.bfloat16)
    given = tiny_models.inputs(model)
    before = tiny_models.outputs(model, given)
    method = build_method("bitfit", options)
    method.attach(model)
    assert tiny_models.outputs(model, given).equal(before)
    learned = trainable(model)
    assert {p.dtype for p in learned.values()} == {torch.float32}
    assert {id(p) for p in learned.values()} == {id(p) for p in method.state(model).values()}
    with torch.no_grad():
        for bias in learned.values():
            bias.fill_(1.0)
            for _ in range(100):
                bias.add_(STEP)
    assert all(torch.allclose(b, torch.tensor(1.01), atol=1e-5) for b in learned.values())
    live = tiny_models.outputs(model, given)
    assert live.dtype == torch.bfloat16
    assert not live.equal(before)
    model.train()(**given)[0].float().square().sum().backward()
    grads = [p.grad for p in learned.values() if p.grad is not None]
    assert {g.dtype for g in grads} == {torch.float32}
    assert any(g.abs().max() > 0 for g in grads)
    with method.disabled(model.eval()):
        assert tiny_models.outputs(model, given).equal(before)
    assert tiny_models.outputs(model, given).equal(live)


@pytest.mark.parametrize(("architecture", "options"), CASES)
def test_masters_are_saved_loaded_and_copied_with_every_bit(
    architecture: str, options: dict[str, bool], tmp_path: Path
) -> None:
    model = tiny_models.build(architecture).to(torch.bfloat16)
    fresh = copy.deepcopy(model)
    method = build_method("bitfit", options)
    method.attach(model)
    with torch.no_grad():
        for bias in trainable(model).values():
            bias += torch.randn(bias.shape)
    method.save(model, tmp_path / "saved", {})
    again = load_saved(fresh, tmp_path / "saved")
    mine = method.state(model)
    for name, value in again.state(fresh).items():
        assert value.dtype == torch.float32
        assert value.equal(mine[name])
    given = tiny_models.inputs(model)
    live = tiny_models.outputs(model, given)
    assert tiny_models.outputs(fresh, given).equal(live)
    twin = copy.deepcopy(model)
    assert tiny_models.outputs(twin, given).equal(live)
    for bias in trainable(twin).values():
        bias.data.zero_()
    assert tiny_models.outputs(model, given).equal(live)


@pytest.mark.parametrize("architecture", ["gpt2", "bert"])
def test_merging_rounds_to_the_bases_dtype_and_leaves_a_plain_model(
    architecture: str, tmp_path: Path
) -> None:
    model = tiny_models.build(architecture).to(torch.bfloat16)
    given = tiny_models.inputs(model)
    method = build_method("bitfit", {})
    method.attach(model)
    with torch.no_grad():
        for bias in trainable(model).values():
            bias += torch.randn(bias.shape)
    live = tiny_models.outputs(model, given)
    method.merge(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert tiny_models.outputs(model, given).equal(live)
    model.save_pretrained(tmp_path / "merged")
    read = load_base_model(tmp_path / "merged", dtype="auto")
    assert tiny_models.outputs(read, given).equal(live)


def test_an_error_in_a_forward_pass_leaves_the_masters_in_place() -> None:
    model = tiny_models.build("gpt2").to(torch.bfloat16)
    method = build_method("bitfit", {})
    method.attach(model)
    with pytest.raises(IndexError):
        model(input_ids=torch.tensor([[10**6]]))
    bad = model.transformer.h[0].mlp
    with pytest.raises(RuntimeError):
        bad(torch.zeros(1, 2, 3, dtype=torch.bfloat16))
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}


def test_a_bias_added_to_a_4_bit_layer_stays_float32(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    tiny_models.build("llama").save_pretrained(tmp_path)
    model = load_base_model(tmp_path, "nf4", dtype=torch.bfloat16, device="cpu")
    given = tiny_models.inputs(model)
    method = build_method("bitfit", {"add": True})
    method.attach(model)
    with torch.no_grad():
        for bias in trainable(model).values():
            bias += torch.randn(bias.shape)
    live = tiny_models.outputs(model, given)
    assert tiny_models.outputs(model, given).equal(live)
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    model.train()(**given)[0].float().square().sum().backward()
    grads = [p.grad for p in trainable(model).values() if p.grad is not None]
    assert grads
    assert {g.dtype for g in grads} == {torch.float32}
