"""What happens around the steps: cadence, finite gradients, progress, metrics, TensorBoard."""

from __future__ import annotations

import importlib
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorakit.errors import ConfigError
from lorakit.processes import Processes
from lorakit.progress import Bar
from lorakit.train.interrupt import Interrupt
from lorakit.train.metrics import Line, MetricsLog

_RATE_WINDOW = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Cadence:
    """Every how many steps something happens; None is never.

    Attributes:
        max_steps: the last step.
        eval_every: validate after every so many steps, and after the last.
        save_every: write a checkpoint after every so many steps, and after the last.
    """

    max_steps: int
    eval_every: int | None
    save_every: int

    def evaluates(self, step: int) -> bool:
        """Whether there is a validation after this step."""
        return self.eval_every is not None and self._is_due(step, self.eval_every)

    def saves(self, step: int) -> bool:
        """Whether there is a checkpoint after this step, whatever the validation says."""
        return self._is_due(step, self.save_every)

    def _is_due(self, step: int, every: int) -> bool:
        return step % every == 0 or step >= self.max_steps


class FlowCallback(TrainerCallback):
    """Decides after each step what comes next, in place of transformers' DefaultFlowCallback.

    There, a save by steps can come before a validation by epochs at the same step, and a run
    resumed from it never validates. Here both are counted in steps and the checkpoint is last.

    Args:
        cadence: of the run.
        interrupt: whether the run is asked to stop.
        processes: those of the run; a signal that reaches one of them stops all at the same step.
    """

    def __init__(
        self, cadence: Cadence, interrupt: Interrupt, processes: Processes | None = None
    ) -> None:
        self._cadence = cadence
        self._interrupt = interrupt
        self._processes = processes or Processes()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Set the flags for logging, validating, saving and stopping."""
        step = state.global_step
        requested = self._processes.any(self._interrupt.requested)
        control.should_log = True
        control.should_evaluate = self._cadence.evaluates(step)
        control.should_save = self._cadence.saves(step) or requested
        if step >= self._cadence.max_steps or requested:
            control.should_training_stop = True


class TimeCallback(TrainerCallback):
    """Ends a run after a time, and lets its learning rate come to an end with it.

    The schedule goes on by the share of the steps that are done or of the time that has passed,
    whichever is larger: a machine that is slower than expected learns less, at the right rates.
    Behind `FlowCallback`, whose flags it completes.

    Args:
        limit_s: the time, from the first step.
        cadence: of the run.
        spent_s: what the run has used before it was resumed.
        processes: those of the run; the clock of the first one counts.
    """

    def __init__(
        self, limit_s: float, cadence: Cadence, spent_s: float, processes: Processes | None = None
    ) -> None:
        self._limit_s = limit_s
        self._cadence = cadence
        self._spent_s = spent_s
        self._processes = processes or Processes()
        self._began = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """The clock begins."""
        self._began = time.monotonic() - self._spent_s

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        lr_scheduler: LRScheduler | None = None,
        **_: Any,
    ) -> None:
        """Move the schedule; stop when no further step fits."""
        passed_s = self._processes.from_first(time.monotonic() - self._began)
        if lr_scheduler is not None:
            due = int(passed_s / self._limit_s * self._cadence.max_steps)
            lr_scheduler.last_epoch = max(
                lr_scheduler.last_epoch, min(due, self._cadence.max_steps)
            )
        if passed_s * (1 + 1 / state.global_step) > self._limit_s:
            control.should_training_stop = True
            control.should_save = True
            control.should_evaluate = self._cadence.eval_every is not None


class EpochCallback(TrainerCallback):
    """Tells the batches which epoch it is, so that their order depends on seed and epoch alone."""

    def __init__(self, set_epoch: Callable[[int], None], num_steps_per_epoch: int) -> None:
        self._set_epoch = set_epoch
        self._num_steps_per_epoch = num_steps_per_epoch

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Called at the start of an epoch, and once more inside it after a resume."""
        self._set_epoch(state.global_step // self._num_steps_per_epoch)


class FiniteGradientCallback(TrainerCallback):
    """Stops before an optimizer step whose gradient is not finite."""

    def __init__(self, stop: Callable[[str, str], None]) -> None:
        self._stop = stop

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        """Check every gradient (one number per tensor crosses from the device)."""
        assert model is not None
        for name, parameter in model.named_parameters():
            gradient = parameter.grad
            if gradient is not None and not torch.isfinite(gradient).all():
                self._stop("gradient", name)


class ProgressCallback(TrainerCallback):
    """Moves the bar and shows the loss and the rate."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar
        self._recent: deque[tuple[float, float]] = deque(maxlen=_RATE_WINDOW)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Line | None = None,
        **_: Any,
    ) -> None:
        """One step of the bar per training line."""
        if not logs or "loss" not in logs:
            return
        self._recent.append((logs["num_tokens"], logs["step_s"]))
        tokens, seconds = (sum(values) for values in zip(*self._recent, strict=True))
        # Where answers earn a reward, the loss says nothing.
        name = "reward" if "reward" in logs else "loss"
        self._bar.advance(
            note=f"{name} {logs[name]:.3f}  {tokens / max(seconds, 1e-9):,.0f} tokens/s"
        )


class MetricsCallback(TrainerCallback):
    """Appends every training and validation line to metrics.jsonl."""

    def __init__(self, log: MetricsLog) -> None:
        self._log = log

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Line | None = None,
        **_: Any,
    ) -> None:
        """One line."""
        if logs and ("loss" in logs or "eval_loss" in logs):
            self._log.append({"step": state.global_step, **logs})


class TensorBoardCallback(TrainerCallback):
    """Writes the same numbers as TensorBoard events.

    Args:
        directory: where the event files go.
        resumed_step: the step the run goes on from; later events of an earlier session are hidden.

    Raises:
        ConfigError: TensorBoard is not installed.
    """

    def __init__(self, directory: Path, resumed_step: int = 0) -> None:
        require_tensorboard()
        module = importlib.import_module("torch.utils.tensorboard")
        purge_step = resumed_step + 1 if resumed_step else None
        self._writer = module.SummaryWriter(log_dir=str(directory), purge_step=purge_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Line | None = None,
        **_: Any,
    ) -> None:
        """One scalar per number."""
        for key, value in (logs or {}).items():
            side = "validation" if key.startswith("eval_") else "train"
            tag = f"{side}/{key.removeprefix('eval_')}"
            self._writer.add_scalar(tag, value, state.global_step)

    def close(self) -> None:
        """Write what is pending."""
        self._writer.close()


def require_tensorboard() -> None:
    """Check that TensorBoard can be used, before any work is done.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        importlib.import_module("torch.utils.tensorboard")
    except ImportError as error:
        raise ConfigError(
            "train.tensorboard is set, and TensorBoard is not installed",
            where="train.tensorboard",
            found=str(error),
            remedy='pip install "lorakit[tensorboard]", or set it to false',
        ) from error
