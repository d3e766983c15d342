"""Sampled answers: what is drawn, what is the most likely, when they end, beside others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

import lorakit as lk
import tiny_models
from lorakit.errors import ModelError
from lorakit.models.attention import GROUPED, use_attention
from lorakit.models.sampling import Sampling, require_sampling, write_answers

PROMPTS = [[5, 9, 17, 33, 2, 8, 9, 4], [7, 21, 40], [5, 9, 17, 60, 61]]
GREEDY = Sampling(max_new_tokens=7, end_ids=(), pad_id=0)


def sharp(model: PreTrainedModel) -> PreTrainedModel:
    """With an adapter, and far from a uniform distribution."""
    lk.attach(model, lk.LoraSpec(r=3, alpha=9.0, targets="all-linear"))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lm_head" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_greedy_answers_are_those_of_transformers(
    tiny: Callable[..., PreTrainedModel], name: str
) -> None:
    model = sharp(tiny(name))
    found = write_answers(model, PROMPTS, GREEDY)
    for prompt, (answer,) in zip(PROMPTS, found, strict=True):
        settings = GenerationConfig(
            do_sample=False, max_new_tokens=7, pad_token_id=0, eos_token_id=None
        )
        own = model.generate(torch.tensor([prompt]), generation_config=settings)
        assert answer.ids == own[0, len(prompt) :].tolist()
        assert not answer.finished


def test_log_probabilities_are_those_of_one_row_alone(
    tiny: Callable[..., PreTrainedModel],
) -> None:
    model = sharp(tiny("llama"))
    use_attention(model, GROUPED)
    model.train()
    sampling = Sampling(
        max_new_tokens=9, end_ids=(3, 50, 51, 52), pad_id=0, num_samples=4, temperature=1.7
    )
    found = write_answers(model, PROMPTS, sampling, generator=torch.Generator().manual_seed(1))
    assert model.training
    lengths = {len(answer.ids) for answers in found for answer in answers}
    assert len(lengths) > 1
    for prompt, answers in zip(PROMPTS, found, strict=True):
        for answer in answers:
            ids = torch.tensor([prompt + answer.ids])
            with torch.no_grad():
                logits = model.eval()(input_ids=ids).logits[0, len(prompt) - 1 : -1]
            expected = (logits / 1.7).log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]
            torch.testing.assert_close(torch.tensor(answer.logps), expected, atol=1e-4, rtol=1e-4)
            assert answer.finished == (answer.ids[-1] in sampling.end_ids)
            assert not set(answer.ids[:-1]) & set(sampling.end_ids)


def test_samples_follow_the_distribution(tiny: Callable[..., PreTrainedModel]) -> None:
    model = sharp(tiny("llama"))
    one = Sampling(max_new_tokens=1, end_ids=(), pad_id=0, num_samples=2000, temperature=2.0)
    found = write_answers(model, PROMPTS[:1], one, generator=torch.Generator().manual_seed(5))
    drawn = torch.bincount(torch.tensor([a.ids[0] for a in found[0]]), minlength=tiny_models.VOCAB)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(PROMPTS[:1])).logits[0, -1]
    wanted = (logits / 2.0).softmax(-1)
    # The largest of 128 differences in units of its standard deviation.
    spread = (wanted * (1 - wanted) / 2000).sqrt().clamp(min=1e-3)
    assert float(((drawn / 2000 - wanted) / spread).abs().max()) < 4.5


def test_a_seed_decides_the_samples_and_greedy_draws_nothing(
    tiny: Callable[..., PreTrainedModel],
) -> None:
    model = tiny("llama")
    sampling = Sampling(max_new_tokens=5, end_ids=(4,), pad_id=0, num_samples=3, temperature=1.0)

    def sampled(seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        found = write_answers(model, PROMPTS, sampling, generator=generator)
        return [answer.ids for answers in found for answer in answers]

    assert sampled(1) == sampled(1) != sampled(2)
    before = torch.get_rng_state()
    write_answers(model, PROMPTS, GREEDY)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", ["t5", "bloom"])
def test_other_architectures_are_refused(tiny: Callable[..., PreTrainedModel], name: str) -> None:
    with pytest.raises(ModelError, match="cannot be sampled"):
        require_sampling(tiny(name))
    require_sampling(tiny("llama"))
