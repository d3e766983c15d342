"""One optimizer step as a config asks for it: what every way of training needs of it."""

from __future__ import annotations

import contextlib
import logging
import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.optimization import get_scheduler

from lorakit.data.sampling import LengthGroupedSampler
from lorakit.methods.base import Method
from lorakit.processes import Processes
from lorakit.train.callbacks import Cadence
from lorakit.train.config import TrainConfig
from lorakit.train.objectives.base import LOSS, ExampleSet


class _NotOurs(logging.Filter):
    """Holds back advice on how to start several processes: they are joined here."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a line is shown."""
        return "parallel_mode != ParallelMode.DISTRIBUTED" not in record.getMessage()


logging.getLogger("transformers.training_args").addFilter(_NotOurs())

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


@dataclass(frozen=True, slots=True)
class StepSums:
    """What a step has added up so far: loss, tokens without padding, rows."""

    loss: float = 0.0
    num_tokens: float = 0
    num_rows: float = 0

    def plus(self, loss: float, num_tokens: int, num_rows: int) -> StepSums:
        """With one more batch."""
        return StepSums(self.loss + loss, self.num_tokens + num_tokens, self.num_rows + num_rows)


def noted_by_all(noted: dict[str, float], num_rows: int, processes: Processes) -> dict[str, float]:
    """What a learner noted of a step: the mean over the processes, weighted by their rows."""
    if processes.alone:
        return noted
    told = [(rows, values) for rows, values in processes.gather((num_rows, noted)) if rows]
    found: dict[str, float] = {}
    for name in dict.fromkeys(name for _, values in told for name in values):
        known = [(rows, values[name]) for rows, values in told if name in values]
        found[name] = sum(rows * value for rows, value in known) / sum(rows for rows, _ in known)
    return found


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


def sampler_of(
    config: TrainConfig, examples: ExampleSet, num_processes: int = 1
) -> LengthGroupedSampler:
    """The order of a config's training examples, where so many processes each take a batch."""
    return LengthGroupedSampler(
        examples.lengths,
        config.train.batch_size,
        seed=config.seed,
        num_processes=num_processes,
        grouped=config.train.length_grouping,
    )


def steps_per_epoch(num_examples: int, batch_size: int, gradient_accumulation: int) -> int:
    """Optimizer steps in one pass over the data; the last one may have fewer batches.

    Args:
        num_examples: rows.
        batch_size: rows that all processes take together.
        gradient_accumulation: batches in a step.
    """
    return math.ceil(math.ceil(num_examples / batch_size) / gradient_accumulation)


class _PlacedArguments(TrainingArguments):
    """For a model that is where it belongs: parameters in shards cannot be moved."""

    @property
    def place_model_on_device(self) -> bool:
        """False."""
        return False


def training_arguments(
    config: TrainConfig, max_steps: int, *, placed: bool = False
) -> TrainingArguments:
    """Transformers' arguments for this config; logging, saving and validating are ours.

    Args:
        config: the run.
        max_steps: optimizer steps in all.
        placed: whether the model is on its device already and stays there.
    """
    options = config.train
    return (_PlacedArguments if placed else TrainingArguments)(
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
