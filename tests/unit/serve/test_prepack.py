from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import tiny_models
from lorakit.adapters.spec import LoraSpec
from lorakit.serve import prepack
from lorakit.serve.prepack import Prepacked
from serving import ask, assert_same, prompts, running, save_learned


def layers(dtype: torch.dtype) -> nn.ModuleList:
    torch.manual_seed(3)
    large = nn.Linear(512, 1100), nn.Linear(1024, 520, bias=False)
    return nn.ModuleList([*large, nn.Linear(512, 16), nn.Embedding(1100, 512)]).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_copies_compute_what_the_weights_do_and_are_given_back(dtype: torch.dtype) -> None:
    model = layers(dtype)
    first, second, small, _ = model
    packed = Prepacked(model)
    assert packed.num_bytes in (0, sum(m.weight.nbytes for m in (first, second)))
    if dtype == torch.float32:
        assert packed.num_bytes > 0
    assert "forward" not in vars(small)
    with torch.inference_mode():
        for rows in (1, 5, 40):
            for layer in (first, second):
                x = torch.randn(1, rows, layer.in_features).to(dtype)
                expected = nn.functional.linear(x, layer.weight, layer.bias)
                torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
                # Entries may be cut out of a wider tensor.
                wide = torch.randn(rows, 2 * layer.in_features).to(dtype)[:, ::2]
                expected = nn.functional.linear(wide, layer.weight, layer.bias)
                torch.testing.assert_close(layer(wide), expected, rtol=1e-4, atol=1e-4)
    x = torch.randn(5, 512, dtype=dtype, requires_grad=True)
    first(x).sum().backward()
    assert x.grad is not None
    packed.undo()
    assert not any("forward" in vars(layer) for layer in model)


def test_weights_stay_as_they_are_where_memory_is_short(monkeypatch, caplog) -> None:
    monkeypatch.setattr(prepack, "available_memory_bytes", lambda: 5_000_000)
    model = layers(torch.float32)
    assert Prepacked(model).num_bytes == 0
    assert "memory is short" in caplog.text
    assert not any("forward" in vars(layer) for layer in model)


def test_a_processor_that_cannot_or_computes_something_else_is_left_alone(
    monkeypatch, caplog
) -> None:
    model, copy = layers(torch.float32), prepack._copy

    def cannot(_: nn.Linear) -> torch.Tensor:
        raise NotImplementedError("no such layout here")

    def another(layer: nn.Linear) -> torch.Tensor:
        return copy(nn.Linear(layer.in_features, layer.out_features))

    for made, said in ((cannot, "no such layout here"), (another, "products are others")):
        monkeypatch.setattr(prepack, "_copy", made)
        assert Prepacked(model).num_bytes == 0
        assert said in caplog.text
        assert not any("forward" in vars(layer) for layer in model)


def test_rows_run_as_if_alone_and_as_the_base_computes_them(monkeypatch, tmp_path: Path) -> None:
    model = tiny_models.build("llama")
    save_learned(model, LoraSpec(r=5, alpha=3.0, targets="all-linear"), tmp_path / "a0", seed=1)
    save_learned(model, LoraSpec(r=3, alpha=7.5, targets="qv", update="dora"), tmp_path / "a1")
    given = prompts([9, 3, 21, 6, 14])
    names = ["a0", None, "a1", "a0", None]
    options = {"max_tokens": 6, "logprobs": 2, "ignore_eos": True}

    def answers(**more: object) -> list:
        with running(model, adapters_dir=tmp_path, prefill_chunk=5, **more) as engine:
            alone = [ask(engine, p, n, **options).wait() for p, n in zip(given, names, strict=True)]
            both = [ask(engine, p, n, **options) for p, n in zip(given, names, strict=True)]
            together = [reply.wait() for reply in both]
            packed = [m for m in model.modules() if "forward" in vars(m)]
        assert not any("forward" in vars(m) for m in model.modules())
        for one, other in zip(alone, together, strict=True):
            assert_same(one, other)
        return [together, len(packed)]

    plain, none = answers(prepack=False)
    monkeypatch.setattr(prepack, "_LEAST_NUMBERS", 0)
    copied, many = answers()
    assert (none, many > 10) == (0, True)
    for one, other in zip(plain, copied, strict=True):
        assert_same(one, other)
