"""Everything about a run that is known before the model is loaded: rows, plan, memory, steps."""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lorakit.environment import default_device, supports_bf16
from lorakit.errors import (
    LorakitWarning,
    SpecError,
    TargetError,
)
from lorakit.formatting import format_bytes, format_share
from lorakit.methods.base import Method, TrainableReport
from lorakit.models.load import load_tokenizer, resolve_dtype
from lorakit.models.quantizable import holds_four_bit, mark_four_bit
from lorakit.models.vocabulary import require_embeddings
from lorakit.planner.memory import (
    MemoryEstimate,
    TrainingSetup,
    estimate_training,
    free_memory_bytes,
    require_room,
)
from lorakit.planner.network import shard_bytes
from lorakit.planner.step import BatchShape
from lorakit.processes import Processes
from lorakit.train.config import TrainConfig
from lorakit.train.context import require_context
from lorakit.train.objectives.base import ExampleSet, Objective
from lorakit.train.objectives.registry import build_objective
from lorakit.train.run_data import RunData, build_data, read_rows
from lorakit.train.steps import steps_per_epoch
from lorakit.train.storage import require_storage
from lorakit.train.train_section import DEFAULT_EPOCHS
from lorakit.weights.storage import storage_of


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What a run will do.

    Attributes:
        tokenizer: of the base.
        objective: what is learned.
        beside: modules that the task trains, whatever the method trains.
        data: rows and examples.
        plan: what the method trains.
        num_base_params: parameters of the base.
        dtype: what the base's weights are kept in.
        batch: the largest batch.
        memory: the estimate for it.
        free_bytes: memory that was free.
        device: where the run computes.
        bf16: whether the forward pass is autocast to bfloat16.
        steps_per_epoch: optimizer steps in one pass over the data.
        max_steps: optimizer steps in all.
        num_processes: how many take a batch each at the same time.
        notes: what the user should know, one sentence each.
    """

    tokenizer: PreTrainedTokenizerBase
    objective: Objective
    beside: tuple[str, ...]
    data: RunData
    plan: TrainableReport
    num_base_params: int
    dtype: torch.dtype
    batch: BatchShape
    memory: MemoryEstimate
    free_bytes: int
    device: torch.device
    bf16: bool
    steps_per_epoch: int
    max_steps: int
    num_processes: int = 1

    def lines(self, config: TrainConfig) -> list[str]:
        """The plan in sentences, to be said before the model is loaded."""
        train, validation = self.data.train, self.data.validation
        report = train.report
        epochs = self.max_steps / self.steps_per_epoch
        held = f", {len(validation):,} for validation" if validation is not None else ""
        precision = (
            "bfloat16 autocast, learned weights and loss in float32" if self.bf16 else "float32"
        )
        num_kept = config.train.keep_checkpoints + config.train.keep_best
        return [
            f"data: {len(train):,} examples{held}; {self.objective.line(train)}; longest row "
            f"{report.longest}",
            f"method: {config.method}, {self.plan.num_trainable:,} of {self.plan.num_total:,} "
            f"parameters ({format_share(self.plan.share)} of all) at {len(self.plan.sites)} sites",
            f"steps: {self.max_steps:,} ({epochs:.3g} epochs), batch {config.train.batch_size} x "
            f"{config.train.gradient_accumulation}{self._in_processes}",
            f"precision: {precision}, on {self.device.type}",
            f"memory: {self.memory}, {format_bytes(self.free_bytes)} free",
            f"checkpoints: about {format_bytes(self.checkpoint_bytes)} each, at most {num_kept} "
            "kept",
            *(
                f"note: {note}"
                for note in [*self.data.notes(), *self.notes(), *self._warmup(config)]
            ),
        ]

    def _warmup(self, config: TrainConfig) -> list[str]:
        """That the rate rises until the end, if it does."""
        num_steps = config.train.warmup_steps
        if num_steps < self.max_steps:
            return []
        return [
            f"train.warmup_steps is {num_steps:,} and the run has {self.max_steps:,} steps: the "
            "rate never reaches train.lr"
        ]

    @property
    def _in_processes(self) -> str:
        return "" if self.num_processes == 1 else f" in each of {self.num_processes} processes"

    @property
    def trains_all(self) -> bool:
        """Whether what is learned is the whole model."""
        return self.plan.num_trainable == self.plan.num_total

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of one checkpoint: learned tensors, AdamW's moments, the directory to use."""
        copies = 3 if self.trains_all else 4
        return copies * 4 * self.plan.num_trainable

    def with_model(self, model: PreTrainedModel, method: Method, base_sha256: str) -> Preparation:
        """The same with what only the loaded model can tell of the rows.

        Args:
            model: with the method attached.
            method: what is trained of it.
            base_sha256: the base's fingerprint.
        """
        facts = {"base": base_sha256, "dtype": str(self.dtype), "bf16": self.bf16}
        facts["storage"] = storage_of(model.modules())

        def ready(examples: ExampleSet) -> ExampleSet:
            return self.objective.with_model(examples, model, method, facts)

        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            train = ready(self.data.train)
            held = None if self.data.validation is None else ready(self.data.validation)
        return replace(self, data=replace(self.data, train=train, validation=held))

    def notes(self) -> list[str]:
        """What the user should know, one sentence each."""
        found = [*self.plan.notes, *self.memory.notes]
        if self.beside:
            found.append(f"the new head is trained beside: {', '.join(self.beside)}")
        if self.plan.in_base_dtype and self.dtype == torch.bfloat16:
            found.append(
                "weights of the base are trained in bfloat16: a step smaller than about 1/256 of a "
                "weight is lost; model.dtype: float32 keeps it"
            )
        return found


