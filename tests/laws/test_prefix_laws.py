"""Special positions that hold what real tokens hold give what those tokens give, literally."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2Model,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

import tiny_models
from lorakit.layers.prefix import find_prefix
from lorakit.methods.prefix import PrefixMethod
from lorakit.methods.prefix_spec import PrefixEmbeddingSpec, PrefixLayerSpec
from lorakit.models.blocks import transformer_blocks
from lorakit.models.label_head import LabelHead

DECODERS = (
    *("llama", "mistral-sliding", "qwen2", "qwen3", "gemma3_text", "phi3", "gpt2", "opt", "bloom"),
    *("falcon", "falcon-grouped", "falcon-multi-head", "gpt_neox"),
)
ENCODERS = ("bert", "roberta", "deberta-v2", "deberta-conv")
# Their windows end before the prefix for tokens far behind it: not every number can matter.
SLIDING = ("mistral-sliding", "gemma3_text")
# Numbers of prefix and infix positions.
SIZES = ((3, 2), (4, 0), (0, 2))
# Token ids of the rows, and how long each row's prompt is.
LENGTHS, PROMPTS = (12, 5, 8), (7, 4, 8)
LOOSE = {"rtol": 1e-4, "atol": 2e-5}

each_decoder = pytest.mark.parametrize("name", DECODERS)
each_size = pytest.mark.parametrize("size", SIZES, ids=str)
each_side = pytest.mark.parametrize("side", ["left", "right"])


def build(name: str) -> PreTrainedModel:
    torch.manual_seed(3)
    if name == "mistral-sliding":
        config = MistralConfig(**tiny_models._GQA, sliding_window=6)
        return MistralForCausalLM(config).eval()
    if name == "deberta-conv":
        config = tiny_models.build("deberta-v2").config
        config = DebertaV2Config(**{**config.to_dict(), "conv_kernel_size": 3})
        return DebertaV2Model(config).eval()
    return tiny_models.build(name, seed=3)


def tokens(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, tiny_models.VOCAB, (count,), generator=generator).tolist()


ROWS = [tokens(length, seed) for seed, length in enumerate(LENGTHS)]


def batch(side: str, rows: list[list[int]] = ROWS) -> dict[str, Tensor]:
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        at = width - len(row) if side == "left" else 0
        ids[index, at : at + len(row)] = torch.tensor(row)
        mask[index, at : at + len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def labels_of(given: dict[str, Tensor], prompts: tuple[int, ...] = PROMPTS) -> Tensor:
    """Everything behind the prompt is learned."""
    behind = given["attention_mask"].cumsum(1) > torch.tensor(prompts)[:, None]
    return given["input_ids"].masked_fill(~(behind & (given["attention_mask"] == 1)), -100)


def hidden_or_logits(model: PreTrainedModel, given: dict[str, Any]) -> Tensor:
    result = model(**given)
    return result.logits if "logits" in result else result.last_hidden_state


def embedded(model: PreTrainedModel, size: tuple[int, int]) -> tuple[list[int], list[int]]:
    """Attach a prefix-embedding that holds real tokens' embeddings; the tokens."""
    prefix, infix = tokens(size[0], 91), tokens(size[1], 92)
    PrefixMethod(PrefixEmbeddingSpec(prefix=size[0], infix=size[1])).attach(model)
    special = find_prefix(model)
    assert special is not None
    with torch.no_grad():
        special.fill(model.get_input_embeddings()(torch.tensor(prefix + infix)))
    return prefix, infix


@each_decoder
@each_size
@each_side
def test_a_decoder_sees_the_embedded_tokens(name: str, size: tuple[int, int], side: str) -> None:
    base, model = build(name), build(name)
    prefix, infix = embedded(model, size)
    given = batch(side)
    with torch.no_grad():
        # The labels tell where each prompt ends; row 2 has none, so its infix is at its end.
        found = model(**given, labels=labels_of(given)).logits
    assert found.shape[:2] == given["input_ids"].shape
    for index, (row, prompt) in enumerate(zip(ROWS, PROMPTS, strict=True)):
        literal = [*prefix, *row[:prompt], *infix, *row[prompt:]]
        with torch.no_grad():
            wanted = base(input_ids=torch.tensor([literal])).logits[0]
        columns = [len(prefix) + j + len(infix) * (j >= prompt) for j in range(len(row))]
        columns[prompt - 1] += len(infix)
        mine = found[index, given["attention_mask"][index] == 1]
        torch.testing.assert_close(mine, wanted[columns], **LOOSE)


