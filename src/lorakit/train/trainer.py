"""AdapterTrainer: transformers' Trainer, loss at the labels only, checkpoints of what is learned.

What transformers does and what this class does instead, so that a run that was killed goes on bit
for bit on a CPU:

- Data order comes from (seed, epoch), never from the global generators, and the loader draws its
  own seeds from its own generator: an epoch that is entered in the middle has the same batches.
- Validation comes before the checkpoint of the same step, so a checkpoint knows its own result.
- The best checkpoint, the patience and the counters are part of the checkpoint (RunState).
- Every step is logged, so no sum of losses is lost between two log lines.
- A checkpoint is staged, hashed and renamed; see `checkpoints`.

In several processes each takes its share of every batch, and the gradients are summed once in a
step, behind the last backward pass: what is learned is small, so that there is little to gain from
sending parts of it earlier, and a model may be called as often as an objective likes. What is
counted, found not to be finite or asked to stop in one process is so in all. The first one writes.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import DefaultFlowCallback

from lorakit.data.sampling import LengthGroupedSampler
from lorakit.errors import TrainingError
from lorakit.methods.base import Method
from lorakit.processes import Processes
from lorakit.train.callbacks import EpochCallback, FiniteGradientCallback
from lorakit.train.checkpoints import (
    ADAPTER,
    CheckpointStore,
    RunState,
    generators_of,
    load_state,
    save_state,
)
from lorakit.train.loaders import ROWS, Collate, training_loader
from lorakit.train.moving_ranks import MovingRanks, MovingRanksCallback
from lorakit.train.objectives.base import LOSS, ExampleSet, Inputs, Objective, Validated
from lorakit.train.steps import (
    StepOptions,
    StepSums,
    autocast,
    build_optimizer,
    build_scheduler,
    noted_by_all,
    steps_per_epoch,
)
from lorakit.train.validation import validate, validation_line

# Between the seeds of two processes, whose dropout must differ.
_SEED_STRIDE = 7_919


@dataclass(frozen=True, kw_only=True)
class TrainerParts:
    """What a run hands to its trainer.

    Attributes:
        objective: what is learned.
        train: the training examples.
        validation: the validation examples, or None.
        collate: examples to a batch of tensors (batch, positions).
        sampler: the order of the training examples, by epoch.
        origin: index of a training row -> where it was read.
        method: what is trained.
        passport: what an adapter that is saved says about itself.
        checkpoints: where checkpoints go.
        identity: what a checkpoint says about its run; see `Checkpoint`.
        saves_method: whether a checkpoint also holds the method's own directory; a whole model is
            not written twice.
        fresh: whether training begins, and does not go on from a checkpoint.
        ranks: the ranks that move while it learns, or None.
        processes: those that train this run together.
    """

    objective: Objective
    train: ExampleSet
    validation: ExampleSet | None
    collate: Collate
    sampler: LengthGroupedSampler
    origin: Callable[[int], str]
    method: Method
    passport: dict[str, Any]
    checkpoints: CheckpointStore
    identity: dict[str, Any]
    saves_method: bool = True
    fresh: bool = True
    ranks: MovingRanks | None = None
    processes: Processes = field(default_factory=Processes)


class AdapterTrainer(Trainer):
    """Trains the parameters of a model that require a gradient.

    Args:
        model: the base with the adapter attached; trained in place.
        args: transformers' arguments.
        parts: data, adapter files and checkpoints.
        options: the step.
        callbacks: beyond the trainer's own.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        *,
        parts: TrainerParts,
        options: StepOptions,
        callbacks: list[TrainerCallback],
    ) -> None:
        super().__init__(model=model, args=args, train_dataset=cast(Any, parts.train))
        # One process, one device: torch's DataParallel would split batches behind our back.
        args._n_gpu = min(args.n_gpu, 1)
        self.parts = parts
        self.options = options
        self.run_state = RunState()
        self.processes = parts.processes
        self.adapter_model = model
        self._learned = [p for p in model.parameters() if p.requires_grad]
        self.learner = parts.objective.bind(model, parts.method, fresh=parts.fresh)
        # Our loss divides by the labels, or rows, of all accumulated batches itself.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self._step_batches = 1
        self._step_rows: list[int] = []
        self._step = StepSums()
        self._counts = True  # whether the batch in hand is trained on; see `loaders.OwnShare`
        self._step_started = time.perf_counter()
        self.remove_callback(PrinterCallback)
        self.remove_callback(DefaultFlowCallback)
        num_steps = steps_per_epoch(
            len(parts.train),
            args.per_device_train_batch_size * self.processes.num,
            args.gradient_accumulation_steps,
        )
        self.add_callback(EpochCallback(parts.sampler.set_epoch, num_steps))
        self.add_callback(FiniteGradientCallback(self._stop_step))
        if parts.ranks is not None:
            self.add_callback(MovingRanksCallback(parts.ranks))
        for callback in callbacks:
            self.add_callback(callback)
        if self.processes.rank:
            # The first process draws what it would draw alone.
            set_seed(args.seed + _SEED_STRIDE * self.processes.rank)

    def create_accelerator_and_postprocess(self) -> None:
        """Accelerate places the model; it must not wrap it: the gradients are summed here."""
        super().create_accelerator_and_postprocess()
        prepare = self.accelerator.prepare_model
        self.accelerator.prepare_model = partial(prepare, evaluation_mode=True)

    # Data

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The training batches of the epoch that `EpochCallback` sets."""
        return training_loader(
            self.parts.train,
            self.parts.sampler,
            self.parts.collate,
            pin_memory=self.args.device.type == "cuda",
            processes=self.processes,
        )

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Inputs], Tensor]:
        """The batches of one optimizer step, and what their summed loss is divided by."""
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        counts = [self.parts.objective.num_items(batch) for batch in batches if len(batch[ROWS])]
        num_items = torch.stack(counts).sum() if counts else torch.tensor(0)
        if not self.processes.alone:
            num_items = torch.tensor(round(self.processes.sum([float(num_items)])[0]))
        self._step_rows, self._step = [], StepSums()
        self._step_batches = max(1, len(batches))
        self._step_started = time.perf_counter()
        return batches, num_items.clamp(min=1).to(device)

    # Steps

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The method's groups, each split by whether transformers would decay the parameter."""
        made = cast(torch.optim.Optimizer | None, self.optimizer)
        if made is None:
            made = build_optimizer(self.adapter_model, self.parts.method, self.args)
            self.optimizer = made
        return made

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Warmup, then the schedule, over all steps of the run."""
        if self.lr_scheduler is None:
            chosen = cast(Any, self.optimizer) if optimizer is None else optimizer
            self.lr_scheduler = build_scheduler(self.options, chosen, num_training_steps)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def training_step(
        self, model: nn.Module, inputs: Inputs, num_items_in_batch: Any = None
    ) -> Tensor:
        """Forward and backward of one batch; a loss that is not finite stops the run."""
        rows = inputs.pop(ROWS).tolist()
        self._step_rows.extend(rows)
        self._counts = bool(rows)
        num_tokens = int(inputs["attention_mask"].sum())
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._step = self._step.plus(float(loss), num_tokens * self._counts, len(rows))
        if self.accelerator.sync_gradients and not self.processes.alone:
            self._step = StepSums(*self.processes.sum(astuple(self._step)))
            self.processes.sum_gradients(self._learned)
        elif not self.processes.alone:
            # The others learn of it at the end of the step, where all of them stop.
            return loss
        if not math.isfinite(self._step.loss):
            self._stop_step("loss", f"{self._step.loss}")
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Inputs,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The objective's loss, summed and divided by the labels or rows of the whole step."""
        loss = self.learner.loss(
            inputs,
            num_items=num_items_in_batch,
            label_smoothing=self.options.label_smoothing,
        )
        if not self._counts:
            loss = loss * 0
        if self.parts.ranks is not None:
            penalty = self.parts.ranks.penalty() / self._step_batches
            # Its gradient, without its value: the loss that is shown is the task's.
            loss = loss + (penalty - penalty.detach())
        return (loss, None) if return_outputs else loss

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        """Autocast to bfloat16 when asked."""
        return autocast(self.args.device, bf16=self.options.bf16)

    def floating_point_ops(self, inputs: Inputs) -> int:
        """Not counted: transformers' estimate walks all parameters at every batch."""
        return 0

    # Validation

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """The objective's mean loss, without label smoothing, and metrics over all rows."""
        examples = self.parts.validation
        if examples is None:
            raise TrainingError("there are no validation rows", where="evaluate")
        found, seconds = validate(
            self.adapter_model,
            self.learner,
            (examples, self.parts.collate, self.args.per_device_eval_batch_size),
            cast(Any, self._prepare_inputs),
            bf16=self.options.bf16,
            processes=self.processes,
        )
        self._note_validation(found)
        logs = validation_line(found, self.parts.objective, seconds)
        self.log(logs)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        return logs

    def _note_validation(self, found: Validated) -> None:
        step = self.state.global_step
        if not math.isfinite(found.loss):
            self._fail("the validation loss is not finite", f"step {step}", f"{found.loss}")
        if self.parts.ranks is not None and self.parts.ranks.kept is None:
            return  # An adapter beyond its budget cannot be the best one.
        by = self.options.best_metric
        self.run_state = self.run_state.after_evaluation(
            step,
            found.loss,
            self.options.patience,
            score=None if by == LOSS else found.metrics[by],
        )
        if self.options.keep_best and self.run_state.best_step == step:
            self.control.should_save = True
        if self.run_state.stopped_early:
            self.control.should_save = True
            self.control.should_training_stop = True

    # Logs and errors

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Pass a line to the callbacks; metrics.jsonl is the history, not the checkpoints."""
        line = dict(logs)
        if "loss" in line:
            line = self._training_line(line)
        elif "eval_loss" not in line:
            return
        line = {"epoch": self.state.epoch or 0.0, **line}
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, line)

    def _training_line(self, logs: dict[str, float]) -> dict[str, float]:
        step_s = time.perf_counter() - self._step_started
        step = self._step
        num_tokens = round(step.num_tokens)
        self.run_state = self.run_state.after_step(num_tokens, round(step.num_rows), step_s)
        return {
            "loss": step.loss,
            "grad_norm": float(logs["grad_norm"]),
            "lr": logs["learning_rate"],
            "num_tokens": num_tokens,
            "step_s": step_s,
            **noted_by_all(self.learner.noted(), len(self._step_rows), self.processes),
        }

    def _stop_step(self, what: str, found: str) -> None:
        step = self.state.global_step + 1
        rows = [row for share in self.processes.gather(self._step_rows) for row in share]
        names = [self.parts.origin(row) for row in rows]
        shown = ", ".join(names[:16]) + (f", and {len(names) - 16} more" if len(names) > 16 else "")
        self._fail(f"the {what} is not finite", f"step {step}, batch of {shown}", found)

    def _fail(self, what: str, where: str, found: str) -> NoReturn:
        last = self.parts.checkpoints.last()
        kept = f"the last good checkpoint is {last.path}" if last else "there is no checkpoint yet"
        raise self.processes.shared(
            TrainingError(
                what,
                where=where,
                expected="a finite number",
                found=found,
                remedy=f"lower train.lr, set train.max_grad_norm, or look at these rows; {kept}",
            )
        )

    # Checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Written by the first process; the others give it their generators' states and wait."""
        generators = self.processes.gather(None if self.processes.alone else self._generators())
        self.processes.on_first(lambda: self._write_checkpoint(generators))

    def _write_checkpoint(self, generators: list[dict[str, bytes] | None]) -> None:
        step = self.state.global_step
        store = self.parts.checkpoints
        with store.write(step, self.run_state, self.parts.identity) as staging:
            save_state(self.parts.method, self.adapter_model, staging)
            if self.parts.saves_method:
                self.parts.method.save(self.adapter_model, staging / ADAPTER, self.parts.passport)
            if self.parts.ranks is not None:
                self.parts.ranks.save(staging)
            self._save_optimizer_and_scheduler(str(staging))
            if self.processes.alone:
                self._save_rng_state(str(staging))
            for rank, files in enumerate(generators):
                for name, content in (files or {}).items():
                    place = generators_of(staging, rank)
                    place.mkdir(parents=True, exist_ok=True)
                    (place / name).write_bytes(content)
            self.state.save_to_json(str(staging / "trainer_state.json"))

    def _generators(self) -> dict[str, bytes]:
        """The states of this process's generators, as transformers writes them: name -> content."""
        with tempfile.TemporaryDirectory() as directory:
            self._save_rng_state(directory)
            return {file.name: file.read_bytes() for file in Path(directory).iterdir()}

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None and not self.processes.alone:
            checkpoint = str(generators_of(Path(checkpoint), self.processes.rank))
        super()._load_rng_state(checkpoint)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        load_state(self.parts.method, self.adapter_model, Path(resume_from_checkpoint))
        if self.parts.ranks is not None:
            self.parts.ranks.load(Path(resume_from_checkpoint))
