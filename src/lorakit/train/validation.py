"""What validation finds, and the line that metrics.jsonl keeps of it."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from lorakit.processes import Processes
from lorakit.train.loaders import Batch, Collate, validation_batches
from lorakit.train.metrics import Line
from lorakit.train.objectives.base import ExampleSet, Inputs, Learner, Objective, Validated
from lorakit.train.steps import autocast


def validate(
    model: nn.Module,
    learner: Learner,
    batches: tuple[ExampleSet, Collate, int],
    move: Callable[[Batch], Inputs],
    *,
    bf16: bool,
    processes: Processes | None = None,
) -> tuple[Validated, float]:
    """The objective's mean loss, without label smoothing, and metrics over all rows.

    The model is in eval mode inside, and as it was afterwards.

    Args:
        model: with the method attached.
        learner: of that model.
        batches: the validation examples, how they become a batch, and rows per batch.
        move: puts a batch on the model's device.
        bf16: whether the forward pass is autocast to bfloat16.
        processes: those that share the rows; all of them find the same.

    Returns:
        What was found, and the seconds it took.
    """
    group = processes or Processes()
    started, was_training = time.perf_counter(), model.training
    device = next(model.parameters()).device
    model.eval()
    with torch.no_grad(), autocast(device, bf16=bf16):
        own = learner.observe(map(move, validation_batches(*batches, group)))
        if isinstance(model, FSDPModule):
            _keep_step(learner, batches, move, group)
    found = learner.conclude(group.gather(own))
    model.train(was_training)
    return found, time.perf_counter() - started


def _keep_step(
    learner: Learner,
    batches: tuple[ExampleSet, Collate, int],
    move: Callable[[Batch], Inputs],
    processes: Processes,
) -> None:
    """Processes that split the base call it equally often: look at a batch that does not count."""
    examples, collate, size = batches
    num_batches = -(-len(examples) // size)
    most = -(-num_batches // processes.num)
    if len(range(processes.rank, num_batches, processes.num)) < most:
        learner.observe([move(collate([examples[0]]))])


def validation_line(found: Validated, objective: Objective, seconds: float) -> Line:
    """The entries of a validation's line, step and epoch left out."""
    return {
        "eval_loss": found.loss,
        **{f"eval_{name}": value for name, value in found.metrics.items()},
        f"eval_{objective.unit}": found.num_items,
        "eval_s": seconds,
    }