@pytest.mark.parametrize("name", ENCODERS)
@each_size
@each_side
def test_an_encoder_sees_the_embedded_tokens(name: str, size: tuple[int, int], side: str) -> None:
    base, model = build(name), build(name)
    prefix, infix = embedded(model, size)
    given = batch(side)
    types = (
        {}
        if name.startswith("roberta")
        else {"token_type_ids": torch.zeros_like(given["input_ids"])}
    )
    with torch.no_grad():
        result = model(**given, **types)
    for index, row in enumerate(ROWS):
        literal = torch.tensor([[row[0], *prefix, *row[1:], *infix]])
        with torch.no_grad():
            wanted = base(input_ids=literal)
        columns = [0, *range(1 + len(prefix), len(prefix) + len(row))]
        mine = result.last_hidden_state[index, given["attention_mask"][index] == 1]
        torch.testing.assert_close(mine, wanted.last_hidden_state[0, columns], **LOOSE)
        if "pooler_output" in result and side == "right":
            torch.testing.assert_close(
                result.pooler_output[index], wanted.pooler_output[0], **LOOSE
            )


def block_inputs(model: PreTrainedModel, ids: list[int], columns: list[int]) -> Tensor:
    """The input of every block at some columns of a literal run, (L, columns, d)."""
    seen: list[Tensor] = []

    def watch(_block: object, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"])[0, columns])

    handles = [
        block.module.register_forward_pre_hook(watch, with_kwargs=True)
        for block in transformer_blocks(model)
    ]
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return torch.stack(seen)


def layered(model: PreTrainedModel, size: tuple[int, int], values: Tensor) -> None:
    PrefixMethod(PrefixLayerSpec(prefix=size[0], infix=size[1])).attach(model)
    special = find_prefix(model)
    assert special is not None
    special.fill(values)


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
@each_size
def test_activations_of_a_real_run_give_that_run(name: str, size: tuple[int, int]) -> None:
    base, model = build(name), build(name)
    prefix, infix = tokens(size[0], 91), tokens(size[1], 92)
    row = ROWS[0]
    first, prompt = (1, len(row)) if name in ENCODERS else (0, PROMPTS[0])
    literal = [*row[:first], *prefix, *row[first:prompt], *infix, *row[prompt:]]
    special = [first + j for j in range(len(prefix))]
    special += [len(prefix) + prompt + j for j in range(len(infix))]
    layered(model, size, block_inputs(base, literal, special))
    given = batch("left", [row])
    extra = {} if name in ENCODERS else {"labels": labels_of(given, PROMPTS[:1])}
    with torch.no_grad():
        found = hidden_or_logits(model, {**given, **extra})[0]
        wanted = hidden_or_logits(base, {"input_ids": torch.tensor([literal])})[0]
    columns = [j + len(prefix) * (j >= first) + len(infix) * (j >= prompt) for j in range(len(row))]
    if name in DECODERS:
        columns[prompt - 1] += len(infix)
    torch.testing.assert_close(found, wanted[columns], **LOOSE)


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
@each_side
def test_a_row_of_a_batch_is_its_run_alone(name: str, side: str) -> None:
    model = build(name)
    PrefixMethod(PrefixLayerSpec(prefix=3, infix=2)).attach(model)
    given = batch(side)
    with torch.no_grad():
        together = hidden_or_logits(model, given)
        for index, row in enumerate(ROWS):
            alone = hidden_or_logits(model, {"input_ids": torch.tensor([row])})[0]
            mine = together[index, given["attention_mask"][index] == 1]
            torch.testing.assert_close(mine, alone, **LOOSE)


def written(model: PreTrainedModel, given: dict[str, Tensor], **settings: Any) -> Any:
    return model.generate(
        **given,
        **{"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
        | settings,
        return_dict_in_generate=True,
        output_logits=True,
    )


METHODS: dict[str, Callable[[int, int], PrefixMethod]] = {
    "embedding": lambda p, i: PrefixMethod(PrefixEmbeddingSpec(prefix=p, infix=i)),
    "layer": lambda p, i: PrefixMethod(PrefixLayerSpec(prefix=p, infix=i)),
}


@each_decoder
@pytest.mark.parametrize("method", METHODS)
def test_generation_is_the_same_with_and_without_a_cache(name: str, method: str) -> None:
    model = build(name)
    METHODS[method](3, 2).attach(model)
    given = batch("left")
    cached = written(model, given)
    plain = written(model, given, use_cache=False)
    assert cached.sequences.equal(plain.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits), **LOOSE)
    # Nothing that only one prompt needs leaks into another's row.
    for index, row in enumerate(ROWS):
        alone = written(model, {"input_ids": torch.tensor([row])})
        assert alone.sequences[0, len(row) :].equal(cached.sequences[index, -9:])


@pytest.mark.parametrize("name", ["llama", "mistral-sliding", "gpt2", "opt", "bloom"])
def test_generation_is_that_of_the_literal_tokens(name: str) -> None:
    base, model = build(name), build(name)
    prefix, infix = embedded(model, (3, 2))
    found = written(model, batch("left")).sequences[:, -9:]
    for index, row in enumerate(ROWS):
        literal = torch.tensor([[*prefix, *row, *infix]])
        assert written(base, {"input_ids": literal}).sequences[0, -9:].equal(found[index])


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
@pytest.mark.parametrize("method", METHODS)
def test_beam_search_is_the_same_with_and_without_a_cache(name: str, method: str) -> None:
    model = build(name)
    METHODS[method](3, 2).attach(model)
    given = batch("left")
    found = written(model, given, num_beams=3)
    plain = written(model, given, num_beams=3, use_cache=False)
    assert found.sequences.equal(plain.sequences)
    assert not found.sequences.equal(written(model, given).sequences)


@each_decoder
@pytest.mark.parametrize("method", METHODS)
def test_the_gradient_reaches_every_learned_number_and_nothing_else(name: str, method: str) -> None:
    model = build(name)
    made = METHODS[method](3, 2)
    made.attach(model)
    given = batch("right")
    LabelHead(model).loss({**given, "labels": labels_of(given)}).backward()
    learned = made.state(model)
    assert {id(p) for p in model.parameters() if p.grad is not None} == {
        id(p) for p in learned.values()
    }
    for name_of, parameter in learned.items():
        reached = parameter.grad.abs().sum(-1) > 0
        if name not in SLIDING:
            assert bool(reached.all()), name_of


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("method", METHODS)
def test_the_loss_at_the_labels_alone_is_the_models_own(name: str, method: str) -> None:
    model = build(name)
    METHODS[method](3, 2).attach(model)
    given = batch("right")
    labels = labels_of(given)
    head = LabelHead(model)
    short = head.loss({**given, "labels": labels})
    assert not head.full_forward
    torch.testing.assert_close(short, model(**given, labels=labels).loss, **LOOSE)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
def test_gradient_checkpointing_gives_the_same_gradient(name: str, method: str) -> None:
    model = build(name)
    made = METHODS[method](3, 2)
    made.attach(model)
    given = {**batch("right")}
    given["labels"] = labels_of(given)
    gradients = []
    for checkpointing in (False, True):
        model.zero_grad()
        model.train()
        if name == "gpt2":
            model.eval()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
        model(**given, use_cache=False).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in made.state(model).items()})
    for name_of, wanted in gradients[0].items():
        torch.testing.assert_close(gradients[1][name_of], wanted, **LOOSE)


