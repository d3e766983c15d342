"""What a run would take, from a configuration alone: parameters, bytes, memory, time, machines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from transformers import PretrainedConfig, PreTrainedModel

from lorakit.environment import default_device, supports_bf16
from lorakit.errors import RequestError
from lorakit.methods.base import Method, TrainableReport
from lorakit.methods.registry import build_method
from lorakit.models.empty import empty_classifier, empty_from_config
from lorakit.models.load import Ref, resolve_dtype
from lorakit.models.quantizable import holds_four_bit, mark_four_bit
from lorakit.models.task_head import ClassificationHead
from lorakit.planner.advice import Change, rank_changes
from lorakit.planner.devices import Fit, fits
from lorakit.planner.generation import GenerationEstimate, can_answer, estimate_generation
from lorakit.planner.memory import (
    MemoryEstimate,
    TrainingEstimate,
    TrainingSetup,
    estimate_training,
)
from lorakit.planner.network import NetworkCost, estimate_network, shard_bytes
from lorakit.planner.shapes import planned_config
from lorakit.planner.step import BatchShape
from lorakit.planner.time import Calibration, calibrate, estimate_seconds

_LEARNED_FLOAT_BYTES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRequest:
    """What is to be planned.

    Attributes:
        model: a named shape, a directory, a hub id, a .gguf file or a named model.
        method: a key of `lorakit.methods.registry.METHODS`.
        options: of the method.
        batch_size: rows in one forward pass.
        length: tokens in a row.
        labels: learned tokens in a batch; None for all of them.
        classes: plan a classifier with so many classes; None for the model's own task.
        dtype: of the dense weights; None: float32 on a CPU or where they are trained, else
            bfloat16.
        quantize: "nf4" keeps the linear layers of the base in 4 bits.
        precision: of the forward pass, as in a training config.
        gradient_checkpointing: recompute activations block by block.
        attention: name of the attention kernel; None for transformers' choice.
        device: "cpu" or "cuda"; None for this machine's. It need not be there.
        num_examples: rows in an epoch, for the time; None: a step only.
        flops_per_s: the rate that is reached; None: no time, unless it is calibrated.
        processes: how many train together, each with a batch of its own.
        shard: whether they split the base (FSDP2); else each holds all of it.
        bandwidth_gbps: what each sends and receives, in 10^9 bits per second; None: no time of the
            network.
    """

    model: Ref
    method: str = "lora"
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    batch_size: int = 8
    length: int = 512
    labels: int | None = None
    classes: int | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    quantize: Literal["nf4"] | None = None
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    gradient_checkpointing: bool = False
    attention: str | None = None
    device: Literal["cpu", "cuda"] | None = None
    num_examples: int | None = None
    flops_per_s: float | None = None
    processes: int = 1
    shard: bool = False
    bandwidth_gbps: float | None = None

    def __post_init__(self) -> None:
        for name, value in {
            "batch_size": self.batch_size,
            "length": self.length,
            "labels": self.labels,
            "classes": self.classes,
            "num_examples": self.num_examples,
            "flops_per_s": self.flops_per_s,
            "processes": self.processes,
            "bandwidth_gbps": self.bandwidth_gbps,
        }.items():
            if value is not None and value <= 0:
                raise RequestError(
                    f"{name} must be positive", where=name, expected="> 0", found=f"{value:g}"
                )

        self._check_processes()

    def _check_processes(self) -> None:
        for name, is_set in (
            ("shard", self.shard),
            ("bandwidth_gbps", self.bandwidth_gbps is not None),
        ):
            if is_set and self.processes == 1:
                raise RequestError(
                    f"{name} means nothing for one process",
                    where=name,
                    expected="more than one process",
                    found="processes: 1",
                    remedy="say how many train together: --processes 8",
                )

    @property
    def batch(self) -> BatchShape:
        """The batch, every row as long as the longest."""
        num_tokens = self.batch_size * self.length
        return BatchShape(
            rows=self.batch_size,
            length=self.length,
            labels=min(self.labels or num_tokens, num_tokens),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPlan:
    """What a run would take.

    Attributes:
        request: what was asked.
        config: of the base.
        model: the base on the meta device.
        method: what is trained.
        report: its counts.
        setup: how the numbers are held.
        training: memory and operations of a step.
        gpu_setup: the same on a GPU.
        on_gpu: the memory of the same run on a GPU.
        generation: the memory of answering one row of that length; None without a head.
        calibration: the micro-step, if one was taken.
    """

    request: RunRequest
    config: PretrainedConfig
    model: PreTrainedModel
    method: Method
    report: TrainableReport
    setup: TrainingSetup
    training: TrainingEstimate
    gpu_setup: TrainingSetup
    on_gpu: TrainingEstimate
    generation: GenerationEstimate | None
    calibration: Calibration | None = None

    @property
    def num_base_params(self) -> int:
        """Parameters of the base."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def checkpoint_bytes(self) -> int:
        """What is saved of the learned numbers, in float32."""
        return _LEARNED_FLOAT_BYTES * self.report.num_trainable

    @property
    def gpus(self) -> list[Fit]:
        """How the run would fill every kind of GPU."""
        return fits(self.gpu_memory.total_bytes)

    @property
    def gpu_memory(self) -> MemoryEstimate:
        """The same as `memory` on a GPU."""
        return self._in_shards(self.on_gpu.memory, self.gpu_setup)

    @property
    def memory(self) -> MemoryEstimate:
        """What each process holds at the fullest moment of a step."""
        return self._in_shards(self.training.memory, self.setup)

    def _in_shards(self, memory: MemoryEstimate, setup: TrainingSetup) -> MemoryEstimate:
        if not self.request.shard:
            return memory
        held = shard_bytes(self.model, setup.dtype, self.request.processes)
        return replace(memory, weights_bytes=held)

    @property
    def network(self) -> NetworkCost | None:
        """The network's part of a step; None for one process, or an unknown network."""
        request = self.request
        if request.processes == 1 or request.bandwidth_gbps is None:
            return None
        return estimate_network(
            processes=request.processes,
            bandwidth_gbps=request.bandwidth_gbps,
            learned_bytes=_LEARNED_FLOAT_BYTES * self.report.num_trainable,
            base_bytes=self.training.memory.weights_bytes if request.shard else 0,
            compute_s=self.step_s,
        )

    @property
    def step_s(self) -> float | None:
        """Seconds of one forward and backward pass; None where no rate is known."""
        if self.calibration is not None:
            return self.calibration.step_s
        rate, counts = self.request.flops_per_s, self.training.counts
        return None if rate is None or counts is None else estimate_seconds(counts.flops, rate)

    @property
    def epoch_s(self) -> float | None:
        """Seconds of a pass over the data, every row as long as the longest.

        In several processes with the slowest step that the network gives.
        """
        rows, network = self.request.num_examples, self.network
        step_s = self.step_s if network is None else network.slowest_step_s
        if rows is None or step_s is None:
            return None
        return step_s * rows / (self.request.batch_size * self.request.processes)

    def changes(self) -> list[Change]:
        """What to change to need less memory, the largest saving first; takes a few seconds."""
        return rank_changes(self.model, self.method, self.request.batch, self.setup)

    def calibrated(self) -> RunPlan:
        """The same with the time of a micro-step taken on this machine.

        Raises:
            RequestError, MemoryPlanError: it cannot be taken here.
        """
        found = calibrate(self.config, self.method, self.request.batch, self.setup, self.training)
        return replace(self, calibration=found)


