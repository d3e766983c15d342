"""Packed batches and whole-layer functions give the loss and gradients of the general path."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import tiny_models
from learned import attach_learned, trainable
from lorakit.adapters.attach import attach, use
from lorakit.adapters.fold import merge
from lorakit.adapters.spec import LoraSpec
from lorakit.errors import LorakitWarning
from lorakit.layers import decoder, packed, segments
from lorakit.layers.packed import Packing
from lorakit.layers.rms_norm import use_fast_norms
from lorakit.layers.segments import pack_rows
from lorakit.models import fast_layers, packing, row_threads
from lorakit.models.attention import GROUPED, use_attention
from lorakit.models.fast_layers import use_fast_layers, use_own_layers
from lorakit.models.label_head import LabelHead
from lorakit.models.load import load_base_model

Batch = dict[str, Tensor]
Found = tuple[Tensor, dict[str, Tensor]]

MIXED = LoraSpec(
    targets="all-linear", r=3, alpha=7.5, rank_pattern={"k_proj": 5, "up_proj": 2, "o_proj": 1}
)
SOME = LoraSpec(targets=("q_proj", "up_proj", "down_proj"), r=2, alpha=5.0)
FAST = ("llama", "llama-tied", "mistral", "qwen2")


def a_batch(*, shared: int = 5, lengths: tuple[int, ...] = (12, 9, 12, 7)) -> Batch:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, tiny_models.VOCAB, (len(lengths), max(lengths)), generator=generator)
    ids[:, :shared] = ids[:1, :shared]
    ids[:, shared] = torch.arange(10, 10 + len(lengths))
    mask, labels = torch.ones_like(ids), ids.clone()
    labels[:, : shared + 1] = -100
    labels[0, 8:10] = -100
    for row, length in enumerate(lengths):
        mask[row, length:], labels[row, length:] = 0, -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def model_of(architecture: str, spec: LoraSpec = MIXED) -> PreTrainedModel:
    model = tiny_models.build(architecture).double()
    attach_learned(model, spec)
    return model.train()


def run(model: PreTrainedModel, batch: Batch, **options: float) -> Found:
    model.zero_grad()
    loss = LabelHead(model).loss(batch, **options)  # type: ignore[arg-type]
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in trainable(model).items()}  # type: ignore[union-attr]


def assert_same(found: Found, expected: Found, tolerance: float = 1e-5) -> None:
    # 1e-5 and not 1e-12: transformers' norms go through float32 whatever the model's dtype.
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What took the fast way: "layer" for each layer function, "shared n" for each packing."""
    seen: list[str] = []
    layer, pack = decoder.decoder_layer, packing.pack_rows

    def counted_layer(*args: object) -> Tensor:
        seen.append("layer")
        return layer(*args)  # type: ignore[arg-type]

    def counted_pack(*args: object, **options: object) -> tuple[Packing, Tensor]:
        found = pack(*args, **options)  # type: ignore[arg-type]
        seen.append(f"shared {found[0].shared}")
        return found

    monkeypatch.setattr(fast_layers, "decoder_layer", counted_layer)
    monkeypatch.setattr(packing, "pack_rows", counted_pack)
    return seen


@pytest.mark.parametrize("architecture", [*FAST, "qwen3", "phi3", "gpt_neox"])
@pytest.mark.parametrize("shared", [0, 5])
def test_a_packed_batch_has_the_loss_and_gradients_of_a_padded_one(architecture, shared, calls):
    spec = LoraSpec(targets="all-linear", r=3, alpha=7.5)
    model, batch = model_of(architecture, spec), a_batch(shared=shared)
    expected = run(model, batch)
    assert not calls
    use_attention(model, GROUPED)
    assert_same(run(model, batch), expected)
    assert calls[-1] == f"shared {shared}"


