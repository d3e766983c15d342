from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from lorakit.adapters.attach import attach, use
from lorakit.adapters.spec import LoraSpec
from lorakit.errors import DataError
from lorakit.evaluate.likelihood import answer_nll, best_choices, perplexity, perplexity_of


@dataclass
class Example:
    input_ids: list[int]
    labels: list[int]


def some_examples(num: int) -> list[Example]:
    generator = np.random.default_rng(2)
    examples = []
    for _ in range(num):
        ids = generator.integers(4, 47, size=generator.integers(3, 20)).tolist()
        cut = int(generator.integers(1, len(ids)))
        examples.append(Example(ids, [-100] * cut + ids[cut:]))
    return examples


def by_hand(model, example: Example) -> tuple[float, int]:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([example.input_ids])).logits[0].double()
    log_probs = logits.log_softmax(-1)
    total, num = 0.0, 0
    for place, token in enumerate(example.labels):
        if token != -100 and place > 0:
            total -= log_probs[place - 1, token].item()
            num += 1
    return total, num


def test_nll_of_each_example_in_its_place(make_llama) -> None:
    model, examples = make_llama(), some_examples(10)
    found = answer_nll(model, examples, batch_size=3)
    expected = np.array([by_hand(model, example) for example in examples])
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    whole = np.exp(expected[:, 0].sum() / expected[:, 1].sum())
    assert perplexity(model, examples, batch_size=4) == pytest.approx(whole, rel=1e-5)
    assert float(perplexity_of(found.sum(axis=0))) == pytest.approx(whole, rel=1e-5)
    mean_of_perplexities = np.exp(expected[:, 0] / expected[:, 1]).mean()
    assert abs(mean_of_perplexities - whole) > 0.1, "weighted by tokens, not by examples"


def test_dropout_is_off_and_the_mode_comes_back(make_llama) -> None:
    model, examples = make_llama(attention_dropout=0.9), some_examples(4)
    still = answer_nll(model, examples)
    model.train()
    np.testing.assert_array_equal(answer_nll(model, examples), still)
    assert model.training


def test_sequence_to_sequence_labels_are_not_shifted() -> None:
    torch.manual_seed(0)
    config = T5Config(vocab_size=47, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    config.decoder_start_token_id = 0
    model = T5ForConditionalGeneration(config).eval()
    examples = [Example([5, 6, 7, 8, 1], [9, 10, 1]), Example([5, 6], [11, 1])]
    found = answer_nll(model, examples)
    for row, example in zip(found, examples, strict=True):
        own = model(
            input_ids=torch.tensor([example.input_ids]), labels=torch.tensor([example.labels])
        ).loss.item()
        assert row[1] == len(example.labels)
        assert row[0] / row[1] == pytest.approx(own, rel=1e-5)


def test_the_active_adapter_counts(make_llama) -> None:
    model, examples = make_llama(), some_examples(5)
    before = answer_nll(model, examples)
    attach(model, LoraSpec(r=2, alpha=6.0), name="a")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.5)
    with use(model, None):
        np.testing.assert_allclose(answer_nll(model, examples), before, rtol=1e-6)
    with use(model, "a"):
        assert not np.allclose(answer_nll(model, examples)[:, 0], before[:, 0], rtol=1e-3)


def test_an_example_without_labels_is_named(make_llama) -> None:
    good, empty = Example([5, 6], [-100, 6]), Example([5, 6], [5, -100])
    with pytest.raises(DataError, match="no label") as caught:
        answer_nll(make_llama(), [good, empty], origins=["line 1", "line 2"])
    assert caught.value.where == "line 2"
    with pytest.raises(DataError, match="no examples"):
        perplexity(make_llama(), [])
    assert answer_nll(make_llama(), []).shape == (0, 2)


def test_best_choices() -> None:
    statistics = np.array([[2.0, 1], [3.0, 3], [5.0, 1], [4.0, 4], [4.0, 2], [1.0, 1], [1.0, 1]])
    assert best_choices(statistics, [2, 3, 2], per_token=False) == [0, 1, 0]
    assert best_choices(statistics, [2, 3, 2], per_token=True) == [1, 1, 0]
