"""One training run: check, plan, load, train, save, record."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainerCallback, TrainingArguments, set_seed

from lorakit.adapters.fingerprint import fingerprint
from lorakit.data.sampling import LengthGroupedSampler
from lorakit.environment import memory_bytes
from lorakit.errors import RequestError, TrainingError
from lorakit.files import only_writer, require_free, write_json, write_text
from lorakit.layers.rms_norm import use_fast_norms
from lorakit.methods.base import Method, TrainableReport
from lorakit.models.attention import use_attention
from lorakit.models.checkpointing import checkpoint_activations
from lorakit.models.fast_layers import use_fast_layers
from lorakit.models.nf4 import Quantization, quantization_of
from lorakit.progress import progress
from lorakit.train.callbacks import (
    Cadence,
    FlowCallback,
    MetricsCallback,
    ProgressCallback,
    TensorBoardCallback,
    require_tensorboard,
)
from lorakit.train.checkpoints import Checkpoint, CheckpointStore, RunState, load_state
from lorakit.train.config import TrainConfig
from lorakit.train.data_start import (
    first_batches,
    keep_ranks,
    ranks_from_data,
    start_from_data,
)
from lorakit.train.interrupt import Interrupt, TrainingPaused
from lorakit.train.metrics import MetricsLog
from lorakit.train.objectives.registry import best_metric
from lorakit.train.prepare import Preparation, prepare
from lorakit.train.record import Clock, WarningLog, passport, run_record
from lorakit.train.resume import (
    CHECKPOINTS,
    check_same_base,
    check_same_run,
    find_start,
    identity,
)
from lorakit.train.trainer import AdapterTrainer, StepOptions, TrainerParts

Say = Callable[[str], None]

# The names of transformers.
_OPTIMIZERS = {"adamw": TrainingArguments.default_optim, "paged_adamw": "paged_adamw_32bit"}


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a finished run left.

    Attributes:
        directory: the run's directory.
        adapter: what was learned, with its passport: PEFT's layout for LoRA, see docs/files.md.
        record: what run.json says.
    """

    directory: Path
    adapter: Path
    record: dict[str, Any]


def say_on_stderr(line: str) -> None:
    """Print one line where progress goes."""
    print(line, file=sys.stderr, flush=True)