def plan_run(request: RunRequest) -> RunPlan:
    """Count what a run would take; nothing is loaded, and from a hub only config.json is read.

    Raises:
        ModelError: the model cannot be found or is not known.
        SpecError, TargetError: the method cannot do this on this model.
        RequestError: values that cannot be.
    """
    config = planned_config(request.model)
    model = empty_from_config(config)
    if request.classes is not None:
        names = tuple(f"class {i}" for i in range(request.classes))
        model = empty_classifier(config, ClassificationHead(names=names, pad_token_id=0, seed=0))
    # A method refuses to train a weight that will be in 4 bits.
    mark_four_bit(model, request.quantize)
    method = build_method(request.method, request.options)
    report = method.plan(model)
    in_place = report.in_base_dtype
    device = request.device or default_device().type
    four_bit = holds_four_bit(model)
    setup = _setup(request, device, in_place=in_place, four_bit=four_bit)
    training = estimate_training(model, method, request.batch, setup)
    on_gpu, gpu_setup = training, setup
    if device != "cuda":
        gpu_setup = _setup(request, "cuda", in_place=in_place, four_bit=four_bit)
        on_gpu = estimate_training(model, method, request.batch, gpu_setup)
    generation = None
    if can_answer(model) and training.counts is not None:
        generation = estimate_generation(model, rows=1, positions=request.length, setup=setup)
    return RunPlan(
        request=request,
        config=model.config,
        model=model,
        method=method,
        report=report,
        setup=setup,
        training=training,
        gpu_setup=gpu_setup,
        on_gpu=on_gpu,
        generation=generation,
    )


def _setup(request: RunRequest, device: str, *, in_place: bool, four_bit: bool) -> TrainingSetup:
    dtype = torch.float32 if in_place or device == "cpu" else torch.bfloat16
    if request.dtype is not None:
        dtype = resolve_dtype(request.dtype, torch.device("cpu")) or dtype
    bf16 = request.precision == "bf16"
    if request.precision == "auto":
        # A GPU that is planned for and not here is taken to have what all of them have today.
        here = device == "cpu" or default_device().type == "cuda"
        bf16 = supports_bf16(device) if here else True
    return TrainingSetup(
        dtype=dtype,
        four_bit=four_bit,
        bf16=bf16,
        checkpointing=request.gradient_checkpointing,
        attention=request.attention,
        device=device,
    )
