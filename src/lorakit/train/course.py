"""One run's files and progress: where it begins, what it has reached, what it leaves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lorakit.errors import TrainingError
from lorakit.files import write_json, write_text
from lorakit.methods.base import Method, TrainableReport
from lorakit.methods.reread import check_saved
from lorakit.train.base import LoadedBase
from lorakit.train.callbacks import Cadence
from lorakit.train.checkpoints import Checkpoint, CheckpointStore, RunState, load_state
from lorakit.train.config import TrainConfig
from lorakit.train.metrics import MetricsLog
from lorakit.train.moving_ranks import ranks_now
from lorakit.train.prepare import Preparation
from lorakit.train.record import passport, run_record
from lorakit.train.resume import CHECKPOINTS, CONFIG, identity
from lorakit.train.steps import cadence_of

ADAPTER, RECORD, METRICS = "adapter", "run.json", "metrics.jsonl"


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


class Course:
    """A run between its checks and its result, whoever takes its steps.

    Args:
        config: the run.
        prepared: the same, prepared.
        start: the checkpoint it goes on from, or None.
        method: what is trained.

    Attributes:
        identity: what a checkpoint says about the run; `note_base` adds the base's hash.
        passport: what an adapter that is saved says about itself.
        state: as of the last step.
    """

    def __init__(
        self, config: TrainConfig, prepared: Preparation, start: Checkpoint | None, method: Method
    ) -> None:
        self.config = config
        self.prepared = prepared
        self.start = start
        self.method = method
        self.identity = identity(config, prepared)
        self.passport = passport(config, prepared)
        self.directory = Path(config.output)
        self.store = CheckpointStore(
            self.directory / CHECKPOINTS,
            keep=config.train.keep_checkpoints,
            keep_best=config.train.keep_best,
        )
        self.metrics = MetricsLog(self.directory / METRICS)
        self._process: dict[str, int] = {}
        self.state = RunState() if start is None else start.state

    def note_base(self, base: LoadedBase) -> None:
        """Keep what checkpoints, passport and record say of the base."""
        self.identity["base_sha256"] = base.sha256
        if base.quantization is not None:
            self.passport["quantization"] = base.quantization.to_json()
        self._process = {"process_bytes": base.process_bytes, "loaded_bytes": base.loaded_bytes}

    @property
    def cadence(self) -> Cadence:
        """When it validates and writes checkpoints."""
        return cadence_of(
            self.config,
            steps_per_epoch=self.prepared.steps_per_epoch,
            max_steps=self.prepared.max_steps,
        )

    def open(self) -> None:
        """Write the config, and remove what a kill left behind the checkpoint it starts from."""
        write_text(self.directory / CONFIG, self.config.to_yaml())
        self.store.clean()
        self.metrics.cut_after(0 if self.start is None else self.start.step)

    def is_over(self, checkpoint: Checkpoint) -> bool:
        """Whether nothing is left to train after this checkpoint."""
        patience = self.config.train.early_stopping_patience
        out_of_patience = patience is not None and checkpoint.state.num_evals_since_best >= patience
        return checkpoint.step >= self.prepared.max_steps or out_of_patience

    def finish(
        self, model: nn.Module, report: TrainableReport, facts: Mapping[str, Any]
    ) -> TrainResult:
        """Save the final adapter, the best one where that is asked for, and the record.

        Mutates the model: its adapter becomes the chosen one.

        Args:
            model: with the method attached.
            report: what `attach` said.
            facts: of the process: see `record.run_record`.

        Raises:
            TrainingError: no checkpoint was written, the best one is gone, or what was saved does
                not read as what was learned.
        """
        last = self.store.last()
        if last is None:
            raise TrainingError("no checkpoint was written", where=str(self.store.directory))
        chosen = last.step
        if self.config.train.keep_best and self.state.best_step is not None:
            chosen = self.state.best_step
            load_state(self.method, model, self.store.require(chosen).path)
        lines = self.metrics.read()
        validated = next((n for n in lines if n["step"] == chosen and "eval_loss" in n), {})
        counted = ("eval_loss", "eval_s", f"eval_{self.prepared.objective.unit}")
        names = [name for name in validated if name.startswith("eval_") and name not in counted]
        metrics = {
            "step": chosen,
            "train_loss": next(n["loss"] for n in lines if n["step"] == chosen and "loss" in n),
            "eval_loss": validated.get("eval_loss"),
            **{name: validated[name] for name in names},
        }
        adapter = self.directory / ADAPTER
        self.method.save(model, adapter, {**self.passport, "metrics": metrics})
        check_saved(self.method, model, adapter)
        report = ranks_now(self.method, model, report)
        record = run_record(
            self.config,
            self.prepared,
            report,
            state=self.state,
            lines=lines,
            facts={
                **self._process,
                **facts,
                "final": metrics,
                "base_sha256": self.identity["base_sha256"],
                "quantization": self.passport.get("quantization"),
            },
        )
        write_json(self.directory / RECORD, record)
        return TrainResult(directory=self.directory, adapter=adapter, record=record)