def train(config: TrainConfig, *, resume: bool = False, say: Say = say_on_stderr) -> TrainResult:
    """Train what the config asks for, and leave adapter/, run.json, metrics.jsonl, checkpoints/.

    The result depends on the config alone (on one machine, CPU), also after a kill and a resume.
    A resumed run may change only what `resume.MAY_CHANGE` lists.

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
            check_same_run(start, run.identity)
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
        self.identity = identity(config, prepared)
        self.directory = Path(config.output)
        self.store = CheckpointStore(
            self.directory / CHECKPOINTS,
            keep=config.train.keep_checkpoints,
            keep_best=config.train.keep_best,
        )
        self.metrics = MetricsLog(self.directory / "metrics.jsonl")
        self.method: Method = config.make_method(prepared.beside)
        self.passport = passport(config, prepared)
        # Set by load() and fit().
        self.model: PreTrainedModel
        self.process_bytes: int
        self.loaded_bytes: int
        self.report: TrainableReport
        self.quantization: Quantization | None = None
        self.state = RunState() if start is None else start.state

    def load(self) -> None:
        """Load the base and attach the adapter."""
        self.process_bytes = memory_bytes()
        base = self.config.model
        self.model = self.prepared.objective.load_model(self.prepared.dtype)
        self.quantization = quantization_of(self.model)
        if self.quantization is not None:
            self.say(f"base in {self.quantization}")
            self.passport["quantization"] = self.quantization.to_json()
        if base.attention is not None:
            use_attention(self.model, base.attention)
        self.loaded_bytes = memory_bytes()
        base_sha256 = fingerprint(self.model).sha256
        if self.start is not None:
            check_same_base(self.start, base_sha256)
        self.identity["base_sha256"] = base_sha256
        self._choose_ranks()
        set_seed(self.config.seed)
        self.report = self.method.attach(self.model)
        use_fast_norms(self.model)
        use_fast_layers(self.model)
        if self.start is None:
            self._start_from_data()
        if self.config.train.gradient_checkpointing:
            checkpoint_activations(self.model)
        self.prepared = self.prepared.with_model(self.model, self.method, base_sha256)

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
        write_text(self.directory / "config.yaml", self.config.to_yaml())
        self.store.clean()
        self.metrics.cut_after(0 if self.start is None else self.start.step)
        if self.start is not None and self._is_over(self.start):
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
                FlowCallback(self._cadence(), interrupt),
                MetricsCallback(self.metrics),
                ProgressCallback(bar),
            ]
            if self.config.train.tensorboard:
                board = TensorBoardCallback(self.directory / "tensorboard", done)
                stack.callback(board.close)
                callbacks.append(board)
            trainer = self._trainer(callbacks)
            trainer.run_state = replace(
                self.state, num_sessions=self.state.num_sessions + (self.start is not None)
            )
            try:
                trainer.train(
                    resume_from_checkpoint=None if self.start is None else str(self.start.path)
                )
            except KeyboardInterrupt as error:
                raise self._paused(self.store.last()) from error
            self.state = trainer.run_state
            last = self.store.last()
            if interrupt.requested and (last is None or not self._is_over(last)):
                raise self._paused(last)

    def finish(self, clock: Clock, warned: list[str]) -> TrainResult:
        """Save the final adapter and the record."""
        last = self.store.last()
        if last is None:
            raise TrainingError("no checkpoint was written", where=str(self.store.directory))
        chosen = last.step
        if self.config.train.keep_best and self.state.best_step is not None:
            chosen = self.state.best_step
            load_state(self.method, self.model, self.store.require(chosen).path)
        lines = self.metrics.read()
        validated = next((n for n in lines if n["step"] == chosen and "eval_loss" in n), {})
        names = [f"eval_{name}" for name in self.prepared.objective.metrics]
        metrics = {
            "step": chosen,
            "train_loss": next(n["loss"] for n in lines if n["step"] == chosen and "loss" in n),
            "eval_loss": validated.get("eval_loss"),
            **{name: validated[name] for name in names if name in validated},
        }
        adapter = self.directory / "adapter"
        self.method.save(self.model, adapter, {**self.passport, "metrics": metrics})
        record = run_record(
            self.config,
            self.prepared,
            self.report,
            state=self.state,
            lines=lines,
            facts={
                "final": metrics,
                "base_sha256": self.identity["base_sha256"],
                "process_bytes": self.process_bytes,
                "loaded_bytes": self.loaded_bytes,
                "quantization": None if self.quantization is None else self.quantization.to_json(),
                "timing": clock.seconds(),
                "warnings": warned,
            },
        )
        write_json(self.directory / "run.json", record)
        self.say(f"adapter of step {chosen} saved in {adapter}")
        return TrainResult(directory=self.directory, adapter=adapter, record=record)

    def _is_over(self, checkpoint: Checkpoint) -> bool:
        patience = self.config.train.early_stopping_patience
        out_of_patience = patience is not None and checkpoint.state.num_evals_since_best >= patience
        return checkpoint.step >= self.prepared.max_steps or out_of_patience

    def _paused(self, last: Checkpoint | None) -> TrainingPaused:
        command = shlex.join(["lorakit", "train", str(self.directory / "config.yaml"), "--resume"])
        if last is None:
            return TrainingPaused(
                "stopped before the first checkpoint",
                where=str(self.directory),
                remedy="remove the directory and start the run again",
            )
        return TrainingPaused(
            f"stopped after step {last.step} of {self.prepared.max_steps}, which is saved",
            where=str(last.path),
            remedy=f"go on with: {command}",
        )

    def _cadence(self) -> Cadence:
        options, per_epoch = self.config.train, self.prepared.steps_per_epoch
        eval_every = per_epoch if options.eval_every == "epoch" else options.eval_every
        return Cadence(
            max_steps=self.prepared.max_steps,
            eval_every=eval_every if self.config.validates else None,
            save_every=per_epoch if options.save_every == "epoch" else options.save_every,
        )

    def _trainer(self, callbacks: list[TrainerCallback]) -> AdapterTrainer:
        config, data, options = self.config, self.prepared.data, self.config.train
        sampler = LengthGroupedSampler(
            data.train.lengths,
            options.batch_size,
            seed=config.seed,
            grouped=options.length_grouping,
        )
        parts = TrainerParts(
            objective=self.prepared.objective,
            train=data.train,
            validation=data.validation,
            collate=self.prepared.objective.collate,
            sampler=sampler,
            origin=data.train_rows.origin,
            method=self.method,
            passport=self.passport,
            checkpoints=self.store,
            identity=self.identity,
            saves_method=not self.prepared.trains_all,
            fresh=self.start is None,
        )
        max_steps = self.prepared.max_steps
        steps = StepOptions(
            schedule=options.schedule,
            num_warmup_steps=options.warmup_steps or round(options.warmup_ratio * max_steps),
            label_smoothing=options.label_smoothing,
            bf16=self.prepared.bf16,
            patience=options.early_stopping_patience,
            keep_best=options.keep_best,
            best_metric=best_metric(config, self.prepared.objective),
        )
        return AdapterTrainer(
            self.model,
            training_arguments(config, max_steps),
            parts=parts,
            options=steps,
            callbacks=callbacks,
        )


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
