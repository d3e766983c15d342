"""The trainer against transformers' own, and what only it does."""

import math
from dataclasses import replace

import pytest
import torch
from transformers import Trainer, TrainingArguments

import tiny_runs
from lorakit.adapters.attach import attach
from lorakit.adapters.spec import LoraSpec
from lorakit.data.collate import Collator
from lorakit.data.sampling import LengthGroupedSampler
from lorakit.data.sft import build_examples
from lorakit.data.sources import load_rows
from lorakit.errors import TrainingError
from lorakit.methods.lora import LoraMethod
from lorakit.models.load import load_model
from lorakit.train.callbacks import Cadence, FlowCallback, MetricsCallback
from lorakit.train.checkpoints import CheckpointStore
from lorakit.train.interrupt import Interrupt
from lorakit.train.metrics import MetricsLog
from lorakit.train.objectives.sft import SftObjective
from lorakit.train.steps import StepOptions, training_arguments
from lorakit.train.trainer import AdapterTrainer, TrainerParts

SPEC = LoraSpec(r=4, alpha=12, targets="all-linear")
OPTIONS = StepOptions(
    schedule="linear",
    num_warmup_steps=2,
    label_smoothing=0.0,
    bf16=False,
    patience=None,
    keep_best=True,
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny_runs.write_all(tmp_path_factory.mktemp("trainer"))


@pytest.fixture
def make(directory, tmp_path):
    """make(...): a trainer over the tiny model; `losses()` runs it and gives the loss per step."""

    def make_trainer(options=OPTIONS, *, spoil=None, validate=False, checkpoint=False, **train):
        config = tiny_runs.config(directory, **{"epochs": None, "max_steps": 6, **train})
        config = replace(config, output=str(tmp_path / "out"))
        model, tokenizer = load_model(config.model.ref)
        torch.manual_seed(3)
        method = LoraMethod(SPEC)
        method.attach(model)
        if checkpoint:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if spoil is not None:
            spoil(method.state(model))
        rows = load_rows(config.data.train)
        data = build_examples(rows, tokenizer, config.data)
        held = build_examples(load_rows(config.data.validation), tokenizer, config.data)
        parts = TrainerParts(
            objective=SftObjective(config, tokenizer),
            train=data,
            validation=held,
            collate=Collator(),
            sampler=LengthGroupedSampler(data.lengths, config.train.batch_size, seed=config.seed),
            origin=rows.origin,
            method=method,
            passport={},
            checkpoints=CheckpointStore(tmp_path / "checkpoints", keep=2),
            identity={},
        )
        steps = config.train.max_steps
        cadence = Cadence(max_steps=steps, eval_every=1 if validate else None, save_every=steps)
        callbacks = [
            FlowCallback(cadence, Interrupt()),
            MetricsCallback(MetricsLog(tmp_path / "metrics.jsonl")),
        ]
        return AdapterTrainer(
            model,
            training_arguments(config, steps),
            parts=parts,
            options=options,
            callbacks=callbacks,
        )

    return make_trainer


@pytest.fixture
def losses(tmp_path):
    def run(trainer):
        (tmp_path / "metrics.jsonl").unlink(missing_ok=True)
        trainer.train()
        lines = MetricsLog(tmp_path / "metrics.jsonl").read()
        return [line["loss"] for line in lines if "loss" in line]

    return run


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_losses_equal_those_of_transformers_own_trainer(
    make, losses, directory, tmp_path, smoothing
):
    ours = make(replace(OPTIONS, label_smoothing=smoothing))
    data, sampler, collate = ours.parts.train, ours.parts.sampler, ours.parts.collate
    found = losses(ours)

    order = [batch for epoch in (0, 1) for batch in sampler.batches(epoch)]
    model, _ = load_model(directory / "model")
    torch.manual_seed(3)
    attach(model, SPEC)
    rows = [
        {"input_ids": e.input_ids, "attention_mask": [1] * len(e), "labels": e.labels}
        for e in (data[i] for batch in order for i in batch)
    ]

    class InOrder(Trainer):
        def get_train_dataloader(self):
            # The very batches of two epochs, one after the other.
            starts = [sum(map(len, order[:i])) for i in range(len(order))]
            batches = [list(range(s, s + len(b))) for s, b in zip(starts, order, strict=True)]
            return torch.utils.data.DataLoader(
                rows, batch_sampler=batches, collate_fn=lambda _: _batch(collate, data, order, _)
            )

    arguments = TrainingArguments(
        output_dir=str(tmp_path / "theirs"),
        max_steps=6,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        learning_rate=0.01,
        warmup_steps=2,
        lr_scheduler_type="linear",
        label_smoothing_factor=smoothing,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
    )
    theirs = InOrder(model=model, args=arguments, train_dataset=rows)
    theirs.train()
    expected = [line["loss"] for line in theirs.state.log_history if "loss" in line]
    assert found == pytest.approx(expected, abs=1e-5)
    assert found[-1] < found[0] - 0.01


def _batch(collate, data, order, items):
    lookup = {tuple(example.input_ids): example for example in data}
    return collate([lookup[tuple(item["input_ids"])] for item in items])


def test_accumulated_batches_equal_one_big_batch(make, losses):
    small = make(batch_size=2, gradient_accumulation=11, max_steps=3)
    split = losses(small)
    big = losses(make(batch_size=22, gradient_accumulation=1, max_steps=3))
    assert split == pytest.approx(big, abs=1e-6)


def test_gradient_checkpointing_gives_the_same_losses(make, losses):
    plain = losses(make())
    assert losses(make(checkpoint=True)) == pytest.approx(plain, abs=1e-6)


def test_label_smoothing_is_in_training_and_not_in_validation(make, losses, tmp_path):
    plain = losses(make(validate=True, max_steps=1))
    before = MetricsLog(tmp_path / "metrics.jsonl").read()[-1]["eval_loss"]
    smooth = losses(make(replace(OPTIONS, label_smoothing=0.5), validate=True, max_steps=1))
    after = MetricsLog(tmp_path / "metrics.jsonl").read()[-1]["eval_loss"]
    # The first step has learning rate 0, so both validate the same weights.
    assert after == before
    assert smooth[0] != pytest.approx(plain[0], abs=1e-4)


def test_validation_loss_is_the_mean_over_all_labels(make):
    trainer = make()
    trainer.train()
    found = trainer.evaluate()
    model = trainer.adapter_model.eval()
    total, count = 0.0, 0
    for example in trainer.parts.validation:
        ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        kept = labels[0, 1:] != -100
        total += float(
            torch.nn.functional.cross_entropy(logits[kept], labels[0, 1:][kept], reduction="sum")
        )
        count += int(kept.sum())
    assert found["eval_tokens"] == count
    assert found["eval_loss"] == pytest.approx(total / count, abs=1e-5)


def test_a_loss_that_is_not_finite_stops_with_step_rows_and_checkpoint(make):
    def spoil(state):
        next(iter(state.values())).data.fill_(math.inf)

    with pytest.raises(TrainingError, match="the loss is not finite") as caught:
        make(spoil=spoil).train()
    assert "step 1, batch of" in caught.value.where
    assert "train.jsonl line" in caught.value.where
    assert "there is no checkpoint yet" in caught.value.remedy


def test_a_gradient_that_is_not_finite_stops_before_the_optimizer(make):
    trainer = make()
    state = trainer.parts.method.state(trainer.adapter_model)
    _name, parameter = next((n, p) for n, p in state.items() if n.endswith("lora_B"))
    parameter.register_hook(lambda gradient: gradient * math.nan)
    before = {n: p.detach().clone() for n, p in state.items()}
    with pytest.raises(TrainingError, match="the gradient is not finite"):
        trainer.train()
    for n, value in before.items():
        torch.testing.assert_close(state[n], value, rtol=0, atol=0)


def test_the_error_names_the_last_good_checkpoint(make, monkeypatch):
    trainer = make(validate=True)
    compute = AdapterTrainer.compute_loss

    def fails_later(self, *args, **kwargs):
        loss = compute(self, *args, **kwargs)
        return loss * math.nan if self.state.global_step == 3 else loss

    monkeypatch.setattr(AdapterTrainer, "compute_loss", fails_later)
    with pytest.raises(TrainingError, match="the loss is not finite") as caught:
        trainer.train()
    assert "step 4" in caught.value.where
    assert "step-0000000" in caught.value.remedy
