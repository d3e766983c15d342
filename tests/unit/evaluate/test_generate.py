from __future__ import annotations

import logging
import random
import warnings

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
)

import tiny_models
from lorakit.adapters.attach import attach, use
from lorakit.adapters.spec import LoraSpec
from lorakit.data.endings import end_of_sequence_ids
from lorakit.errors import DataError, LorakitWarning, ModelError
from lorakit.evaluate.generate import check_prompts, generate_answers

VOCAB = 47


def some_prompts(num: int, longest: int = 12) -> list[list[int]]:
    rng = random.Random(5)
    return [[rng.randrange(4, VOCAB) for _ in range(rng.randint(1, longest))] for _ in range(num)]


def by_hand(model, prompt: list[int], limit: int, eos: set[int]) -> list[int]:
    """Greedy decoding one prompt at a time, the whole sequence anew at each step."""
    model.eval()
    ids, written = list(prompt), []
    with torch.no_grad():
        for _ in range(limit):
            if model.config.is_encoder_decoder:
                start = [model.config.decoder_start_token_id]
                logits = model(
                    input_ids=torch.tensor([ids]),
                    decoder_input_ids=torch.tensor([start + written]),
                ).logits
            else:
                logits = model(input_ids=torch.tensor([ids + written])).logits
            written.append(int(logits[0, -1].argmax()))
            if written[-1] in eos:
                break
    return written


def gpt2():
    config = GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    config.eos_token_id, config.bos_token_id, config.initializer_range = 2, 1, 0.4
    return GPT2LMHeadModel(config)


def opt():
    return tiny_models.opt(VOCAB, init_std=0.4)


def t5():
    return tiny_models.t5(VOCAB, eos_token_id=2, initializer_factor=4.0)


def bart():
    return tiny_models.bart(VOCAB, forced_eos_token_id=None, init_std=0.4)


@pytest.mark.parametrize("make", [None, gpt2, opt, t5, bart])
def test_batched_answers_are_those_of_one_prompt_at_a_time(make, make_llama, tokenizer) -> None:
    torch.manual_seed(1)
    model = (make or make_llama)().eval()
    prompts = some_prompts(11)
    answers = generate_answers(model, tokenizer, prompts, max_new_tokens=9, batch_size=4)
    eos = {2}
    seen = set()
    for prompt, answer in zip(prompts, answers, strict=True):
        written = by_hand(model, prompt, 9, eos)
        assert answer.text == tokenizer.decode(written, skip_special_tokens=True).strip()
        assert answer.num_tokens == len(written)
        assert answer.finished == (written[-1] in eos)
        seen.add(answer.text)
    assert len(seen) > 3, "the answers must depend on the prompts for this test to mean anything"


def test_a_start_that_prompts_share_changes_no_answer(make_llama, tokenizer) -> None:
    model = make_llama()
    prompts = [[*range(5, 21), *prompt] for prompt in some_prompts(9)]
    answers = generate_answers(model, tokenizer, prompts, max_new_tokens=9, batch_size=4)
    alone = [generate_answers(model, tokenizer, [p], max_new_tokens=9)[0] for p in prompts]
    assert answers == alone
    assert len({answer.text for answer in answers}) > 3


def test_an_answer_stops_at_any_end_token(make_llama, tokenizer) -> None:
    model = make_llama()
    prompts = some_prompts(8)
    free = [by_hand(model, prompt, 12, {2}) for prompt in prompts]
    stop = free[0][3]
    model.generation_config.eos_token_id = [2, stop]
    assert end_of_sequence_ids(model, tokenizer) == (2, stop)
    answers = generate_answers(model, tokenizer, prompts, max_new_tokens=12)
    assert answers[0].finished
    assert answers[0].num_tokens == free[0].index(stop) + 1
    for answer, written in zip(answers, free, strict=True):
        end = next((i for i, t in enumerate(written) if t in (2, stop)), len(written) - 1)
        assert answer.num_tokens == end + 1
    assert len({answer.num_tokens for answer in answers}) > 1


