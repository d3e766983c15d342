from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache

import tiny_models
from lorakit.adapters.attach import attach
from lorakit.adapters.spec import LoraSpec
from lorakit.errors import ConfigError, DataError, MergeError, SpecError, StateError, TargetError
from lorakit.layers.prefix import find_prefix, num_special_positions
from lorakit.methods.base import Method
from lorakit.methods.registry import build_method

NAMES = ("prefix_embedding", "prefix_layer")
each_method = pytest.mark.parametrize("name", NAMES)


def attached(architecture: str, name: str = "prefix_embedding", **options: Any) -> Any:
    model = tiny_models.build(architecture)
    build_method(name, {"prefix": 3, "infix": 2, **options}).attach(model)
    return model


@each_method
@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"prefix": 0, "infix": 0}, "no position to learn"),
        ({"prefix": -1}, "whole number"),
        ({"infix": 1.5}, "whole number"),
        ({"prefix": True}, "whole number"),
        ({"init": "zeros"}, "choices"),
        ({"also_train": "score"}, "list of names"),
        ({"prefixes": 3}, "unknown key"),
    ],
)
def test_options_that_cannot_be(name: str, options: dict[str, Any], what: str) -> None:
    with pytest.raises(SpecError, match=what) as caught:
        build_method(name, options)
    assert caught.value.exit_code == 2


def test_a_near_name_is_offered() -> None:
    with pytest.raises(ConfigError) as caught:
        build_method("prefix_layers", {})
    assert "prefix_layer" in str(caught.value)


@each_method
def test_a_prefix_longer_than_the_context_is_refused(name: str) -> None:
    model = tiny_models.build("gpt2")  # 64 positions
    with pytest.raises(SpecError, match="no room") as caught:
        build_method(name, {"prefix": 60, "infix": 4}).plan(model)
    assert caught.value.exit_code == 2
    assert build_method(name, {"prefix": 59, "infix": 4}).plan(model).extra_positions == 63
    roberta = tiny_models.build("roberta")  # 66 in its table, of which 65 are counted
    assert roberta.config.pad_token_id == 0
    with pytest.raises(SpecError, match="no room"):
        build_method(name, {"prefix": 65, "infix": 0}).plan(roberta)


@each_method
def test_a_row_that_does_not_fit_is_refused_when_it_comes(name: str) -> None:
    model = attached("gpt2", name)
    ids = torch.full((2, 60), 7)
    mask = torch.ones_like(ids)
    with pytest.raises(DataError, match="do not fit"):
        model(input_ids=ids)
    with pytest.raises(DataError, match="do not fit"):
        model(input_ids=ids, attention_mask=mask)
    mask[:, 59:] = 0  # padding takes no position
    assert model(input_ids=ids, attention_mask=mask).logits.shape[1] == 60


@each_method
@pytest.mark.parametrize("architecture", ["t5", "vit"])
def test_an_unknown_architecture_is_refused(name: str, architecture: str) -> None:
    model = tiny_models.build(architecture)
    with pytest.raises(TargetError):
        build_method(name, {}).plan(model)
    assert find_prefix(model) is None


def test_two_methods_on_one_model_are_refused() -> None:
    model = attached("llama")
    with pytest.raises(StateError, match="beside prefix_embedding"):
        build_method("prefix_layer", {}).attach(model)
    with_lora = tiny_models.build("llama")
    attach(with_lora, LoraSpec(r=2))
    with pytest.raises(StateError, match="LoRA"):
        build_method("prefix_embedding", {}).plan(with_lora)


def test_it_cannot_be_merged() -> None:
    model = tiny_models.build("llama")
    method: Method = build_method("prefix_layer", {})
    method.attach(model)
    with pytest.raises(MergeError, match="input of the model"):
        method.merge(model)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"cache_implementation": "static"}, "static cache"),
        ({"prefill_chunk_size": 2}, "in parts"),
        ({"prompt_lookup_num_tokens": 2}, "assisted"),
    ],
)
def test_ways_of_generating_that_are_refused(settings: dict[str, Any], what: str) -> None:
    model = attached("llama")
    with pytest.raises(StateError, match=what) as caught:
        model.generate(torch.full((1, 5), 7), max_new_tokens=2, **settings)
    assert caught.value.exit_code == 2


def test_caches_that_do_not_fit_are_refused() -> None:
    model = attached("llama")
    method_less = tiny_models.build("llama")
    ids = torch.full((1, 5), 7)
    foreign = DynamicCache(config=model.config)
    method_less(input_ids=ids, past_key_values=foreign)
    with pytest.raises(StateError, match="without the special positions"):
        model(input_ids=ids[:, :1], past_key_values=foreign)
    filled = model(input_ids=ids, use_cache=True).past_key_values
    with pytest.raises(StateError, match="counts a filled cache"):
        model.generate(torch.full((1, 6), 7), past_key_values=filled, max_new_tokens=2)


def test_a_cache_goes_on_by_hand() -> None:
    model = attached("gpt2", infix=0)
    ids = torch.randint(3, 100, (2, 7), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    whole = model(input_ids=ids, attention_mask=mask).logits
    first = model(input_ids=ids[:, :4], attention_mask=mask[:, :4], use_cache=True)
    then = model(
        input_ids=ids[:, 4:], attention_mask=mask, past_key_values=first.past_key_values
    ).logits
    torch.testing.assert_close(then, whole[:, 4:], rtol=1e-4, atol=1e-5)


def test_inputs_without_a_meaning_are_refused() -> None:
    model = attached("llama")
    ids = torch.full((2, 6), 7)
    packed = torch.tensor([[0, 1, 2, 0, 1, 2]] * 2)
    with pytest.raises(StateError, match="numbers the positions"):
        model(input_ids=ids, position_ids=packed)
    with pytest.raises(StateError, match="padding"):
        model(input_ids=ids, attention_mask=torch.ones(2, 1, 6, 6))
    with pytest.raises(StateError, match="value per token"):
        model(input_ids=ids, block_sequence_ids=torch.zeros(2, 6))


def test_special_positions_start_at_the_vocabulary_or_at_its_variance() -> None:
    model = attached("gemma3_text", prefix=40, infix=3)
    special = find_prefix(model)
    assert special is not None
    assert num_special_positions(model) == 43
    table = model.get_input_embeddings()(torch.arange(tiny_models.VOCAB)).detach()
    difference = special.values().detach()[:, None] - table[None]
    distance = difference.norm(dim=-1).min(dim=1)
    assert float(distance.values.max()) < 1e-4
    assert len(set(distance.indices.tolist())) == 43
    torch.manual_seed(1)
    normal = find_prefix(attached("gemma3_text", prefix=60, init="normal"))
    assert normal is not None
    values = normal.values().detach()
    assert float(values.std() / table.std()) == pytest.approx(1, abs=0.1)
    assert float(torch.cdist(values, table).min()) > 0.1


def test_the_same_seed_starts_at_the_same_values() -> None:
    found = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        special = find_prefix(attached("llama", "prefix_layer"))
        assert special is not None
        found.append(special.values(1).detach())
    assert found[0].equal(found[1])
    assert not found[0].equal(found[2])
