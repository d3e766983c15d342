"""One training run: check, plan, load, train, save, record."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import PreTrainedModel, TrainerCallback, set_seed

from lorakit.files import only_writer, require_free
from lorakit.layers.rms_norm import use_fast_norms
from lorakit.methods.base import Method, TrainableReport
from lorakit.models.checkpointing import checkpoint_activations, return_freed_memory
from lorakit.models.fast_layers import use_fast_layers
from lorakit.processes import Processes, processes
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
from lorakit.train.combine import require_processes
from lorakit.train.config import TrainConfig
from lorakit.train.course import Course, TrainResult
from lorakit.train.data_start import (
    first_batches,
    keep_ranks,
    ranks_from_data,
    start_from_data,
)
from lorakit.train.deepspeed import deepspeed_asked
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
from lorakit.train.sharded import Sharding, in_turn, shard_base, sharding_asked
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

    Started by a launcher in several processes, all of them call it with the same config; the first
    one speaks and writes, and all get its result.

    Args:
        config: the run.
        resume: go on from the newest whole checkpoint in the output directory; from the first
            step where a kill came before one.
        say: takes each line that tells the user what is planned and done.

    Raises:
        RequestError: what is asked for cannot be (see the kinds in `lorakit.errors`); nothing was
            written.
        TrainingError: a loss or gradient that is not finite.
        TrainingPaused: Ctrl-C or SIGTERM; a checkpoint was written.
        FailedElsewhereError: another process of several failed, and says why.
    """
    clock = Clock()
    with processes() as group, WarningLog(show=group.is_first) as warned:
        run = group.everywhere(lambda: _prepared_run(config, group, resume=resume, say=say))
        run.load_everywhere()
        clock.mark("load_s")
        with ExitStack() as stack:
            group.on_first(lambda: run.take_directory(stack))
            run.fit()
            clock.mark("train_s")
            told = dict.fromkeys(text for texts in group.gather(warned.messages) for text in texts)
            return group.on_first(lambda: run.finish(clock, list(told)))


def _prepared_run(config: TrainConfig, group: Processes, *, resume: bool, say: Say) -> _Run:
    """The run with everything checked that can be before anything is loaded."""
    asked = deepspeed_asked(config, group)
    sharding = sharding_asked(group) if asked is None else asked.sharding
    require_processes(config, group, sharded=sharding is not None)
    if config.train.tensorboard:
        require_tensorboard()
    start = find_start(config, resume=resume)
    prepared = prepare(config, processes=group, sharded=sharding is not None)
    run = _Run(config, prepared, start, say if group.is_first else _silent, group)
    run.sharding = sharding
    run.resumes = resume
    for line in (*prepared.lines(config), *(asked.notes if asked else ())):
        run.say(line)
    if start is not None:
        check_same_run(start, run.course.identity)
        run.say(f"resuming from step {start.step} of {prepared.max_steps}")
    elif resume:
        run.say("no checkpoint was reached before: beginning at the first step")
    return run


def _silent(line: str) -> None:
    """Another process says it."""