def test_the_end_marker_of_the_chat_template_ends_an_answer(make_llama, tokenizer) -> None:
    model = make_llama()
    prompt = some_prompts(1)[0]
    written = by_hand(model, prompt, 12, {2})
    marker = tokenizer.convert_ids_to_tokens(written[2])
    tokenizer.add_special_tokens({"additional_special_tokens": [marker]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }} {{ m.content }} " + marker + " {% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    answer = generate_answers(model, tokenizer, [prompt], max_new_tokens=12)[0]
    assert answer.finished
    assert answer.num_tokens == written.index(written[2]) + 1
    assert marker not in answer.text.split()


def test_the_models_sampling_settings_are_set_aside_and_kept(make_llama, tokenizer, caplog) -> None:
    model = make_llama()
    prompts = some_prompts(5)
    plain = generate_answers(model, tokenizer, prompts, max_new_tokens=8)
    own = GenerationConfig(
        do_sample=True, temperature=9.0, top_k=3, repetition_penalty=5.0, eos_token_id=2
    )
    model.generation_config = own
    model.train()
    with caplog.at_level(logging.WARNING, logger="transformers"):
        sampled = generate_answers(model, tokenizer, prompts, max_new_tokens=8)
    assert sampled == plain
    assert caplog.records == []
    assert model.generation_config is own
    assert own.temperature == 9.0
    assert model.training


def test_nothing_but_progress_on_stderr(make_llama, tokenizer, capfd) -> None:
    tokenizer.pad_token = None
    logging.getLogger("transformers").propagate = False
    generate_answers(make_llama(), tokenizer, some_prompts(3), max_new_tokens=3, label="asking")
    captured = capfd.readouterr()
    assert captured.out == ""
    assert [line.split(":")[0] for line in captured.err.strip().splitlines()] == ["asking"]


def test_the_active_adapter_answers(make_llama, tokenizer) -> None:
    model = make_llama()
    prompts = some_prompts(6)
    base = generate_answers(model, tokenizer, prompts, max_new_tokens=6)
    attach(model, LoraSpec(r=3, alpha=12.0, targets="all-linear"), name="a")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.3)
                assert "weight" not in name or "base" not in name
    with use(model, "a"):
        adapted = generate_answers(model, tokenizer, prompts, max_new_tokens=6)
    with use(model, None):
        again = generate_answers(model, tokenizer, prompts, max_new_tokens=6)
    assert again == base
    assert adapted != base


def test_a_prompt_must_fit(make_llama, tokenizer) -> None:
    model = make_llama(max_position_embeddings=16)
    with pytest.raises(DataError, match="context") as caught:
        check_prompts(model, [[5], [7] * 16], ["a line 1", "a line 2"])
    assert caught.value.where == "a line 2"
    with pytest.raises(DataError, match="context") as caught:
        generate_answers(model, tokenizer, [[5], [7] * 16])
    assert caught.value.where == "prompt 1"
    with pytest.raises(DataError, match="no tokens") as caught:
        generate_answers(model, tokenizer, [[5], []])
    assert caught.value.where == "prompt 1"


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_answer_is_cut_where_the_context_ends_and_that_is_said(
    kind, make_llama, tokenizer
) -> None:
    model = make_llama() if kind == "llama" else gpt2().eval()
    prompt = [7] * 61
    with pytest.warns(LorakitWarning, match="1 of 2 prompts leave less than 10"):
        answers = generate_answers(model, tokenizer, [[5], prompt], max_new_tokens=10, batch_size=1)
    assert answers[1].num_tokens <= 3
    assert answers[0].num_tokens == len(by_hand(model, [5], 10, {2}))


def test_nothing_to_answer(make_llama, tokenizer) -> None:
    assert generate_answers(make_llama(), tokenizer, []) == []


def test_a_classifier_cannot_answer(tokenizer) -> None:
    model = BertForSequenceClassification(
        BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=VOCAB)
    )
    with pytest.raises(ModelError, match="cannot write answers"):
        generate_answers(model, tokenizer, [[5]])


def test_no_python_warnings(make_llama, tokenizer) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate_answers(make_llama(), tokenizer, some_prompts(4), max_new_tokens=4)


def test_the_head_never_sees_a_strided_view(tokenizer):
    model = gpt2()
    seen: list[bool] = []
    # A forward hook sees what the module got, after whatever its pre-hooks made of it.
    model.lm_head.register_forward_hook(lambda _, args, __: seen.append(args[0].is_contiguous()))
    generate_answers(model, tokenizer, some_prompts(5), max_new_tokens=3, batch_size=4)
    assert seen
    assert all(seen)
    assert not model.lm_head._forward_pre_hooks
