"""Row i of a mixed batch is row i of its own run; generate works inside `use`."""

from __future__ import annotations

import pytest
import torch

import tiny_models
from law_cases import CASES, Case, grid
from learned import attach_learned
from lorakit.adapters.attach import use
from lorakit.adapters.spec import LoraSpec
from lorakit.errors import StateError


@grid()
def test_each_row_runs_as_if_alone(case: Case) -> None:
    model = tiny_models.build(case.architecture)
    given = tiny_models.inputs(model, batch=5)
    attach_learned(model, case.make(), "one", warns=case.warns)
    attach_learned(model, case.make(r=2), "two", seed=8, warns=case.warns)
    rows = ["two", None, "one", "one", None]
    whole = {}
    for name in (None, "one", "two"):
        with use(model, name):
            whole[name] = tiny_models.outputs(model, given)
    with use(model, rows):
        mixed = tiny_models.outputs(model, given)
    assert mixed.dtype == whole[None].dtype
    for i, name in enumerate(rows):
        torch.testing.assert_close(mixed[i], whole[name][i], rtol=1e-5, atol=2e-6)
        others = [whole[n][i] for n in whole if n != name]
        assert all((mixed[i] - other).abs().max() > 1e-4 for other in others)


@grid(
    "llama-all-linear", "gpt2-parts-ranks", "vit-everything", "bert-bias-lora-only", "t5-embeddings"
)
def test_gradients_of_a_mixed_batch_are_those_of_the_rows(case: Case) -> None:
    model = tiny_models.build(case.architecture)
    given = tiny_models.inputs(model, batch=3)
    attach_learned(model, case.make(), "one", warns=case.warns)

    def gradient(selection: object, keep: list[int]) -> dict[str, torch.Tensor]:
        model.zero_grad()
        with use(model, selection):  # type: ignore[arg-type]
            result = model(**given)
            output = result.logits if "logits" in result else result.last_hidden_state
            output[keep].square().sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    alone = gradient("one", [0, 2])
    mixed = gradient(["one", None, "one"], [0, 1, 2])
    assert alone
    for name, value in alone.items():
        # Two paths that sum in another order: float32, relative to the largest entry.
        atol = 1e-5 * max(1.0, value.abs().max().item())
        torch.testing.assert_close(mixed[name], value, rtol=1e-3, atol=atol)


def test_a_list_of_one_name_equals_the_name() -> None:
    model = tiny_models.build("llama")
    given = tiny_models.inputs(model)
    attach_learned(model, LoraSpec(targets="all-linear"), "one")
    live = tiny_models.outputs(model, given)
    with use(model, ["one"] * 3):
        torch.testing.assert_close(tiny_models.outputs(model, given), live)
    with use(model, [None] * 3):
        mixed = tiny_models.outputs(model, given)
    with use(model, None):
        assert tiny_models.outputs(model, given).equal(mixed)


@pytest.mark.parametrize("num_rows", [2, 4, 5])
def test_a_wrong_number_of_rows_is_refused(num_rows: int) -> None:
    model = tiny_models.build("llama")
    given = tiny_models.inputs(model, batch=3)
    attach_learned(model, LoraSpec(), "one")
    rows = ["one", *[None] * (num_rows - 1)]
    with use(model, rows), pytest.raises(StateError, match="row"):
        tiny_models.outputs(model, given)


@pytest.mark.parametrize(
    "name",
    [
        "llama-all-linear",
        "gpt2-positions",
        "gpt2-parts-ranks",
        "gpt2-tokens",
        "t5-all-linear",
        "t5-embeddings",
        "bloom-qv",
        "falcon-qv",
        "opt-bias-all",
        "llama-head-beside",
        "gemma3-embedding",
    ],
)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="greedy"),
        pytest.param({"num_beams": 3}, id="beams"),
        pytest.param({"num_beams": 2, "num_return_sequences": 2}, id="returned"),
    ],
)
def test_generate_inside_use(name: str, options: dict) -> None:
    case = CASES[name]
    model = tiny_models.build(case.architecture)
    given = tiny_models.inputs(model, batch=3, length=5)
    given.pop("decoder_input_ids", None)
    attach_learned(model, case.make(), "one", warns=case.warns, size=0.5)
    attach_learned(model, case.make(), "two", seed=8, warns=case.warns, size=0.5)
    rows = ["one", None, "two"]
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    each = options.get("num_return_sequences", 1)
    alone = []
    for i, row in enumerate(rows):
        with use(model, row):
            one = {k: v[i : i + 1] for k, v in given.items()}
            alone.append(model.generate(**one, **settings, **options))
    with use(model, rows):
        together = model.generate(**given, **settings, **options)
    assert together.shape[0] == 3 * each
    for i, expected in enumerate(alone):
        assert together[i * each : (i + 1) * each].equal(expected)


def test_sampled_sequences_belong_to_their_rows() -> None:
    # Several returned sequences per row: entry i * n + j is row i.
    model = tiny_models.build("llama")
    given = tiny_models.inputs(model, batch=2, length=5)
    attach_learned(model, LoraSpec(targets="all-linear"), "one", size=1.0)
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": True, "top_k": 1}
    with use(model, ["one", None]):
        together = model.generate(**given, **settings, num_return_sequences=3)
    for i, row in enumerate(["one", None]):
        with use(model, row):
            expected = model.generate(
                **{k: v[i : i + 1] for k, v in given.items()}, **settings, num_return_sequences=3
            )
        assert together[3 * i : 3 * i + 3].equal(expected)
