"""The memory of a training run, term by term, from the model's shapes alone."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from lorakit.environment import available_memory_bytes
from lorakit.errors import LorakitError, LorakitWarning, MemoryPlanError, SpecError
from lorakit.formatting import format_bytes
from lorakit.layers.low_rank import LowRank
from lorakit.methods.base import Method, TrainableReport
from lorakit.methods.registry import build_method
from lorakit.models.attention import GROUPED, use_attention
from lorakit.models.checkpointing import checkpoint_activations
from lorakit.models.fast_layers import use_fast_layers
from lorakit.models.packing import can_pack
from lorakit.models.quantizable import estimate_nf4_bytes
from lorakit.planner.depth import Blocks, repeated_blocks, shortened
from lorakit.planner.fake import become_fake, keep_in, make_ready
from lorakit.planner.ledger import Peak
from lorakit.planner.step import (
    ACTIVATIONS,
    GRADIENTS,
    LOGITS,
    STRETCHES,
    WORKING,
    BatchShape,
    StepCounts,
    count_step,
    head_of,
)

# On a CPU under Linux the C library keeps holes between tensors that are freed; of the activations,
# measured 10 to 42 % beyond what the tensors themselves hold (benchmarks/plan_truth.py). Where
# activations are recomputed, training has freed memory returned (models/checkpointing.py).
_KEPT_BY_THE_ALLOCATOR = 0.3
# AdamW's two moments, in the parameter's dtype; its gradient has that dtype too.
_MOMENTS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSetup:
    """How a run would hold its numbers.

    Attributes:
        dtype: of the base's dense weights.
        four_bit: whether the base's linear layers are kept in NF4.
        bf16: whether the forward pass is autocast to bfloat16.
        checkpointing: whether activations are recomputed block by block.
        attention: name of the attention kernel; None for transformers' choice.
        device: type of the device, "cpu" or "cuda".
    """

    dtype: torch.dtype
    four_bit: bool = False
    bf16: bool = False
    checkpointing: bool = False
    attention: str | None = None
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryEstimate:
    """The memory at the fullest moment of a training step, bytes by what they are for.

    Attributes:
        weights_bytes: the base, frozen or trained.
        adapter_bytes: what the method adds to the base.
        kept_bytes: what the method keeps of the base beside.
        optimizer_bytes: AdamW's two moments.
        gradients_bytes: the gradients that exist at that moment.
        activations_bytes: what the forward pass made and the backward pass still needs.
        logits_bytes: head and loss.
        working_bytes: what else the backward pass holds for a moment.
        allocator_bytes: what the C library keeps of freed memory, from experience; 0 on a GPU.
        trained_bytes: added, kept, optimizer and all gradients: needed whatever the batch is.
        notes: what the user should know, one sentence each.
    """

    weights_bytes: int
    adapter_bytes: int
    kept_bytes: int
    optimizer_bytes: int
    gradients_bytes: int
    activations_bytes: int
    logits_bytes: int
    working_bytes: int
    trained_bytes: int
    allocator_bytes: int = 0
    notes: tuple[str, ...] = ()

    def terms(self) -> dict[str, int]:
        """What adds up to the total, by name, in bytes."""
        return {
            "base": self.weights_bytes,
            "adapter": self.adapter_bytes,
            "kept of the base": self.kept_bytes,
            "optimizer": self.optimizer_bytes,
            "gradients": self.gradients_bytes,
            "activations": self.activations_bytes,
            "logits": self.logits_bytes,
            "working": self.working_bytes,
            "allocator": self.allocator_bytes,
        }

    @property
    def total_bytes(self) -> int:
        """The sum of the terms."""
        return sum(self.terms().values())

    @property
    def least_bytes(self) -> int:
        """Base and what is trained: what no smaller batch can save."""
        return self.weights_bytes + self.trained_bytes

    def to_json(self) -> dict[str, int]:
        """Plain values, the total included."""
        named = {f"{name.replace(' ', '_')}_bytes": size for name, size in self.terms().items()}
        return {**named, "trained_bytes": self.trained_bytes, "total_bytes": self.total_bytes}

    def __str__(self) -> str:
        terms = (f"{name} {format_bytes(size)}" for name, size in self.terms().items() if size)
        return f"about {format_bytes(self.total_bytes)} ({', '.join(terms)})"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingEstimate:
    """What a training step takes.

    Attributes:
        memory: at its fullest moment.
        counts: of the step; None where it could not be run without memory.
    """

    memory: MemoryEstimate
    counts: StepCounts | None


def estimate_training(
    model: PreTrainedModel, method: Method, batch: BatchShape, setup: TrainingSetup
) -> TrainingEstimate:
    """Run a step of the very model and method on tensors without memory, and count.

    Where all blocks are alike, two short copies of the model are run and the difference between
    them is added for every block that is left out. Changes nothing.

    Args:
        model: the base on the meta device.
        method: what is trained; a fresh one is built from its options.
        batch: the largest batch.
        setup: how the numbers are held.

    Raises:
        SpecError, TargetError: the method cannot do this on this model.
    """
    report = _planned(model, method)
    key = (_identity(model), method.name, repr(method.options()), batch, setup)
    if key not in _counted:
        if len(_counted) >= _MAX_COUNTED:
            _counted.clear()
        _counted[key] = _try_to_count(model, method, batch, setup)
    counts, notes = _counted[key]
    memory = _static(model, report, setup)
    if counts is not None:
        peak = counts.peak
        memory = replace(
            memory,
            gradients_bytes=round(peak.get(GRADIENTS, 0)),
            activations_bytes=round(peak.get(ACTIVATIONS, 0)),
            logits_bytes=round(peak.get(LOGITS, 0)),
            working_bytes=round(peak.get(WORKING, 0)),
            allocator_bytes=_kept_by_the_allocator(peak, setup),
        )
    return TrainingEstimate(memory=replace(memory, notes=notes), counts=counts)


def _kept_by_the_allocator(peak: Peak, setup: TrainingSetup) -> int:
    if setup.device != "cpu" or sys.platform != "linux" or setup.checkpointing:
        return 0
    return round(_KEPT_BY_THE_ALLOCATOR * peak.get(ACTIVATIONS, 0))


# What was counted in this process: a comparison or a sweep asks for the same again and again.
_counted: dict[object, tuple[StepCounts | None, tuple[str, ...]]] = {}
_MAX_COUNTED = 64


def _identity(model: PreTrainedModel) -> str:
    shapes = [(name, tuple(p.shape)) for name, p in model.named_parameters()]
    return f"{type(model).__name__} {model.config.to_json_string()} {shapes}"


def _try_to_count(
    model: PreTrainedModel, method: Method, batch: BatchShape, setup: TrainingSetup
) -> tuple[StepCounts | None, tuple[str, ...]]:
    """The counts, or what the user should know where there are none."""
    try:
        return _count(_prepared(copy.deepcopy(model), method, setup), batch, setup), ()
    except LorakitError:
        raise
    except Exception as error:
        # An architecture whose forward pass asks for values cannot be run without them.
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        name = type(model).__name__
        return None, (f"activations and logits are not counted for {name}: {reason}",)


def _planned(model: PreTrainedModel, method: Method) -> TrainableReport:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LorakitWarning)
        return build_method(method.name, method.options()).plan(model)


def _static(
    model: PreTrainedModel, report: TrainableReport, setup: TrainingSetup
) -> MemoryEstimate:
    """The terms that do not depend on the batch; all gradients, and no activations."""
    num_base = sum(p.numel() for p in model.parameters())
    num_added = report.num_total - num_base
    num_of_base = report.num_trainable - num_added
    wide = torch.promote_types(setup.dtype, torch.float32).itemsize
    learned_bytes = num_added * wide + num_of_base * setup.dtype.itemsize
    # The report counts what is kept in the dtype of the model it was made on.
    kept_bytes = report.kept_bytes * setup.dtype.itemsize // model.dtype.itemsize
    weights_bytes = num_base * setup.dtype.itemsize
    if setup.four_bit:
        weights_bytes = estimate_nf4_bytes(model, setup.dtype)
    return MemoryEstimate(
        weights_bytes=weights_bytes,
        adapter_bytes=num_added * wide,
        kept_bytes=kept_bytes,
        optimizer_bytes=_MOMENTS * learned_bytes,
        gradients_bytes=learned_bytes,
        activations_bytes=0,
        logits_bytes=0,
        working_bytes=0,
        trained_bytes=num_added * wide + kept_bytes + (_MOMENTS + 1) * learned_bytes,
    )


def await_no_data(model: PreTrainedModel) -> None:
    """Let factors that start from data count as started: a step costs what it will; mutates it."""
    for module in model.modules():
        if isinstance(module, LowRank):
            module.awaits_data = False


def _prepared(model: PreTrainedModel, method: Method, setup: TrainingSetup) -> PreTrainedModel:
    """The model as a run would have it before its first step, but for its norms; mutates it."""
    packed = keep_in(model, setup.dtype, four_bit=setup.four_bit)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LorakitWarning)
        build_method(method.name, method.options()).attach(model)
    await_no_data(model)
    if any(layer.weight.requires_grad for layer in packed):
        raise SpecError(
            f"{method.name} trains the base's own weights: 4-bit numbers have no gradient",
            where="quantize and method",
            expected="an adapter beside the 4-bit base (lora), or a dense base",
            remedy="take the method lora, or leave quantize out",
        )
    attention = setup.attention
    if attention is None and setup.device == "cpu" and head_of(model) and can_pack(model):
        attention = GROUPED
    if attention is not None:
        use_attention(model, attention)
    use_fast_layers(model)
    if setup.checkpointing:
        checkpoint_activations(model)
    model.train()
    return model


def _count(model: PreTrainedModel, batch: BatchShape, setup: TrainingSetup) -> StepCounts:
    blocks = repeated_blocks(model)
    if blocks is None:
        return _count_one(model, None, batch, setup)
    few = max(2, blocks.period)
    more = few + blocks.period
    if more + blocks.period >= blocks.count:
        return _count_one(model, blocks, batch, setup)
    short = _count_one(shortened(model, blocks, few), blocks, batch, setup)
    longer = _count_one(shortened(model, blocks, more), blocks, batch, setup)
    return _extended(short, longer, (blocks.count - few) / blocks.period)


def _count_one(
    model: PreTrainedModel, blocks: Blocks | None, batch: BatchShape, setup: TrainingSetup
) -> StepCounts:
    if setup.device == "cpu":
        make_ready(model)
    mode = FakeTensorMode()
    become_fake(model, mode)
    name = None if blocks is None else blocks.name
    return count_step(model, mode, batch, blocks=name, bf16=setup.bf16)


def _extended(short: StepCounts, longer: StepCounts, times: float) -> StepCounts:
    """What grows from the shorter model to the longer one, added `times` to the shorter one."""

    def line(a: float, b: float) -> float:
        return a + (b - a) * times

    def peak(a: Peak, b: Peak) -> Mapping[str, float]:
        return {n: line(a.get(n, 0), b.get(n, 0)) for n in dict.fromkeys([*a, *b])}

    return StepCounts(
        peaks={
            name: peak(short.peaks[name], longer.peaks[name])
            for name in STRETCHES
            if name in short.peaks and name in longer.peaks
        },
        forward_flops=line(short.forward_flops, longer.forward_flops),
        backward_flops=line(short.backward_flops, longer.backward_flops),
    )


def free_memory_bytes(device: torch.device) -> int:
    """The memory (bytes) a run on this device can take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_memory_bytes()


def require_room(estimate: MemoryEstimate, free_bytes: int) -> None:
    """Refuse a run that cannot fit: base, adapter and optimizer alone exceed what is free.

    Raises:
        MemoryPlanError: they do.
    """
    if estimate.least_bytes > free_bytes:
        raise MemoryPlanError(
            "the run does not fit in memory",
            where="model and method",
            expected=f"at least {format_bytes(estimate.least_bytes)}; {estimate}",
            found=f"{format_bytes(free_bytes)} free",
            remedy="set model.dtype to bfloat16 or model.quantize to nf4, or use a smaller model, "
            "rank or target, or a method that trains less",
        )
