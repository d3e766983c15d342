"""A step on tensors without memory counts what a step on real tensors holds."""

from __future__ import annotations

import copy

import pytest
import torch

from lorakit.adapters.spec import LoraSpec
from lorakit.errors import SpecError
from lorakit.layers.rms_norm import use_fast_norms
from lorakit.methods.registry import build_method
from lorakit.models.attention import GROUPED, use_attention
from lorakit.models.checkpointing import checkpoint_activations
from lorakit.models.empty import empty_from_config
from lorakit.models.fast_layers import use_fast_layers
from lorakit.models.label_head import IGNORED, LabelHead
from lorakit.models.packing import can_pack
from lorakit.planner import memory
from lorakit.planner.ledger import Ledger
from lorakit.planner.memory import TrainingSetup, estimate_training
from lorakit.planner.step import BatchShape

BATCH = BatchShape(rows=3, length=40, labels=33)
ALL_LINEAR = {"r": 4, "targets": "all-linear"}
RUNS = [
    ("llama", "lora", ALL_LINEAR, False),
    ("llama", "lora", ALL_LINEAR, True),
    ("llama", "lora", {**ALL_LINEAR, "update": "dora"}, False),
    ("llama", "full", {}, False),
    ("llama", "full", {}, True),
    ("llama", "houlsby", {"bottleneck": 6}, False),
    ("llama", "prefix_layer", {"prefix": 3, "infix": 2}, False),
    ("gpt2", "lora", {"r": 4, "targets": "qv"}, False),
    ("gpt2", "bitfit", {}, True),
    ("gemma3_text", "lora", ALL_LINEAR, False),
]


@pytest.fixture(autouse=True)
def _nothing_remembered():
    memory._counted.clear()


def on_meta(model):
    return empty_from_config(copy.deepcopy(model.config))


def real_peak_bytes(model, name, options, checkpointing):
    """The fullest moment of a real step, by a ledger of real tensors."""
    method = build_method(name, options)
    method.attach(model)
    use_fast_norms(model)
    use_fast_layers(model)
    if can_pack(model):
        use_attention(model, GROUPED)
    if checkpointing:
        checkpoint_activations(model)
    model.train()
    ids = torch.randint(3, 100, (BATCH.rows, BATCH.length))
    ids[:, 0] = torch.arange(3, 3 + BATCH.rows)  # no start that is shared
    mask = torch.ones_like(ids)
    labels = torch.full_like(ids, IGNORED)
    learned = BATCH.labels // BATCH.rows
    labels[:, -learned:] = ids[:, -learned:]
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    head = LabelHead(model)
    with torch.no_grad():
        assert head.logits(batch).logits.shape[0] == BATCH.labels
    ledger = Ledger([*model.parameters(), *model.buffers(), *batch.values()])
    with ledger:
        ledger.enter("all", "all")
        head.loss(batch).backward()
    return sum(ledger.peaks["all"].values())


@pytest.mark.parametrize(("kind", "name", "options", "checkpointing"), RUNS)
def test_the_fullest_moment_is_that_of_a_real_step(tiny, kind, name, options, checkpointing):
    model = tiny(kind)
    setup = TrainingSetup(dtype=torch.float32, checkpointing=checkpointing)
    method = build_method(name, options)
    found = estimate_training(on_meta(model), method, BATCH, setup)
    assert found.counts is not None, found.memory.notes
    real = real_peak_bytes(model, name, options, checkpointing)
    # Indices and masks are a few kilobytes, which count in a tiny model.
    assert found.counts.peak_bytes == pytest.approx(real, rel=0.06)
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    static = found.memory.weights_bytes + found.memory.adapter_bytes
    assert static == total


@pytest.mark.parametrize(
    ("name", "options", "checkpointing"),
    [
        ("lora", ALL_LINEAR, False),
        ("full", {}, True),
    ],
)
def test_two_short_models_say_what_the_whole_one_says(
    tiny, monkeypatch, name, options, checkpointing
):
    config = tiny("llama").config
    config.num_hidden_layers = 5
    model = empty_from_config(config)
    setup = TrainingSetup(dtype=torch.float32, checkpointing=checkpointing)
    short = estimate_training(model, build_method(name, options), BATCH, setup)
    memory._counted.clear()
    monkeypatch.setattr(memory, "repeated_blocks", lambda _: None)
    whole = estimate_training(model, build_method(name, options), BATCH, setup)
    assert short.counts is not None
    assert whole.counts is not None
    assert short.counts.peak_bytes == pytest.approx(whole.counts.peak_bytes, rel=1e-9)
    assert short.counts.flops == pytest.approx(whole.counts.flops, rel=1e-9)


def test_blocks_that_learn_something_else_are_all_run(tiny, monkeypatch):
    config = tiny("llama").config
    config.num_hidden_layers = 7
    model = empty_from_config(config)
    seen = []
    real = memory._count_one
    monkeypatch.setattr(
        memory, "_count_one", lambda m, *rest: seen.append(len(m.model.layers)) or real(m, *rest)
    )
    setup = TrainingSetup(dtype=torch.float32)
    ranks = {**ALL_LINEAR, "rank_pattern": {r"layers\.6\.mlp\.up_proj": 8}}
    estimate_training(model, build_method("lora", ranks), BATCH, setup)
    assert seen == [7]
    estimate_training(model, build_method("lora", ALL_LINEAR), BATCH, setup)
    assert seen == [7, 2, 3]


def test_four_bit_weights_and_checkpointing_need_less(tiny):
    model = on_meta(tiny("llama"))
    method = build_method("lora", ALL_LINEAR)
    dense = TrainingSetup(dtype=torch.bfloat16)
    packed = TrainingSetup(dtype=torch.bfloat16, four_bit=True)
    thin = TrainingSetup(dtype=torch.bfloat16, checkpointing=True)
    sizes = [estimate_training(model, method, BATCH, s).memory for s in (dense, packed, thin)]
    assert sizes[1].weights_bytes < 0.6 * sizes[0].weights_bytes
    assert sizes[2].activations_bytes < sizes[0].activations_bytes / 2
    assert sizes[0].weights_bytes == sizes[2].weights_bytes
    with pytest.raises(SpecError, match="4-bit numbers have no gradient"):
        estimate_training(model, build_method("full", {}), BATCH, packed)


def test_the_model_and_the_method_stay_as_they_were(tiny):
    model = on_meta(tiny("llama"))
    before = [(n, p.dtype, p.requires_grad, id(p)) for n, p in model.named_parameters()]
    spec = LoraSpec(**ALL_LINEAR)
    setup = TrainingSetup(dtype=torch.bfloat16, four_bit=True, checkpointing=True)
    estimate_training(model, build_method("lora", spec.to_dict()), BATCH, setup)
    assert [(n, p.dtype, p.requires_grad, id(p)) for n, p in model.named_parameters()] == before
    assert not any(module._forward_hooks for module in model.modules())


def test_a_model_that_cannot_be_run_without_values_is_still_planned(tiny, monkeypatch):
    def no(*_args, **_kwargs):
        raise RuntimeError("data-dependent")

    model = on_meta(tiny("llama"))
    monkeypatch.setattr(memory, "count_step", no)
    found = estimate_training(
        model, build_method("lora", ALL_LINEAR), BATCH, TrainingSetup(dtype=torch.float32)
    )
    assert found.counts is None
    assert "data-dependent" in found.memory.notes[0]
    assert found.memory.total_bytes == found.memory.least_bytes > 0
