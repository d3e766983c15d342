"""Live = merged; unmerge is bit-exact; merging never changes the adapter."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch

import tiny_models
from law_cases import CASES, Case, grid
from learned import (
    assert_same_bits,
    attach_learned,
    bits,
    module_ids,
    trainable,
)
from lorakit.adapters.attach import active_adapter, attach, detach, use
from lorakit.adapters.fold import merge, unmerge
from lorakit.adapters.spec import LoraSpec
from lorakit.errors import MergeError, StateError

_DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)


@grid()
def test_live_equals_merged_and_unmerge_restores_every_bit(case: Case) -> None:
    model = tiny_models.build(case.architecture)
    given = tiny_models.inputs(model)
    before = tiny_models.outputs(model, given)
    attach_learned(model, case.make(), warns=case.warns)
    live = tiny_models.outputs(model, given)
    values, places = bits(model), module_ids(model)
    pointers = {n: p.data_ptr() for n, p in model.named_parameters(remove_duplicate=False)}
    adapter = {n: p.detach().clone() for n, p in trainable(model).items()}
    config = model.config.to_dict()

    merge(model)
    merged = tiny_models.outputs(model, given)
    assert (merged - before).abs().max() > 1e-4
    torch.testing.assert_close(merged, live, rtol=1e-5, atol=2e-5)
    now = dict(model.named_parameters())
    assert all(now[n].equal(v) for n, v in adapter.items())

    unmerge(model)
    assert_same_bits(values, bits(model))
    assert module_ids(model) == places
    assert {n: p.data_ptr() for n, p in model.named_parameters(remove_duplicate=False)} == pointers
    assert model.config.to_dict() == config
    assert tiny_models.outputs(model, given).equal(live)
    assert active_adapter(model) == "default"
    with use(model, None):
        assert tiny_models.outputs(model, given).equal(before)


@grid(
    "llama-all-linear", "gpt2-parts-ranks", "bert-bias-lora-only", "vit-everything", "t5-embeddings"
)
def test_merge_then_detach_leaves_a_plain_merged_model(case: Case) -> None:
    model = tiny_models.build(case.architecture)
    given = tiny_models.inputs(model)
    types = {n: type(m) for n, m in model.named_modules(remove_duplicate=False)}
    attach_learned(model, case.make(), warns=case.warns)
    live = tiny_models.outputs(model, given)
    merge(model, keep=False)
    detach(model)
    assert {n: type(m) for n, m in model.named_modules(remove_duplicate=False)} == types
    torch.testing.assert_close(tiny_models.outputs(model, given), live, rtol=1e-5, atol=2e-5)
    # A new adapter can be put on it, starting as the identity.
    merged = tiny_models.outputs(model, given)
    attach(model, LoraSpec(targets="all-linear"))
    assert tiny_models.outputs(model, given).equal(merged)


@_DTYPES
@pytest.mark.parametrize(
    "name",
    [
        "llama-all-linear",
        "gpt2-all-linear",
        "gpt2-parts-ranks",
        "phi3-parts",
        "bloom-qv",
        "falcon-grouped-qv",
        "vit-conv",
        "llama-tied-embedding",
        "llama-patterns-rslora",
        "gpt2-bias-lora-only",
    ],
)
def test_merge_adds_in_float32_and_rounds_once(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    model = tiny_models.build(case.architecture).to(dtype)
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    attach_learned(model, case.make(), warns=case.warns)
    deltas = _reference_deltas(model)
    merge(model)
    detach(model)
    after = dict(model.named_parameters())
    assert deltas
    for site, delta in deltas.items():
        weight = f"{site}.weight"
        assert after[weight].dtype == dtype
        exact = base[weight].double() + delta
        rounded = exact.to(dtype)
        if dtype == torch.float32:
            torch.testing.assert_close(after[weight], rounded, rtol=1e-6, atol=1e-7)
        else:
            # The float32 sum may fall on the other side of a tie, hardly ever.
            assert (after[weight] != rounded).float().mean() < 0.002
        assert not after[weight].equal(base[weight])


def _reference_deltas(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """S B A in float64 by module, from the adapter's file-free form."""
    from lorakit.adapters.extract import adapter_from_model

    adapter = adapter_from_model(model, "default")
    deltas = {}
    for factors in adapter.factors.values():
        a, b = factors.A.detach().double(), factors.B.detach().double()
        product = factors.scaling * (b.flatten(1) @ a.flatten(1))
        if factors.kind == "conv2d":
            product = product.reshape(b.shape[0], *a.shape[1:])
        if factors.rows is not None:
            rows = factors.rows
            whole = torch.zeros(rows.whole, product.shape[1], dtype=torch.float64)
            chosen = [
                rows.start + i * rows.step + j
                for i in range(rows.count)
                for j in range(rows.length)
            ]
            whole[chosen] = product
            product = whole
        if factors.kind in ("conv1d", "embedding"):
            product = product.T
        deltas[factors.module] = deltas.get(factors.module, 0) + product
    return deltas