@pytest.mark.parametrize("architecture", FAST)
@pytest.mark.parametrize("spec", [MIXED, SOME])
@pytest.mark.parametrize("norms", [False, True])
def test_a_whole_layer_function_has_the_gradients_of_the_layer(architecture, spec, norms, calls):
    model, batch = model_of(architecture, spec), a_batch()
    expected = run(model, batch, label_smoothing=0.1)
    use_attention(model, GROUPED)
    if norms:
        use_fast_norms(model)
    assert use_fast_layers(model) == 2
    assert use_fast_layers(model) == 0
    assert_same(run(model, batch, label_smoothing=0.1), expected)
    assert calls.count("layer") == 4  # two layers, in the check and in the step
    use_own_layers(model)
    assert_same(run(model, batch, label_smoothing=0.1), expected)
    assert calls.count("layer") == 4


def fast(model: PreTrainedModel) -> PreTrainedModel:
    use_attention(model, GROUPED)
    assert use_fast_layers(model) == 2
    return model


def test_one_row_alone_and_rows_of_one_token_are_packed(calls):
    model = model_of("llama")
    for batch in (a_batch(lengths=(9,)), a_batch(shared=3, lengths=(4, 8, 5))):
        expected = run(model, batch)
        assert_same(run(fast(copy.deepcopy(model)), batch), expected)
    assert "layer" in calls
    assert "shared 3" in calls


@pytest.mark.parametrize("architecture", ["llama", "phi3"])
@pytest.mark.parametrize("shared", [0, 3])
@pytest.mark.parametrize("cost", [1, 20, 60])
def test_rows_cut_into_many_blocks_give_the_same(architecture, shared, cost, monkeypatch):
    monkeypatch.setattr(packed, "_BLOCK_COST", cost)
    spec = LoraSpec(targets="all-linear", r=3, alpha=7.5)
    model = model_of(architecture, spec)
    batch = a_batch(shared=shared, lengths=(12, 5, 11, 12, 7, 4))
    expected = run(model, batch)
    use_attention(model, GROUPED)
    use_fast_layers(model)
    assert_same(run(model, batch), expected)


@pytest.mark.parametrize("cost", [1, 40, 6000])
def test_every_query_is_in_one_block(cost, monkeypatch):
    monkeypatch.setattr(packed, "_BLOCK_COST", cost)
    lengths = (30, 7, 29, 12, 1, 30)
    packing = Packing((9, *lengths), (-1, *(0 for _ in lengths)), torch.device("cpu"))
    places = torch.cat([block.places for block in packing.blocks])
    assert places.sort().values.equal(torch.arange(9 + sum(lengths)))
    assert (len(packing.blocks) > 2) == (cost < 6000)


def pairs_of(starts: tuple[int, ...], answers: tuple[int, ...], *, template: int = 0) -> Batch:
    """Each start twice, with an answer behind it; first all chosen rows, then all rejected ones."""
    generator = torch.Generator().manual_seed(5)

    def draw(n: int) -> list[int]:
        return torch.randint(3, tiny_models.VOCAB, (n,), generator=generator).tolist()

    before = draw(template)
    prompts = [[*before, 3 + i, *draw(n - 1)] for i, n in enumerate(starts)]
    rows = [prompts[i % len(starts)] + [40 + i, *draw(n - 1)] for i, n in enumerate(answers)]
    shape = (len(rows), max(map(len, rows)))
    batch = {
        "input_ids": torch.zeros(shape, dtype=torch.long),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
        "labels": torch.full(shape, -100),
    }
    for i, row in enumerate(rows):
        batch["input_ids"][i, : len(row)] = torch.tensor(row)
        batch["attention_mask"][i, : len(row)] = 1
        batch["labels"][i, len(row) - answers[i] : len(row)] = torch.tensor(row[-answers[i] :])
    return batch


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "phi3", "gpt_neox"])
@pytest.mark.parametrize("template", [0, 6])
@pytest.mark.parametrize("cost", [1, 30, 6000])
def test_two_answers_share_their_prompt(architecture, template, cost, calls, monkeypatch):
    monkeypatch.setattr(packed, "_BLOCK_COST", cost)
    model = model_of(architecture, LoraSpec(targets="all-linear", r=3, alpha=7.5))
    starts, answers = (9, 5, 13, 7), (4, 6, 2, 1, 8, 3, 5, 1)
    batch = pairs_of(starts, answers, template=template)
    weights = torch.linspace(-1, 2, 8).double()

    def found() -> Found:
        model.zero_grad()
        logps = LabelHead(model).logits(batch).row_nll(8)
        (logps.double() * weights).sum().backward()
        gradients = {n: p.grad.clone() for n, p in trainable(model).items()}  # type: ignore[union-attr]
        return logps.detach(), gradients

    expected = found()
    use_attention(model, GROUPED)
    use_fast_layers(model)
    assert_same(found(), expected)
    assert f"shared {template}" in calls
    assert ("layer" in calls) == (architecture in FAST)


