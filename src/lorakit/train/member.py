"""One adapter that trains beside others on one base: its rows, its optimizer, its files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel, set_seed

from lorakit.adapters.attach import use
from lorakit.methods.base import TrainableReport
from lorakit.train.base import LoadedBase
from lorakit.train.checkpoints import Checkpoint, load_state, save_state
from lorakit.train.config import TrainConfig
from lorakit.train.course import ADAPTER, Course, TrainResult
from lorakit.train.loaders import Batch
from lorakit.train.objectives.base import LOSS, Inputs, Learner
from lorakit.train.objectives.registry import best_metric
from lorakit.train.prepare import Preparation
from lorakit.train.resume import check_same_base, check_same_run
from lorakit.train.steps import (
    build_optimizer,
    build_scheduler,
    sampler_of,
    step_options,
    training_arguments,
)
from lorakit.train.validation import validate, validation_line

_OPTIMIZER, _SCHEDULER = "optimizer.pt", "scheduler.pt"


class Member:
    """One run of several that share their forward passes, equal to `train` of its config.

    It has its own rows in their own order, the divisor of its loss, clipping, optimizer, schedule,
    validation, checkpoints and record; only the base's products are made for all.

    Args:
        config: the run.
        prepared: the same, prepared.
        adapter: its name on the model. A neutral one: transformers decides by name what decays.
        start: the checkpoint it goes on from, or None.
        resumed: whether going on from there is a session of its own.

    Attributes:
        step: optimizer steps taken.
        failed: why it cannot go on, or None.
        loss: of the last step.
    """

    def __init__(
        self,
        config: TrainConfig,
        prepared: Preparation,
        *,
        adapter: str,
        start: Checkpoint | None,
        resumed: bool = True,
    ) -> None:
        self.config = config
        self.prepared = prepared
        self.adapter = adapter
        self.method = config.make_method(prepared.beside, name=adapter)
        self.course = Course(config, prepared, start, self.method)
        if start is not None:
            check_same_run(start, self.course.identity)
            if resumed:
                self._again()
        self.step = 0 if start is None else start.step
        self.failed: str | None = None
        self.loss = math.nan
        self._saved = self.step
        self._epoch = 0.0
        self.options = step_options(
            config,
            max_steps=prepared.max_steps,
            bf16=prepared.bf16,
            best_metric=best_metric(config, prepared.objective),
        )
        self._sampler = sampler_of(config, prepared.data.train)
        self._order: tuple[int, list[list[int]]] = (-1, [])
        # Set by attach() and make_ready().
        self._model: PreTrainedModel
        self._learned: list[Tensor]
        self._report: TrainableReport
        self._optimizer: torch.optim.Optimizer
        self._scheduler: Any

    def _again(self) -> None:
        state = self.course.state
        self.course.state = replace(state, num_sessions=state.num_sessions + 1)

    @property
    def over(self) -> bool:
        """Whether nothing is left to train."""
        ended = self.step >= self.prepared.max_steps or self.course.state.stopped_early
        return ended or self.failed is not None

    # On the model

    def attach(self, base: LoadedBase) -> None:
        """Put the adapter on the model, as its run alone would start or stand; mutates the model.

        Raises:
            BaseMismatchError: the checkpoint was trained on another base.
        """
        start = self.course.start
        if start is not None:
            check_same_base(start, base.sha256)
        self.course.note_base(base)
        self._model = base.model
        set_seed(self.config.seed)
        self._report = self.method.attach(base.model)
        state = self.method.state(base.model)
        self._learned = [tensor for tensor in state.values() if tensor.requires_grad]
        if start is not None:
            load_state(self.method, base.model, start.path)

    def make_ready(self) -> None:
        """Let the adapter learn again, once the others are attached too, and make its optimizer."""
        for tensor in self._learned:
            tensor.requires_grad_(True)
        args = training_arguments(self.config, self.prepared.max_steps)
        self._optimizer = build_optimizer(self._model, self.method, args)
        self._scheduler = build_scheduler(self.options, self._optimizer, self.prepared.max_steps)
        start = self.course.start
        if start is not None:
            device = self._model.device
            for part, name in ((self._optimizer, _OPTIMIZER), (self._scheduler, _SCHEDULER)):
                saved = torch.load(start.path / name, map_location=device, weights_only=True)
                part.load_state_dict(saved)

    # Steps

    def batches(self) -> list[list[Any]]:
        """The examples of each forward pass of the next step."""
        epoch, done = divmod(self.step, self.prepared.steps_per_epoch)
        if self._order[0] != epoch:
            self._order = epoch, self._sampler.batches(epoch)
        each, train = self.config.train.gradient_accumulation, self.prepared.data.train
        chosen = self._order[1][done * each : (done + 1) * each]
        return [[train[i] for i in rows] for rows in chosen]

    def num_items(self, batches: Sequence[Sequence[Any]]) -> Tensor:
        """What the summed loss of a step is divided by: int64 scalar."""
        objective = self.prepared.objective
        counts = [objective.num_items(objective.collate(batch)) for batch in batches]
        return torch.stack(counts).sum().clamp(min=1)

    def take_step(self, loss: float, batches: Sequence[Sequence[Any]], seconds: float) -> None:
        """Clip, step and note it; a loss or gradient that is not finite ends this run alone.

        Args:
            loss: of the step.
            batches: its examples.
            seconds: its share of the time.
        """
        self.loss = loss
        norm = float(clip_grad_norm_(self._learned, self.config.train.max_grad_norm or math.inf))
        if not math.isfinite(loss) or not math.isfinite(norm):
            what, found = ("gradient", norm) if math.isfinite(loss) else ("loss", loss)
            self.fail(f"the {what} is not finite ({found}) at step {self.step + 1}")
            return
        lr = float(self._scheduler.get_last_lr()[0])
        self._optimizer.step()
        self._scheduler.step()
        self._optimizer.zero_grad()
        epoch, done = divmod(self.step, self.prepared.steps_per_epoch)
        self.step += 1
        num_tokens = sum(len(example) for batch in batches for example in batch)
        self.course.state = self.course.state.after_step(
            num_tokens, sum(map(len, batches)), seconds
        )
        each = self.config.train.gradient_accumulation
        self._epoch = epoch + (done * each + len(batches)) / len(self._order[1])
        line = {
            "step": self.step,
            "epoch": self._epoch,
            "loss": loss,
            "grad_norm": norm,
            "lr": lr,
            "num_tokens": num_tokens,
            "step_s": seconds,
        }
        self.course.metrics.append(line)

    def fail(self, why: str) -> None:
        """End this run; its gradients are forgotten."""
        self.failed = why
        for tensor in self._learned:
            tensor.grad = None

    def after_step(self, learner: Learner) -> None:
        """Validate and write a checkpoint where the config says so after this step."""
        cadence, is_best = self.course.cadence, False
        if cadence.evaluates(self.step):
            is_best = self._validate(learner)
        keeps = is_best and self.options.keep_best
        ends = self.course.state.stopped_early
        if self.failed is None and (cadence.saves(self.step) or keeps or ends):
            self.save()

    def _validate(self, learner: Learner) -> bool:
        """Measure on the validation rows; whether that is the best so far."""
        validation = self.prepared.data.validation
        if validation is None:
            return False
        objective, options = self.prepared.objective, self.config.train
        size = options.eval_batch_size or options.batch_size
        with use(self._model, self.adapter):
            found, seconds = validate(
                self._model,
                learner,
                (validation, objective.collate, size),
                self.on_device,
                bf16=self.options.bf16,
            )
        if not math.isfinite(found.loss):
            self.fail(f"the validation loss is not finite ({found.loss}) at step {self.step}")
            return False
        by = self.options.best_metric
        score = None if by == LOSS else found.metrics[by]
        self.course.state = self.course.state.after_evaluation(
            self.step, found.loss, self.options.patience, score=score
        )
        found_line = validation_line(found, objective, seconds)
        self.course.metrics.append({"step": self.step, "epoch": self._epoch, **found_line})
        return self.course.state.best_step == self.step

    def on_device(self, batch: Batch) -> Inputs:
        """The batch where the model is."""
        return {name: value.to(self._model.device) for name, value in batch.items()}

    # What it leaves

    def save_once(self) -> None:
        """Write a checkpoint of this step, if there is none yet."""
        if self._saved != self.step:
            self.save()

    def save(self) -> None:
        """Write a checkpoint of this step."""
        course, self._saved = self.course, self.step
        with course.store.write(self.step, course.state, course.identity) as staging:
            save_state(self.method, self._model, staging)
            self.method.save(self._model, staging / ADAPTER, course.passport)
            torch.save(self._optimizer.state_dict(), staging / _OPTIMIZER)
            torch.save(self._scheduler.state_dict(), staging / _SCHEDULER)

    def finish(self, *, beside: int, warned: list[str]) -> TrainResult:
        """Save the adapter and the record; mutates the adapter where an earlier one was better.

        Args:
            beside: how many other runs may have shared the process's batches.
            warned: for the record.
        """
        timing = {"total_s": self.course.state.busy_s}
        facts = {"timing": timing, "warnings": warned, "beside": beside}
        return self.course.finish(self._model, self._report, facts)
