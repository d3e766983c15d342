"""The fingerprint is the base's own: the same in every dtype, another for every other base."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

import tiny_models
from learned import attach_learned
from lorakit.adapters.fingerprint import Fingerprint, fingerprint
from lorakit.adapters.fold import merge
from lorakit.adapters.spec import LoraSpec
from lorakit.errors import LorakitError

_DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("stored", _DTYPES)
@pytest.mark.parametrize("loaded", _DTYPES)
def test_it_holds_across_load_dtypes(
    stored: torch.dtype, loaded: torch.dtype, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    tiny_models.build("llama").to(stored).save_pretrained(tmp_path)
    one = fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=stored))
    two = fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=loaded))
    assert one.difference(two) is None
    assert two.difference(one) is None


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "vit"])
def test_another_seed_or_one_changed_layer_is_another_base(name: str) -> None:
    model = tiny_models.build(name)
    own = fingerprint(model)
    assert own.difference(fingerprint(tiny_models.build(name))) is None
    assert own.sha256 == fingerprint(tiny_models.build(name)).sha256
    other = fingerprint(tiny_models.build(name, seed=1))
    assert own.difference(other)
    assert own.sha256 != other.sha256
    for parameter_name, parameter in list(model.named_parameters())[1::5]:
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter += 0.01 * torch.randn_like(parameter) + 0.01
        assert own.difference(fingerprint(model)), parameter_name
        with torch.no_grad():
            parameter.copy_(kept)
    assert own.difference(fingerprint(model)) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_changed_half_precision_base_is_another(dtype: torch.dtype) -> None:
    model = tiny_models.build("llama")
    own = fingerprint(model)
    other = tiny_models.build("llama", seed=1).to(dtype)
    assert own.difference(fingerprint(other))
    one_layer = tiny_models.build("llama")
    with torch.no_grad():
        one_layer.model.layers[1].mlp.up_proj.weight.mul_(1.05)
    assert own.difference(fingerprint(one_layer.to(dtype)))


def test_other_names_shapes_and_layers_are_another_base() -> None:
    own = fingerprint(tiny_models.build("llama"))
    assert own.difference(fingerprint(tiny_models.build("qwen3")))
    assert own.difference(fingerprint(tiny_models.build("mistral", seed=3)))


def test_adapters_do_not_change_it_and_a_merge_is_not_taken_for_the_base() -> None:
    model = tiny_models.build("llama")
    own = fingerprint(model)
    attach_learned(model, LoraSpec(targets="all-linear", bias="all", also_train=("lm_head",)))
    again = fingerprint(model)
    assert again.sha256 == own.sha256
    assert again.difference(own) is None
    merge(model)
    try:
        merged = fingerprint(model)
    except LorakitError:
        return
    assert merged.difference(own)


def test_heads_trained_beside_are_left_out() -> None:
    one = tiny_models.build("llama")
    two = tiny_models.build("llama")
    with torch.no_grad():
        two.lm_head.weight.normal_()
    assert fingerprint(one).difference(fingerprint(two))
    out = ("lm_head",)
    assert fingerprint(one, left_out=out).difference(fingerprint(two, left_out=out)) is None


def test_json_keeps_it() -> None:
    import json

    own = fingerprint(tiny_models.build("gpt2"))
    again = Fingerprint.from_json(json.loads(json.dumps(own.to_json())))
    assert again == own
    assert own.difference(again) is None


def test_it_takes_less_than_a_second_per_gigabyte() -> None:
    layers = torch.nn.Sequential(*[torch.nn.Linear(2048, 2048, bias=False) for _ in range(16)])
    gigabytes = sum(p.numel() * p.element_size() for p in layers.parameters()) / 1e9
    started = time.process_time()
    fingerprint(layers)
    assert (time.process_time() - started) / gigabytes < 1.0