@_DTYPES
@pytest.mark.parametrize("name", ["llama-tied", "gemma3_text", "gpt2", "t5"])
def test_a_tied_embedding_is_untied_by_merge_and_tied_again(name: str, dtype: torch.dtype) -> None:
    target = {"gpt2": "wte"}.get(name, "embed_tokens")
    model = tiny_models.build(name).to(dtype)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.weight is embedding.weight
    given = tiny_models.inputs(model)
    spec = LoraSpec(targets=(target,), r=4, alpha=6)
    attach_learned(model, spec, warns="shares its weight", size=0.1)
    live = tiny_models.outputs(model, given)
    head_before = model.get_output_embeddings().weight.detach().clone()
    told = merge(model)
    assert told.untied
    assert model.config.tie_word_embeddings is False
    assert model.get_output_embeddings().weight.equal(head_before)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
    merged = tiny_models.outputs(model, given)
    assert (merged - live).abs().max() <= tolerance * live.abs().max()
    unmerge(model)
    assert model.config.tie_word_embeddings is True
    assert tiny_models.outputs(model, given).equal(live)
    detach(model)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_merged_tied_model_saved_by_transformers_is_the_merged_model(tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny_models.build("llama-tied")
    given = tiny_models.inputs(model)
    attach_learned(model, CASES["llama-tied-embedding"].make(), warns="shares its weight")
    live = tiny_models.outputs(model, given)
    merge(model, keep=False)
    detach(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(tiny_models.outputs(again, given), live, rtol=1e-5, atol=2e-5)


def test_what_a_merge_costs_is_said() -> None:
    model = tiny_models.build("llama")
    attach_learned(model, LoraSpec(targets="qv"))
    told = merge(model)
    assert told.num_weights == 4
    assert told.kept_bytes == 2 * (32 * 32 + 16 * 32) * 4
    unmerge(model)
    told = merge(model, keep=False)
    assert told.kept_bytes == 0


def test_merging_a_second_time_or_another_adapter_is_refused() -> None:
    model = tiny_models.build("llama")
    given = tiny_models.inputs(model)
    attach_learned(model, LoraSpec(), "one")
    attach_learned(model, LoraSpec(), "two", seed=8)
    with pytest.raises(StateError):
        merge(model, "three")
    with pytest.raises(StateError):
        unmerge(model)
    merge(model, "one")
    merged = tiny_models.outputs(model, given)
    for name in ("one", "two"):
        with pytest.raises(StateError):
            merge(model, name)
    assert tiny_models.outputs(model, given).equal(merged)
    unmerge(model)
    with pytest.raises(StateError):
        unmerge(model)


def test_a_merged_adapter_cannot_be_left_out_and_is_not_added_twice() -> None:
    model = tiny_models.build("llama")
    given = tiny_models.inputs(model)
    attach_learned(model, LoraSpec(), "one")
    with use(model, "one"):
        live = tiny_models.outputs(model, given)
    attach_learned(model, LoraSpec(), "two", seed=8)
    merge(model, "one")
    for selection in (None, "two", ["one", None, "one"], ["two"] * 3):
        with pytest.raises(StateError), use(model, selection):
            pytest.fail("never entered")
    with use(model, "one"):
        torch.testing.assert_close(tiny_models.outputs(model, given), live, rtol=1e-5, atol=2e-5)
    with pytest.raises(StateError):
        attach(model, LoraSpec(), name="three")


def test_merging_an_inactive_adapter_runs_that_one_and_unmerge_keeps_it() -> None:
    model = tiny_models.build("gpt2")
    given = tiny_models.inputs(model)
    attach_learned(model, LoraSpec(), "one")
    live = tiny_models.outputs(model, given)
    attach_learned(model, LoraSpec(), "two", seed=8)
    merge(model, "one")
    torch.testing.assert_close(tiny_models.outputs(model, given), live, rtol=1e-5, atol=2e-5)
    unmerge(model)
    assert active_adapter(model) == "one"
    assert tiny_models.outputs(model, given).equal(live)


def test_keep_false_cannot_be_undone_and_says_so() -> None:
    model = tiny_models.build("llama")
    given = tiny_models.inputs(model)
    attach_learned(model, LoraSpec())
    merge(model, keep=False)
    merged = tiny_models.outputs(model, given)
    with pytest.raises(StateError):
        unmerge(model)
    assert tiny_models.outputs(model, given).equal(merged)


@pytest.mark.parametrize("keep", [True, False])
def test_a_merge_that_is_not_finite_changes_nothing(keep: bool) -> None:
    model = tiny_models.build("llama")
    attach_learned(model, LoraSpec(targets="all-linear"))
    last = list(trainable(model).values())[-1]
    with torch.no_grad():
        last[0, 0] = float("inf")
    values = bits(model)
    with pytest.raises(MergeError):
        merge(model, keep=keep)
    assert_same_bits(values, bits(model))
    with pytest.raises(StateError):
        unmerge(model)


def test_a_float16_merge_that_overflows_is_refused() -> None:
    model = tiny_models.build("llama").to(torch.float16)
    attach_learned(model, LoraSpec(targets="qv"))
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.fill_(300.0)
    values = bits(model)
    with pytest.raises(MergeError):
        merge(model)
    assert_same_bits(values, bits(model))


def test_a_merged_copy_leaves_the_original_live() -> None:
    model = tiny_models.build("llama-tied")
    given = tiny_models.inputs(model)
    before = tiny_models.outputs(model, given)
    attach_learned(model, CASES["llama-tied-embedding"].make(), warns="shares its weight")
    live = tiny_models.outputs(model, given)
    clone = copy.deepcopy(model)
    merge(clone)
    assert model.config.tie_word_embeddings is True
    assert tiny_models.outputs(model, given).equal(live)
    unmerge(clone)
    assert clone.config.tie_word_embeddings is True
    detach(clone)
    assert clone.lm_head.weight is clone.model.embed_tokens.weight
    assert tiny_models.outputs(clone, given).equal(before)


def test_a_deep_copy_of_a_merged_model_can_be_unmerged() -> None:
    model = tiny_models.build("gpt2")
    given = tiny_models.inputs(model)
    attach_learned(model, LoraSpec(bias="all"))
    live = tiny_models.outputs(model, given)
    merge(model)
    clone = copy.deepcopy(model)
    unmerge(clone)
    assert tiny_models.outputs(clone, given).equal(live)
    torch.testing.assert_close(tiny_models.outputs(model, given), live, rtol=1e-5, atol=2e-5)
    unmerge(model)
    assert tiny_models.outputs(model, given).equal(live)


def test_detach_of_another_adapter_while_one_is_merged() -> None:
    model = tiny_models.build("llama")
    given = tiny_models.inputs(model)
    before = tiny_models.outputs(model, given)
    attach_learned(model, LoraSpec(), "two", seed=8)
    attach_learned(model, LoraSpec(), "one")
    live = tiny_models.outputs(model, given)
    merge(model, "one")
    # Refusing is fine; half-doing is not.
    with contextlib.suppress(StateError):
        detach(model, "two")
    torch.testing.assert_close(tiny_models.outputs(model, given), live, rtol=1e-5, atol=2e-5)
    unmerge(model)
    with use(model, None):
        assert tiny_models.outputs(model, given).equal(before)


def test_train_mode_of_a_merged_model_has_no_dropout() -> None:
    model = tiny_models.build("llama")
    given = tiny_models.inputs(model)
    attach_learned(model, LoraSpec(dropout=0.5))
    live = tiny_models.outputs(model, given)
    merge(model)
    model.train()
    torch.testing.assert_close(tiny_models.outputs(model, given), live, rtol=1e-5, atol=2e-5)
