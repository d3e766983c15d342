"""One training run: check, plan, load, train, save, record."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel, TrainerCallback, set_seed

from lorakit.errors import RequestError
from lorakit.files import only_writer, require_free
from lorakit.layers.rms_norm import use_fast_norms
from lorakit.methods.base import Method, TrainableReport
from lorakit.models.checkpointing import checkpoint_activations
from lorakit.models.fast_layers import use_fast_layers
from lorakit.progress import progress
from lorakit.train.base import LoadedBase, load_base
from lorakit.train.callbacks import (
    FlowCallback,
    MetricsCallback,
    ProgressCallback,
    TensorBoardCallback,
    TimeCallback,
    require_tensorboard,
)
from lorakit.train.checkpoints import Checkpoint, load_state
from lorakit.train.config import TrainConfig
from lorakit.train.course import Course, TrainResult
from lorakit.train.data_start import (
    first_batches,
    keep_ranks,
    ranks_from_data,
    start_from_data,
)
from lorakit.train.interrupt import Interrupt, TrainingPaused
from lorakit.train.moving_ranks import moving_ranks_of
from lorakit.train.objectives.registry import best_metric
from lorakit.train.prepare import Preparation, prepare
from lorakit.train.record import Clock, WarningLog
from lorakit.train.resume import (
    check_same_base,
    check_same_run,
    find_start,
)
from lorakit.train.steps import sampler_of, step_options, training_arguments
from lorakit.train.trainer import AdapterTrainer, TrainerParts

Say = Callable[[str], None]


def say_on_stderr(line: str) -> None:
    """Print one line where progress goes."""
    print(line, file=sys.stderr, flush=True)


def train(config: TrainConfig, *, resume: bool = False, say: Say = say_on_stderr) -> TrainResult:
    """Train what the config asks for, and leave adapter/, run.json, metrics.jsonl, checkpoints/.

    The result depends on the config alone (on one machine, CPU), also after a kill and a resume,
    unless `train.max_minutes` ends the run by the clock. A resumed run may change only what
    `resume.MAY_CHANGE` lists.

    Args:
        config: the run.
        resume: go on from the newest whole checkpoint in the output directory.
        say: takes each line that tells the user what is planned and done.

    Raises:
        RequestError: what is asked for cannot be (see the kinds in `lorakit.errors`); nothing was
            written.
        TrainingError: a loss or gradient that is not finite.
        TrainingPaused: Ctrl-C or SIGTERM; a checkpoint was written.
    """
    _require_one_process()
    if config.train.tensorboard:
        require_tensorboard()
    clock = Clock()
    with WarningLog() as warned:
        start = find_start(config, resume=resume)
        prepared = prepare(config)
        for line in prepared.lines(config):
            say(line)
        run = _Run(config, prepared, start, say)
        if start is not None:
            check_same_run(start, run.course.identity)
            say(f"resuming from step {start.step} of {prepared.max_steps}")
        run.load()
        clock.mark("load_s")
        if start is None:
            require_free(config.output)
        with only_writer(config.output):
            run.fit()
            clock.mark("train_s")
            return run.finish(clock, warned.messages)


def _require_one_process() -> None:
    """Refuse what a launcher of several processes started.

    Rows, steps and checkpoints are counted for one process; in several, each would train on all
    rows and write over the others' files.
    """
    num_processes = os.environ.get("WORLD_SIZE", "1")
    if num_processes not in ("", "0", "1"):
        raise RequestError(
            "training in several processes is not in this version",
            where="the environment, WORLD_SIZE",
            expected="one process",
            found=num_processes,
            remedy="start it without torchrun or accelerate launch: lorakit train CONFIG.yaml",
        )


class _Run:
    """The run between its checks and its result."""

    def __init__(
        self, config: TrainConfig, prepared: Preparation, start: Checkpoint | None, say: Say
    ) -> None:
        self.config = config
        self.prepared = prepared
        self.start = start
        self.say = say
        self.method: Method = config.make_method(prepared.beside)
        self.course = Course(config, prepared, start, self.method)
        self.store = self.course.store
        # Set by load() and fit().
        self.base: LoadedBase
        self.model: PreTrainedModel
        self.report: TrainableReport

    def load(self) -> None:
        """Load the base and attach the adapter."""
        self.base = load_base(self.config, self.prepared)
        self.model = self.base.model
        if self.base.quantization is not None:
            self.say(f"base in {self.base.quantization}")
        if self.start is not None:
            check_same_base(self.start, self.base.sha256)
        self.course.note_base(self.base)
        self._choose_ranks()
        set_seed(self.config.seed)
        self.report = self.method.attach(self.model)
        use_fast_norms(self.model)
        use_fast_layers(self.model)
        if self.start is None:
            self._start_from_data()
        if self.config.train.gradient_checkpointing:
            checkpoint_activations(self.model)
        self.prepared = self.prepared.with_model(self.model, self.method, self.base.sha256)
        self.course.prepared = self.prepared

    def _choose_ranks(self) -> None:
        """Ranks that the data decides; a resumed run takes those it was begun with."""
        if self.start is not None:
            keep_ranks(self.method, self.start.adapter)
            return
        chosen = ranks_from_data(self.method, self.model, self._first_batches())
        if chosen is not None:
            ranks = chosen.ranks.values()
            self.say(
                f"lora.ranks: {self.config.lora.ranks} has looked at {chosen.num_batches} batches: "
                f"ranks {min(ranks)} to {max(ranks)}"
            )

    def _first_batches(self) -> Iterator[Any]:
        return first_batches(
            self.prepared.data.train,
            self.prepared.objective.collate,
            num_batches=self.config.train.init_batches,
            batch_size=self.config.train.batch_size,
            seed=self.config.seed,
        )

    def _start_from_data(self) -> None:
        seen = start_from_data(self.method, self.model, self._first_batches())
        if seen:
            self.say(f"lora.init: {self.config.lora.init} has looked at {seen} batches")

    def fit(self) -> None:
        """Train from the start or the checkpoint to the end; the adapter stays in the model."""
        self.course.open()
        if self.start is not None and self.course.is_over(self.start):
            # Trainer would take one more step before it looks at the number of steps.
            load_state(self.method, self.model, self.start.path)
            self.say(f"the run is over: nothing is left to train after step {self.start.step}")
            return
        done = 0 if self.start is None else self.start.step
        with ExitStack() as stack:
            bar = stack.enter_context(progress("training", self.prepared.max_steps))
            if done:
                bar.advance(done)
            interrupt = stack.enter_context(Interrupt())
            callbacks: list[TrainerCallback] = [
                FlowCallback(self.course.cadence, interrupt),
                MetricsCallback(self.course.metrics),
                ProgressCallback(bar),
            ]
            if self.config.train.max_minutes is not None:
                limit_s = 60 * self.config.train.max_minutes
                spent_s = self.course.state.busy_s
                callbacks.insert(1, TimeCallback(limit_s, self.course.cadence, spent_s))
            if self.config.train.tensorboard:
                board = TensorBoardCallback(self.course.directory / "tensorboard", done)
                stack.callback(board.close)
                callbacks.append(board)
            trainer = self._trainer(callbacks)
            state = self.course.state
            trainer.run_state = replace(
                state, num_sessions=state.num_sessions + (self.start is not None)
            )
            try:
                trainer.train(
                    resume_from_checkpoint=None if self.start is None else str(self.start.path)
                )
            except KeyboardInterrupt as error:
                raise self._paused(self.store.last()) from error
            self.course.state = trainer.run_state
            last = self.store.last()
            if interrupt.requested and (last is None or not self.course.is_over(last)):
                raise self._paused(last)

    def finish(self, clock: Clock, warned: list[str]) -> TrainResult:
        """Save the final adapter and the record."""
        facts = {"timing": clock.seconds(), "warnings": warned}
        result = self.course.finish(self.model, self.report, facts)
        step = result.record["metrics"]["final"]["step"]
        self.say(f"adapter of step {step} saved in {result.adapter}")
        return result

    def _paused(self, last: Checkpoint | None) -> TrainingPaused:
        command = shlex.join(
            ["lorakit", "train", str(self.course.directory / "config.yaml"), "--resume"]
        )
        if last is None:
            return TrainingPaused(
                "stopped before the first checkpoint",
                where=str(self.course.directory),
                remedy="remove the directory and start the run again",
            )
        return TrainingPaused(
            f"stopped after step {last.step} of {self.prepared.max_steps}, which is saved",
            where=str(last.path),
            remedy=f"go on with: {command}",
        )

    def _trainer(self, callbacks: list[TrainerCallback]) -> AdapterTrainer:
        config, data = self.config, self.prepared.data
        max_steps = self.prepared.max_steps
        steps = step_options(
            config,
            max_steps=max_steps,
            bf16=self.prepared.bf16,
            best_metric=best_metric(config, self.prepared.objective),
        )
        parts = TrainerParts(
            objective=self.prepared.objective,
            train=data.train,
            validation=data.validation,
            collate=self.prepared.objective.collate,
            sampler=sampler_of(config, data.train),
            origin=data.train_rows.origin,
            method=self.method,
            passport=self.course.passport,
            checkpoints=self.store,
            identity=self.course.identity,
            saves_method=not self.prepared.trains_all,
            fresh=self.start is None,
            ranks=moving_ranks_of(self.method, self.model, config.adalora, max_steps),
        )
        return AdapterTrainer(
            self.model,
            training_arguments(config, max_steps),
            parts=parts,
            options=steps,
            callbacks=callbacks,
        )
