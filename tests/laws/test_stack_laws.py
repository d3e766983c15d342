"""A new adapter on top of a saved one: frozen beneath, exact, and saved as one that PEFT loads."""

from __future__ import annotations

import warnings
from pathlib import Path

import peft
import pytest
import torch

import tiny_models
from law_cases import Case, grid
from learned import attach_learned, bits, shake
from lorakit.adapters.adapter import Adapter
from lorakit.adapters.attach import detach
from lorakit.adapters.spec import LoraSpec
from lorakit.adapters.stack import attach_stacked, plan_stacked
from lorakit.errors import SpecError
from lorakit.formats.peft import load_adapter, save_adapter
from lorakit.weights.storage import base_weight

# Every geometry, parts of fused projections, patterns, the other scaling.
_NAMES = (
    "llama-all-linear",
    "llama-patterns-rslora",
    "gpt2-all-linear",
    "gpt2-parts-ranks",
    "bloom-qv",
    "vit-conv",
    "bert-embeddings",
)


def _first(case: Case, path: Path) -> Adapter:
    model = tiny_models.build(case.architecture)
    attach_learned(model, case.make(), warns=case.warns)
    save_adapter(model, path)
    return Adapter.load(path)


def _stacked(case: Case, first: Adapter, **changes: object) -> torch.nn.Module:
    model = tiny_models.build(case.architecture)
    spec = LoraSpec(**{"r": 2, "alpha": 5.0, "targets": tuple(first.factors), **changes})
    attach_stacked(model, plan_stacked(model, spec, first), first, "top")
    return model


@grid(*_NAMES)
def test_it_begins_as_the_one_beneath_and_is_saved_as_the_sum(case: Case, tmp_path: Path) -> None:
    first = _first(case, tmp_path / "first")
    alone = tiny_models.build(case.architecture)
    load_adapter(alone, tmp_path / "first")
    model = _stacked(case, first)
    given = tiny_models.inputs(model)
    start = tiny_models.outputs(model, given)
    torch.testing.assert_close(start, tiny_models.outputs(alone, given), rtol=1e-6, atol=1e-6)

    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    shake(model, seed=9)
    live = tiny_models.outputs(model, given)
    assert not torch.allclose(live, start, atol=1e-3)

    saved = save_adapter(model, tmp_path / "both", "top")
    for name, factors in first.factors.items():
        assert saved.factors[name].r == factors.r + 2
        torch.testing.assert_close(saved.factors[name].A[2:], factors.A, rtol=0, atol=0)
        beneath = saved.factors[name].scaling * saved.factors[name].B[:, 2:]
        torch.testing.assert_close(beneath, factors.scaling * factors.B, rtol=1e-6, atol=1e-7)
    again = tiny_models.build(case.architecture)
    load_adapter(again, tmp_path / "both")
    torch.testing.assert_close(tiny_models.outputs(again, given), live, rtol=1e-5, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = tiny_models.build(case.architecture)
        theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "both")).eval()
    torch.testing.assert_close(tiny_models.outputs(theirs, given), live, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_are_those_of_the_ranks_written_out(tmp_path: Path, dropout: float) -> None:
    """The fused path and, with dropout, the general one; what lies beneath gets no gradient."""
    case = Case("llama", {"targets": "all-linear"})
    first = _first(case, tmp_path / "first")
    model = _stacked(case, first, dropout=dropout)
    shake(model, seed=9)
    given = tiny_models.inputs(model)
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    update = layer.branch_of("top").updates()[0]
    before = bits(layer)
    model.train()
    torch.manual_seed(4)
    model(**given).logits.float().square().mean().backward()
    x = torch.randn(3, 32)
    torch.manual_seed(4)
    y = layer(x)
    torch.manual_seed(4)
    dropped = torch.nn.functional.dropout(x, dropout, training=dropout > 0)
    matrix = base_weight(layer.base).read()
    one = update.scaling * (dropped @ update.lora_A.T) @ update.lora_B.T
    two = update.under_scaling * (x @ update.under_A.T) @ update.under_B.T
    torch.testing.assert_close(y, x @ matrix.T + one + two, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(y.square().sum(), [update.lora_A, update.lora_B])
    written = torch.autograd.grad(
        (x @ matrix.T + one + two).square().sum(), [update.lora_A, update.lora_B]
    )
    for mine, theirs in zip(grads, written, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert update.lora_B.grad is not None
    assert update.under_A.grad is None
    assert bits(layer)["factors.@top.parts.0.under_B"].equal(before["factors.@top.parts.0.under_B"])


def test_detaching_gives_the_base_back(tmp_path: Path) -> None:
    case = Case("llama")
    model = _stacked(case, _first(case, tmp_path / "first"))
    detach(model, "top")
    given = tiny_models.inputs(model)
    plain = tiny_models.build("llama")
    assert tiny_models.outputs(model, given).equal(tiny_models.outputs(plain, given))


@pytest.mark.parametrize(
    ("beneath", "above", "match"),
    [
        ({"update": "dora"}, {}, "DoRA"),
        ({}, {"update": "dora"}, "DoRA"),
        ({"also_train": ("lm_head",)}, {}, "whole modules"),
        ({}, {"init": "pissa"}, "starts and ranks"),
        ({}, {"bias": "all"}, "beside"),
        ({"targets": "all-linear"}, {"targets": ("q_proj", "v_proj")}, "every site"),
    ],
)
def test_what_is_no_sum_of_ranks_is_refused(
    tmp_path: Path, beneath: dict[str, object], above: dict[str, object], match: str
) -> None:
    case = Case("llama", beneath)
    first = _first(case, tmp_path / "first")
    with pytest.raises(SpecError, match=match):
        _stacked(case, first, **above)