def test_the_tree_of_rows_is_read_from_their_tokens():
    batch = pairs_of((9, 5, 13), (4, 6, 2, 1, 8, 3), template=6)
    ids, counts = batch["input_ids"], batch["attention_mask"].sum(1).tolist()
    first = (batch["labels"] != -100).long().argmax(1) - 1
    packing, source = pack_rows(ids, counts, first.tolist(), share=True)
    # The template, the rest of each prompt but its last token, whose output is asked for, and the
    # answers behind that one.
    assert packing.lengths == (6, 8, 4, 12, 5, 7, 3, 2, 9, 4)
    assert packing.parents == (-1, 0, 0, 0, 1, 2, 3, 1, 2, 3)
    assert packing.shared == 6
    assert packing.longest == max(counts)
    row, place = source // ids.shape[1], source % ids.shape[1]
    assert packing.positions.equal(place)
    assert row[-4:].tolist() == [5] * 4
    alone, everything = pack_rows(ids, counts, first.tolist(), share=False)
    assert alone.lengths == tuple(counts)
    assert ids.flatten()[everything].equal(ids[batch["attention_mask"].bool()])


def test_what_saves_too_little_is_not_a_segment(monkeypatch):
    ids = torch.tensor([[1, 2, 3, 4, 9], [1, 2, 3, 5, 9], [1, 7, 7, 7, 7], [1, 2, 3, 4, 8]])
    found = {}
    for least in (1, 3, 4, 7):
        monkeypatch.setattr(segments, "_LEAST_SAVED", least)
        packing, _ = pack_rows(ids, [5] * 4, [4] * 4, share=True)
        found[least] = packing.lengths, packing.parents
    assert found[1] == ((1, 2, 1, 1, 2, 4, 1), (-1, 0, 1, 2, 1, 0, 2))
    assert found[3] == ((1, 2, 2, 2, 4, 2), (-1, 0, 1, 1, 0, 1))
    assert found[4] == ((3, 2, 2, 5, 2), (-1, 0, 0, -1, 0))
    assert found[7] == ((5,) * 4, (-1,) * 4)