def test_classifiers_read_the_right_position() -> None:
    for cls, name in (
        (LlamaForSequenceClassification, "llama"),
        (BertForSequenceClassification, "bert"),
    ):
        torch.manual_seed(5)
        config = build(name).config
        config.num_labels = 3
        base = cls(config).eval()
        model = copy.deepcopy(base)
        prefix, infix = embedded(model, (3, 2))
        with torch.no_grad():
            found = model(**batch("right"), labels=torch.tensor([0, 2, 1])).logits
            for index, row in enumerate(ROWS):
                literal = [*prefix, *row, *infix]
                if name == "bert":
                    literal = [row[0], *prefix, *row[1:], *infix]
                wanted = base(input_ids=torch.tensor([literal])).logits[0]
                torch.testing.assert_close(found[index], wanted, **LOOSE)


def test_hidden_states_have_the_callers_shape() -> None:
    model = build("llama")
    METHODS["layer"](3, 2).attach(model)
    given = batch("left")
    for as_dict in (True, False):
        result = model(**given, output_hidden_states=True, return_dict=as_dict)
        states = result.hidden_states if as_dict else result[-1]
        assert {tuple(s.shape) for s in states} == {(3, 12, tiny_models.HIDDEN)}


def test_a_copied_model_has_special_positions_of_its_own() -> None:
    model = build("llama")
    made = METHODS["layer"](3, 2)
    made.attach(model)
    given = batch("left")
    before, sequence = tiny_models.outputs(model, given), written(model, given).sequences
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in made.state(model).values():
            parameter.mul_(-3)
    assert tiny_models.outputs(twin, given).equal(before)
    assert written(twin, given).sequences.equal(sequence)
    assert not tiny_models.outputs(model, given).equal(before)
