"""The time of a run: operations over a rate, which is stated or measured by one micro-step."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from lorakit.environment import available_memory_bytes
from lorakit.errors import MemoryPlanError, RequestError
from lorakit.formatting import format_bytes
from lorakit.layers.rms_norm import use_fast_norms
from lorakit.methods.base import Method
from lorakit.methods.registry import build_method
from lorakit.models.attention import GROUPED, use_attention
from lorakit.models.checkpointing import checkpoint_activations, return_freed_memory
from lorakit.models.fast_layers import use_fast_layers
from lorakit.models.label_head import LabelHead
from lorakit.models.load import model_class
from lorakit.models.packing import can_pack
from lorakit.planner.memory import TrainingEstimate, TrainingSetup, await_no_data
from lorakit.planner.step import BatchShape, head_of

_IGNORED = -100
_WARM_UP_STEPS, _TIMED_STEPS = 1, 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """What a micro-step says of this machine.

    Attributes:
        step_s: seconds of a step of that batch.
        flops_per_s: operations it did in a second.
    """

    step_s: float
    flops_per_s: float


def estimate_seconds(flops: float, flops_per_s: float) -> float:
    """The time of so many operations at a rate.

    Raises:
        RequestError: the rate is not positive.
    """
    if flops_per_s <= 0:
        raise RequestError(
            "the rate of operations must be positive", where="flops", found=f"{flops_per_s:g}"
        )
    return flops / flops_per_s


def calibrate(
    config: PretrainedConfig,
    method: Method,
    batch: BatchShape,
    setup: TrainingSetup,
    estimate: TrainingEstimate,
) -> Calibration:
    """Take three training steps on a model of this shape with random weights; the last two count.

    Args:
        config: of the base.
        method: what is trained; a fresh one is built from its options.
        batch: of every step.
        setup: how the numbers are held; dense, since random weights are not quantized.
        estimate: of the same run, for its operations and its memory.

    Raises:
        RequestError: 4-bit weights, or a model whose operations could not be counted.
        MemoryPlanError: the run does not fit here.
    """
    if setup.four_bit or estimate.counts is None:
        raise RequestError(
            "this run cannot be calibrated here",
            where="--calibrate",
            expected="dense weights, and a model whose steps can be counted",
            found="4-bit weights" if setup.four_bit else "; ".join(estimate.memory.notes),
            remedy="give the rate: --flops",
        )
    _require_room(estimate, setup)
    model = _random_model(config, setup)
    fresh = build_method(method.name, method.options())
    fresh.attach(model)
    await_no_data(model)
    use_fast_norms(model)
    use_fast_layers(model)
    if setup.checkpointing:
        checkpoint_activations(model)
        return_freed_memory(torch.device(setup.device))
    model.train()
    groups = fresh.param_groups(model, 1e-4)
    optimizer = torch.optim.AdamW(groups, fused=True)
    head = LabelHead(model) if head_of(model) is not None else None
    seconds: list[float] = []
    for _ in range(_WARM_UP_STEPS + _TIMED_STEPS):
        started = time.perf_counter()
        _step(model, head, batch, setup)
        optimizer.step()
        optimizer.zero_grad()
        if setup.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    step_s = min(seconds[_WARM_UP_STEPS:])
    return Calibration(step_s=step_s, flops_per_s=estimate.counts.flops / step_s)


def _require_room(estimate: TrainingEstimate, setup: TrainingSetup) -> None:
    if setup.device == "cuda":
        if not torch.cuda.is_available():
            raise RequestError(
                "there is no GPU here to calibrate on",
                where="--calibrate --device cuda",
                remedy="run it on the machine you plan for, or give the rate: --flops",
            )
        free_bytes = torch.cuda.mem_get_info()[0]
    else:
        free_bytes = available_memory_bytes()
    if estimate.memory.total_bytes > free_bytes:
        raise MemoryPlanError(
            "a step of this run does not fit in memory here",
            where="--calibrate",
            expected=str(estimate.memory),
            found=f"{format_bytes(free_bytes)} free",
            remedy="calibrate with a smaller batch, or give the rate: --flops",
        )


def _random_model(config: PretrainedConfig, setup: TrainingSetup) -> PreTrainedModel:
    own = copy.deepcopy(config)
    wanted: Any = model_class(own)
    # Where no architecture is named: one of transformers' Auto classes, which build themselves.
    named = issubclass(wanted, PreTrainedModel)
    model = wanted(own) if named else wanted.from_config(own)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(device=setup.device, dtype=setup.dtype)
    model.to(torch.device(setup.device))  # pyright: ignore[reportArgumentType]
    attention = setup.attention
    if attention is None and setup.device == "cpu" and head_of(model) and can_pack(model):
        attention = GROUPED
    if attention is not None:
        use_attention(model, attention)
    return model


def _step(
    model: PreTrainedModel, head: LabelHead | None, batch: BatchShape, setup: TrainingSetup
) -> None:
    vocabulary = int(model.config.get_text_config().vocab_size)
    shape = (batch.rows, batch.length)
    ids = torch.randint(min(10, vocabulary - 1), vocabulary, shape, device=setup.device)
    inputs: dict[str, Tensor] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.autocast(setup.device, torch.bfloat16, enabled=setup.bf16):
        if head is None:
            found = model(**inputs)
            outputs = found.logits if "logits" in found else found[0]
            loss = outputs.float().square().mean()
        else:
            labels = ids.clone()
            labels[:, : batch.length - max(1, batch.labels // batch.rows)] = _IGNORED
            loss = head.loss({**inputs, "labels": labels})
    loss.backward()