def prepare(
    config: TrainConfig,
    *,
    like: Preparation | None = None,
    processes: Processes | None = None,
    sharded: bool = False,
) -> Preparation:
    """Read the rows, plan the adapter, estimate the memory; no weights are loaded.

    Args:
        config: the run.
        like: a run of the same task on the same rows, whose examples are taken.
        processes: those that train it together.
        sharded: whether they split the base; else each holds all of it.

    Raises:
        ModelError, DataError, TargetError, SpecError: what is asked for is not there or cannot be.
        MemoryPlanError: the run cannot fit.
    """
    group = processes or Processes()
    require_storage(config, default_device())
    tokenizer = like.tokenizer if like else load_tokenizer(config.model.ref)
    rows = (like.data.train_rows, like.data.validation_rows) if like else read_rows(config)
    objective = build_objective(config, tokenizer, rows[0])
    base = objective.empty_model()
    mark_four_bit(base, config.model.quantize)
    beside = objective.beside(base)
    plan = _plan(base, config, beside)
    data = like.data if like else build_data(rows, objective)
    require_context(base, plan, config.method, (data.train, data.validation))
    require_embeddings(base, tokenizer, data.highest_ids(objective.collate))
    device = default_device()
    num_base_params = sum(p.numel() for p in base.parameters())
    dtype = _dtype(config, plan, device)
    setup = _setup(config, dtype, device, four_bit=holds_four_bit(base))
    batch = _largest_batch(data, objective, config.train.batch_size)
    memory = estimate_training(base, config.make_method(beside), batch, setup).memory
    if sharded:
        held = shard_bytes(base, setup.dtype, group.num)
        memory = replace(memory, weights_bytes=held)
    free_bytes = _room(memory, device, group)
    together = config.train.batch_size * group.num
    per_epoch = steps_per_epoch(len(data.train), together, config.train.gradient_accumulation)
    return Preparation(
        tokenizer=tokenizer,
        objective=objective,
        beside=beside,
        data=data,
        plan=plan,
        num_base_params=num_base_params,
        dtype=dtype,
        batch=batch,
        memory=memory,
        free_bytes=free_bytes,
        device=device,
        bf16=setup.bf16,
        steps_per_epoch=per_epoch,
        max_steps=_num_steps(config, per_epoch),
        num_processes=group.num,
    )


def _num_steps(config: TrainConfig, per_epoch: int) -> int:
    epochs = config.train.epochs or DEFAULT_EPOCHS
    return config.train.max_steps or math.ceil(epochs * per_epoch)


def _room(memory: MemoryEstimate, device: torch.device, processes: Processes) -> int:
    """The bytes that are free for this process.

    Raises:
        MemoryPlanError: they are too few, whatever the batch is.

    Warns:
        LorakitWarning: they may be too few.
    """
    free_bytes = free_memory_bytes(device)
    if device.type == "cpu":
        free_bytes //= processes.num_here
    require_room(memory, free_bytes)
    if memory.total_bytes > free_bytes:
        warnings.warn(
            f"the run may not fit in memory: {memory}, {format_bytes(free_bytes)} free; lower "
            "train.batch_size or data.max_length, or set train.gradient_checkpointing",
            LorakitWarning,
            stacklevel=3,
        )
    return free_bytes


def estimate_batch(config: TrainConfig, prepared: Preparation, batch: BatchShape) -> MemoryEstimate:
    """The memory of a prepared run if its largest batch were another one."""
    base = prepared.objective.empty_model()
    mark_four_bit(base, config.model.quantize)
    four_bit = holds_four_bit(base)
    setup = _setup(config, prepared.dtype, prepared.device, four_bit=four_bit)
    return estimate_training(base, config.make_method(prepared.beside), batch, setup).memory


def _setup(
    config: TrainConfig, dtype: torch.dtype, device: torch.device, *, four_bit: bool
) -> TrainingSetup:
    return TrainingSetup(
        dtype=dtype,
        four_bit=four_bit,
        bf16=resolve_bf16(config, device),
        checkpointing=config.train.gradient_checkpointing,
        attention=config.model.attention,
        device=device.type,
    )


def _dtype(config: TrainConfig, plan: TrainableReport, device: torch.device) -> torch.dtype:
    # A step smaller than 1/256 of a weight would be lost in bfloat16.
    if plan.in_base_dtype and config.model.dtype is None:
        return torch.float32
    return resolve_dtype(config.model.dtype, device) or torch.float32


def _plan(base: PreTrainedModel, config: TrainConfig, beside: tuple[str, ...]) -> TrainableReport:
    try:
        with warnings.catch_warnings():
            # The same notes come again when the method is attached to the real model.
            warnings.simplefilter("ignore", LorakitWarning)
            return config.make_method(beside).plan(base)
    except (SpecError, TargetError) as error:
        # A method knows its options, not that they stand in the config's section of its name.
        where = error.where or ""
        if re.split(r"\W", where, maxsplit=1)[0] not in config.options:
            raise
        raise type(error)(
            error.what,
            where=f"{config.method}.{where}",
            expected=error.expected,
            found=error.found,
            remedy=error.remedy,
        ) from error


def resolve_bf16(config: TrainConfig, device: torch.device) -> bool:
    """Whether the forward pass runs in bfloat16."""
    if config.train.precision == "auto":
        return supports_bf16(device)
    return config.train.precision == "bf16"


def _largest_batch(data: RunData, objective: Objective, batch_size: int) -> BatchShape:
    rows = min(batch_size, len(data.train))
    labels = objective.most_labels(data.train, rows)
    length = max(data.train.lengths)
    return BatchShape(rows=rows * objective.rows_each, length=length, labels=labels)
