"""One optimizer step as a config asks for it: what every way of training needs of it."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.optimization import get_scheduler

from lorakit.data.sampling import LengthGroupedSampler
from lorakit.methods.base import Method
from lorakit.train.callbacks import Cadence
from lorakit.train.config import TrainConfig
from lorakit.train.objectives.base import LOSS, ExampleSet

# The names of transformers.
_OPTIMIZERS = {"adamw": TrainingArguments.default_optim, "paged_adamw": "paged_adamw_32bit"}


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """How the trainer takes a step, beyond transformers' TrainingArguments.

    Attributes:
        schedule: name of the learning-rate schedule.
        num_warmup_steps: steps over which the rate rises.
        label_smoothing: share of the target spread over the vocabulary.
        bf16: autocast the forward pass to bfloat16.
        patience: validations without a new best before the run stops, None never.
        keep_best: write a checkpoint at every new best.
        best_metric: what decides it: "loss", or a metric of the objective.
    """

    schedule: str
    num_warmup_steps: int
    label_smoothing: float
    bf16: bool
    patience: int | None
    keep_best: bool
    best_metric: str = LOSS


def step_options(
    config: TrainConfig, *, max_steps: int, bf16: bool, best_metric: str
) -> StepOptions:
    """The options of a config's steps, where its number of steps is known."""
    options = config.train
    return StepOptions(
        schedule=options.schedule,
        num_warmup_steps=options.warmup_steps or round(options.warmup_ratio * max_steps),
        label_smoothing=options.label_smoothing,
        bf16=bf16,
        patience=options.early_stopping_patience,
        keep_best=options.keep_best,
        best_metric=best_metric,
    )


def cadence_of(config: TrainConfig, *, steps_per_epoch: int, max_steps: int) -> Cadence:
    """When a config validates and writes checkpoints."""
    options = config.train
    eval_every = steps_per_epoch if options.eval_every == "epoch" else options.eval_every
    return Cadence(
        max_steps=max_steps,
        eval_every=eval_every if config.validates else None,
        save_every=steps_per_epoch if options.save_every == "epoch" else options.save_every,
    )


def sampler_of(config: TrainConfig, examples: ExampleSet) -> LengthGroupedSampler:
    """The order of a config's training examples."""
    return LengthGroupedSampler(
        examples.lengths,
        config.train.batch_size,
        seed=config.seed,
        grouped=config.train.length_grouping,
    )


def steps_per_epoch(num_examples: int, batch_size: int, gradient_accumulation: int) -> int:
    """Optimizer steps in one pass over the data; the last one may have fewer batches."""
    return math.ceil(math.ceil(num_examples / batch_size) / gradient_accumulation)


def training_arguments(config: TrainConfig, max_steps: int) -> TrainingArguments:
    """Transformers' arguments for this config; logging, saving and validating are ours."""
    options = config.train
    return TrainingArguments(
        output_dir=config.output,
        max_steps=max_steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.eval_batch_size or options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation,
        learning_rate=options.lr,
        weight_decay=options.weight_decay,
        adam_beta1=options.adam_betas[0],
        adam_beta2=options.adam_betas[1],
        adam_epsilon=options.adam_eps,
        max_grad_norm=options.max_grad_norm or 0.0,
        optim=_OPTIMIZERS[options.optimizer],
        seed=config.seed,
        save_strategy="no",
        eval_strategy="no",
        logging_strategy="no",
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


def build_optimizer(
    model: nn.Module, method: Method, args: TrainingArguments
) -> torch.optim.Optimizer:
    """The method's groups, each split by whether transformers would decay the parameter."""
    # A method of Trainer that asks nothing of its trainer.
    decayed = set(Trainer.get_decay_parameter_names(cast(Any, None), model))
    decay = {id(p) for name, p in model.named_parameters() if name in decayed}
    groups: list[dict[str, Any]] = []
    for group in method.param_groups(model, args.learning_rate):
        for weight_decay, is_decayed in ((args.weight_decay, True), (0.0, False)):
            chosen = [p for p in group["params"] if (id(p) in decay) == is_decayed]
            if chosen:
                groups.append({**group, "params": chosen, "weight_decay": weight_decay})
    kind, options = Trainer.get_optimizer_cls_and_kwargs(args, cast(Any, model))
    return kind(groups, **options)


def build_scheduler(options: StepOptions, optimizer: Any, max_steps: int) -> Any:
    """Warmup, then the schedule, over all steps of the run."""
    name = options.schedule
    return get_scheduler(
        "constant_with_warmup" if name == "constant" else name,
        optimizer=optimizer,
        num_warmup_steps=options.num_warmup_steps,
        num_training_steps=max_steps,
    )


def autocast(device: torch.device, *, bf16: bool) -> contextlib.ExitStack:
    """Autocast to bfloat16 when asked: the one place where precision is decided."""
    stack = contextlib.ExitStack()
    if bf16:
        stack.enter_context(torch.autocast(device.type, dtype=torch.bfloat16))
    return stack