@pytest.fixture
def two_threads(monkeypatch):
    monkeypatch.setattr(row_threads, "_LEAST_TOKENS", 4)
    monkeypatch.setattr(row_threads, "_MOST_LEARNED", 1.0)
    monkeypatch.setattr(segments, "_LEAST_SAVED", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("architecture", ["llama", "phi3"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_groups_of_rows_in_threads_give_the_same(
    architecture, checkpointing, two_threads, calls, monkeypatch
):
    model = model_of(architecture, LoraSpec(targets="all-linear", r=3, alpha=7.5))
    batch = a_batch(shared=0, lengths=(12, 5, 11, 12, 7))
    expected = run(model, batch, label_smoothing=0.1)
    use_attention(model, GROUPED)
    use_fast_layers(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    found = run(model, batch, label_smoothing=0.1)
    assert_same(found, expected)
    assert calls.count("shared 0") == 4  # the check, the look for what is shared, two groups
    assert torch.get_num_threads() == 2
    torch.testing.assert_close(run(model, batch, label_smoothing=0.1), found, rtol=0, atol=0)


def test_threads_know_of_autocast_and_share_what_is_common(two_threads, calls):
    model, batch = model_of("llama").float(), a_batch(shared=1)
    exact = run(copy.deepcopy(model).double(), batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(fast(model), batch)
    assert calls.count("shared 1") > 2
    assert found[0] != exact[0]
    torch.testing.assert_close(found[0].double(), exact[0].double(), rtol=0.02, atol=0.02)


def test_an_error_in_a_thread_comes_out_and_the_next_batch_runs(two_threads, monkeypatch):
    model, batch = fast(model_of("llama")), a_batch(shared=0)
    head = LabelHead(model)
    head.loss(batch)
    with monkeypatch.context() as patch:
        patch.setattr(fast_layers, "decoder_layer", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            head.loss(batch)
    assert head.loss(batch).isfinite()


@pytest.mark.parametrize(
    ("lengths", "shared", "expected"),
    [
        ((900, 300, 500, 400), 0, [[0, 1], [2, 3]]),
        ((900,), 0, [[0]]),
        ((60, 60, 60), 0, [[0, 1, 2]]),  # too little for a thread
        ((900, 900), 500, [[0, 1]]),  # computed twice, what is shared would cost more
    ],
)
def test_rows_are_dealt_by_their_tokens(lengths, shared, expected, two_threads, monkeypatch):
    monkeypatch.setattr(row_threads, "_LEAST_TOKENS", 128)
    places = torch.arange(max(lengths))
    mask = torch.stack([(places < n).long() for n in lengths])
    batch = {"attention_mask": mask}
    assert row_threads.row_groups(model_of("llama"), batch, shared=shared) == expected


@pytest.mark.parametrize("packed", [True, False])
def test_rows_count_by_their_weights_in_threads_too(packed, two_threads):
    model, batch = model_of("llama"), a_batch()
    head = LabelHead(fast(model) if packed else model)
    num_rows = len(batch["labels"])
    weights = torch.linspace(-1.5, 2.0, num_rows)
    found = head.loss(batch, num_items=3, row_weights=weights)
    expected = (weights * head.logits(batch).row_nll(num_rows)).sum() / 3
    torch.testing.assert_close(found, expected)
    learned = list(trainable(model).values())
    gradients = torch.autograd.grad(expected, learned)
    for one, other in zip(torch.autograd.grad(found, learned), gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        # 300 tokens of prompt and 50 of answers: two of the rows cost 400 together, not 700.
        ((0, 1, 0, 1, 2, 2), [[0, 2, 4, 5], [1, 3]]),
        ((0, 1, 2, 3, 4, 5), [[0, 2, 4], [1, 3, 5]]),
        ((0, 0, 0, 0, 0, 1), [[0, 2, 4], [1, 3, 5]]),  # one prompt would be most of the work
    ],
)
def test_answers_to_one_prompt_stay_together(prompts, expected, two_threads):
    ids = torch.tensor(prompts)[:, None].expand(-1, 350).clone()
    labels = ids.clone()
    labels[:, :300] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    assert row_threads.row_groups(model_of("llama"), batch, shared=0) == expected


def test_gradient_checkpointing_recomputes_the_function(calls):
    model, batch = model_of("llama"), a_batch()
    expected = run(model, batch)
    fast(model).gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(run(model, batch), expected)
    assert calls.count("layer") == 6  # check, forward, and once more in the backward pass


def test_autocast_computes_in_bfloat16_over_float32_and_bfloat16_bases(calls):
    for dtype in (torch.float32, torch.bfloat16):
        model, batch = model_of("llama").to(dtype), a_batch()
        for parameter in trainable(model).values():
            parameter.data = parameter.data.float()
        exact = run(copy.deepcopy(model).double(), batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            own = run(model, batch)
            found = run(fast(model), batch)
        assert found[0].dtype == torch.float32
        assert {g.dtype for g in found[1].values()} == {torch.float32}
        assert calls
        calls.clear()
        # As near to the truth as the general path in the same arithmetic.
        truth, near, ours = (
            torch.cat([g.flatten() for g in f[1].values()]) for f in (exact, own, found)
        )
        assert (ours - truth).norm() < 1.5 * (near - truth).norm() + 0.002 * truth.norm()


def test_several_adapters_and_merged_ones(calls):
    model, batch = model_of("llama"), a_batch()
    attach(model, LoraSpec(targets="qv", r=2, alpha=3.0), name="b")
    for name, parameter in trainable(model).items():
        torch.nn.init.normal_(
            parameter, std=0.2, generator=torch.Generator().manual_seed(len(name))
        )
    expected = run(model, batch)
    assert_same(run(fast(model), batch), expected)
    assert calls.count("layer") == 4
    use_own_layers(model)
    with use(model, None):
        base = LabelHead(model).loss(batch)
        fast(model)
        torch.testing.assert_close(LabelHead(model).loss(batch), base)
    assert not torch.allclose(base, expected[0])
    merge(model, "default")
    calls.clear()
    with use(model, "default"):
        merged = LabelHead(model).loss(batch)
    assert calls.count("layer") == 4
    use_own_layers(model)
    with use(model, "default"):
        torch.testing.assert_close(merged, LabelHead(model).loss(batch))


def _dora() -> PreTrainedModel:
    return model_of("llama", LoraSpec(targets="all-linear", update="dora", r=3, alpha=7.5))


def _hooked() -> PreTrainedModel:
    model = model_of("llama")
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda _m, _x, y: 2 * y)
    return model


def _trained_norms() -> PreTrainedModel:
    model = model_of("llama")
    for layer in model.model.layers:
        layer.input_layernorm.weight.requires_grad_()
    return model


def _beside(name: str) -> PreTrainedModel:
    targets = ("q_proj",) if name == "mlp" else ("down_proj",)
    return model_of("llama", LoraSpec(targets=targets, r=3, alpha=7.5, also_train=(name,)))


_BESIDE = ("input_layernorm", "post_attention_layernorm", "self_attn", "v_proj", "mlp")


@pytest.mark.parametrize(
    "make", [_dora, _hooked, _trained_norms, *(partial(_beside, name) for name in _BESIDE)]
)
def test_what_the_function_does_not_know_runs_its_own_way(make: Callable, calls):
    model, batch = make(), a_batch()
    expected = run(model, batch)
    assert_same(run(fast(model), batch), expected)
    assert "layer" not in calls
    assert "shared 5" in calls


def test_dropout_draws_for_each_row_and_keeps_the_function_away(calls):
    model = model_of("llama", LoraSpec(targets="all-linear", r=3, alpha=7.5, dropout=0.5))
    run(fast(model), a_batch())
    # Compared in eval mode, where nothing drops, and the start is shared.
    assert calls == ["shared 5", "layer", "layer", "shared 0"]


SECOND = {
    "plain": LoraSpec(targets="mlp", r=2, alpha=9.0),
    "dora": LoraSpec(targets="all-linear", r=2, alpha=3.0, update="dora"),
}


def two_adapters(architecture: str, second: str) -> PreTrainedModel:
    model = tiny_models.build(architecture).double()
    attach_learned(model, LoraSpec(targets="all-linear", r=3, alpha=7.5))
    first = trainable(model).values()
    attach_learned(model, SECOND[second], "second")
    for tensor in first:
        tensor.requires_grad_(True)
    return model.train()


ROWS = {
    "two stretches": ["default", "default", "second", "second"],
    "the base too": ["second", None, "default", "default"],
    "mixed": ["default", "second", "default", None],
}


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "phi3", "gpt_neox"])
@pytest.mark.parametrize("second", SECOND)
@pytest.mark.parametrize("rows", ROWS)
def test_rows_with_adapters_of_their_own_are_packed_by_adapter(architecture, second, rows, calls):
    model, batch = two_adapters(architecture, second), a_batch()
    with use(model, ROWS[rows]):
        expected = run(model, batch)
        assert not calls
        use_attention(model, GROUPED)
        use_fast_layers(model)
        use_fast_norms(model)
        found = run(model, batch)
    assert_same(found, expected)
    assert len(found[1]) == len(trainable(model))
    assert "shared 0" in calls  # what different adapters make of one start is not the same
    assert ("layer" in calls) == (architecture in FAST and second == "plain")


def test_rows_share_what_they_begin_with_where_their_adapter_is_the_same():
    ids = torch.tensor([[1, 2, 3, 4, 5, 6]] * 5)
    ids[:, 5] = torch.arange(5)
    owners = ["a", "a", None, "b", "b"]
    packing, source = pack_rows(ids, [6, 6, 6, 6, 5], [5] * 5, share=True, owners=owners)
    assert packing.lengths == (5, 1, 1, 6, 4, 2, 1)
    assert packing.parents == (-1, 0, 0, -1, -1, 4, 4)
    assert packing.spans == (("a", 0, 7), ("b", 13, 20))
    assert (source // 6).tolist() == [0] * 6 + [1] + [2] * 6 + [3] * 6 + [4]


@pytest.mark.parametrize("architecture", ["llama", "phi3"])
def test_mixed_rows_are_recomputed_with_their_adapters(architecture, calls):
    model, batch = two_adapters(architecture, "plain"), a_batch()
    with use(model, ROWS["mixed"]):
        expected = run(model, batch)
        use_attention(model, GROUPED)
        use_fast_layers(model)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        assert_same(run(model, batch), expected)
    assert calls


def test_a_module_trained_beside_keeps_mixed_rows_apart(calls):
    model, batch = tiny_models.build("llama").double(), a_batch()
    spec = LoraSpec(targets="qv", r=2, alpha=5.0, also_train=("norm",))
    attach_learned(model, spec)
    rows = ["default", None, "default", None]
    with use(model, rows):
        expected = LabelHead(model).loss(batch)
        found = LabelHead(fast(model)).loss(batch)
    torch.testing.assert_close(found, expected)
    assert not calls


def test_four_bit_layers_run_their_own_way_in_a_packed_batch(tmp_path: Path, calls):
    tiny_models.build("llama").save_pretrained(tmp_path)
    model = load_base_model(tmp_path, "nf4", device="cpu")
    attach_learned(model, MIXED)
    batch = a_batch()
    expected = run(model, batch)
    assert_same(run(fast(model), batch), expected, 1e-3)
    assert "layer" not in calls
    assert "shared 5" in calls


def test_left_padding_and_short_windows_are_not_packed(calls):
    model = fast(model_of("llama"))
    batch = {name: tensor.flip(1) for name, tensor in a_batch().items()}
    run(model, batch)
    assert not calls
    model.config.sliding_window = 8
    run(model, a_batch())
    assert "layer" not in calls


def test_logits_and_their_rows_are_those_of_the_padded_batch():
    model, batch = model_of("llama"), a_batch()
    own = LabelHead(model).logits(batch)
    found = LabelHead(fast(model)).logits(batch)
    torch.testing.assert_close(found.logits, own.logits, rtol=1e-4, atol=1e-5)
    assert found.targets.equal(own.targets)
    assert found.rows.equal(own.rows)


def test_a_model_that_mixes_tokens_elsewhere_is_found_out_by_the_first_batch(calls):
    model, batch = model_of("llama"), a_batch()
    use_attention(model, GROUPED)
    model.model.layers[0].mlp.register_forward_hook(lambda _m, _x, y: y + y.roll(1, 1))
    own = copy.deepcopy(model)
    use_attention(own, "eager")
    head = LabelHead(model)
    with pytest.warns(LorakitWarning, match="padded to the longest"):
        loss = head.loss(batch)
    torch.testing.assert_close(loss, LabelHead(own).loss(batch), rtol=1e-5, atol=1e-5)
    assert len(calls) == 1
    assert not head.full_forward


def test_what_a_layer_keeps_is_less_than_what_its_operations_keep():
    kept = []
    for prepare in (lambda m: use_attention(m, GROUPED), fast):
        model = model_of("llama")
        prepare(model)
        head, batch = LabelHead(model), a_batch()
        head.loss(batch)
        sizes: dict[int, int] = {}

        def note(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            head.loss(batch)
        kept.append(sum(sizes.values()))
    assert kept[1] < 0.6 * kept[0]