class _Run:
    """The run between its checks and its result."""

    def __init__(
        self,
        config: TrainConfig,
        prepared: Preparation,
        start: Checkpoint | None,
        say: Say,
        group: Processes,
    ) -> None:
        self.group = group
        self.sharding: Sharding | None = None
        self.resumes = False
        self._mesh: DeviceMesh | None = None
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

    def load_everywhere(self) -> None:
        """Load in each process, so that all of them begin with the first one's numbers."""
        if self.sharding is None:
            self.group.everywhere(self.load)
        else:
            self._mesh = init_device_mesh(self.prepared.device.type, (self.group.num,))
            in_turn(self.group, self.load)
            self.say(f"the base is split over {self.group.num} processes (FSDP2)")
        self.group.copy_first(list(self.method.state(self.model).values()))

    def load(self) -> None:
        """Load the base and attach the adapter; keep a share of the base where it is split."""
        device = None if self.sharding is None else torch.device("cpu")
        self.base = load_base(self.config, self.prepared, device)
        self.model = self.base.model
        if self.base.quantization is not None:
            self.say(f"base in {self.base.quantization}")
        if self.start is not None:
            check_same_base(self.start, self.base.sha256)
        self.course.note_base(self.base)
        self._choose_ranks()
        set_seed(self.config.seed)
        self.report = self.method.attach(self.model)
        if self.sharding is None:
            # These read weights of the base behind its modules' backs.
            use_fast_norms(self.model)
            use_fast_layers(self.model)
        if self.start is None:
            self._start_from_data()
        if self.config.train.gradient_checkpointing:
            checkpoint_activations(self.model)
            return_freed_memory(self.prepared.device)
        self.prepared = self.prepared.with_model(self.model, self.method, self.base.sha256)
        self.course.prepared = self.prepared
        if self.sharding is not None and self._mesh is not None:
            shard_base(self.model, self._mesh, self.sharding, self.prepared.device)

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
            batch_size=self.config.train.batch_size * self.group.num,
            seed=self.config.seed,
        )

    def _start_from_data(self) -> None:
        seen = start_from_data(self.method, self.model, self._first_batches())
        if seen:
            self.say(f"lora.init: {self.config.lora.init} has looked at {seen} batches")

    def take_directory(self, stack: ExitStack) -> None:
        """Make the output directory this run's own until the stack is left.

        Raises:
            OutputError: it is not free, or another run writes there.
        """
        if not self.resumes:
            require_free(self.config.output, past_killed=True)
        stack.enter_context(only_writer(self.config.output))
        self.course.open()

    def fit(self) -> None:
        """Train from the start or the checkpoint to the end; the adapter stays in the model."""
        if self.start is not None and self.course.is_over(self.start):
            # Trainer would take one more step before it looks at the number of steps.
            load_state(self.method, self.model, self.start.path)
            self.say(f"the run is over: nothing is left to train after step {self.start.step}")
            return
        done = 0 if self.start is None else self.start.step
        with ExitStack() as stack:
            interrupt = stack.enter_context(Interrupt(insists=self.group.alone))
            trainer = self._trainer(self._callbacks(stack, interrupt, done))
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
            requested = self.group.any(interrupt.requested)
            if requested and (last is None or not self.course.is_over(last)):
                raise self.group.shared(self._paused(last))

    def _callbacks(
        self, stack: ExitStack, interrupt: Interrupt, done: int
    ) -> list[TrainerCallback]:
        """What happens around the steps; only the first process shows and writes it."""
        course, group = self.course, self.group
        callbacks: list[TrainerCallback] = [FlowCallback(course.cadence, interrupt, group)]
        if self.config.train.max_minutes is not None:
            limit_s = 60 * self.config.train.max_minutes
            spent_s = course.state.busy_s
            callbacks.append(TimeCallback(limit_s, course.cadence, spent_s, group))
        if not group.is_first:
            return callbacks
        bar = stack.enter_context(progress("training", self.prepared.max_steps))
        if done:
            bar.advance(done)
        callbacks += [MetricsCallback(course.metrics), ProgressCallback(bar)]
        if self.config.train.tensorboard:
            board = TensorBoardCallback(course.directory / "tensorboard", done)
            stack.callback(board.close)
            callbacks.append(board)
        return callbacks

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
            sampler=sampler_of(config, data.train, self.group.num),
            origin=data.train_rows.origin,
            method=self.method,
            passport=self.course.passport,
            checkpoints=self.store,
            identity=self.course.identity,
            saves_method=not self.prepared.trains_all,
            fresh=self.start is None,
            ranks=moving_ranks_of(self.method, self.model, config.adalora, max_steps),
            processes=self.group,
        )
        return AdapterTrainer(
            self.model,
            training_arguments(config, max_steps, placed=self.sharding is not None),
            parts=parts,
            options=steps,
            callbacks=callbacks,
        )
