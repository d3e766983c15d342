"""One training step without memory: what it would keep, and how many operations it does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from lorakit.layers.chunked_loss import chunked_cross_entropy
from lorakit.layers.fused import frozen_parameters
from lorakit.layers.packed import Packing
from lorakit.layers.prefix import prompts_before
from lorakit.models.packing import takes_packed
from lorakit.planner.ledger import Ledger, Peak

ACTIVATIONS, LOGITS, GRADIENTS, WORKING = "activations", "logits", "gradients", "working"
# The stretches of a step; in each, the fullest moment grows by the same with every block.
FORWARD, LOSS, LAST_BLOCK, MIDDLE, FIRST_BLOCK = "forward", "loss", "last", "middle", "first"
STRETCHES = (FORWARD, LOSS, LAST_BLOCK, FIRST_BLOCK)


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchShape:
    """The largest batch of a run.

    Attributes:
        rows: rows in one forward pass.
        length: tokens in the longest row.
        labels: learned tokens in the batch at most.
    """

    rows: int
    length: int
    labels: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCounts:
    """What one forward and backward pass takes, the weights left out.

    Attributes:
        peaks: the fullest moment of each stretch: bytes by what they are. Activations are made in
            the forward pass, logits by head and loss, gradients belong to learned tensors, working
            is the rest.
        forward_flops: floating-point operations of the forward pass.
        backward_flops: of the backward pass, recomputation included.
    """

    peaks: Mapping[str, Peak]
    forward_flops: float
    backward_flops: float

    @property
    def peak(self) -> Peak:
        """The fullest moment of all."""
        return max(self.peaks.values(), key=lambda peak: sum(peak.values()))

    @property
    def peak_bytes(self) -> float:
        """The sum at the fullest moment."""
        return sum(self.peak.values())

    @property
    def flops(self) -> float:
        """Operations of the whole step."""
        return self.forward_flops + self.backward_flops


def count_step(
    model: PreTrainedModel,
    mode: FakeTensorMode,
    batch: BatchShape,
    *,
    blocks: str | None,
    bf16: bool,
) -> StepCounts:
    """Run a step on fake tensors and count.

    Args:
        model: fake (see `planner.fake`), with a method attached; in train mode.
        mode: of its tensors.
        batch: the batch.
        blocks: name of the list of the model's blocks, if it has one.
        bf16: whether the forward pass is autocast to bfloat16.
    """
    with mode:
        targets = torch.zeros(batch.labels, dtype=torch.long)
    inputs = _packed(model, mode, batch) if takes_packed(model) else _padded(model, mode, batch)
    tensors = [value for value in tree_leaves(inputs) if isinstance(value, Tensor)]
    packing = inputs.get("packing")
    if isinstance(packing, Packing):
        tensors += [v for v in vars(packing).values() if isinstance(v, Tensor)]
    ledger = Ledger([*model.parameters(), *model.buffers(), *tensors, targets])
    with contextlib.ExitStack() as hooks:
        _note_gradients(model, ledger, hooks)
        if blocks is not None:
            _note_blocks(model.get_submodule(blocks), ledger, hooks)
        with mode, ledger:
            ledger.enter(ACTIVATIONS, FORWARD)
            cast = torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext()
            with cast:
                loss = _loss(model, ledger, inputs, targets)
            ledger.enter(WORKING, LOSS)
            loss.backward()
    del loss
    for parameter in model.parameters():
        parameter.grad = None
    return StepCounts(
        peaks={name: ledger.peaks[name] for name in STRETCHES if name in ledger.peaks},
        forward_flops=ledger.flops[ACTIVATIONS] + ledger.flops[LOGITS],
        backward_flops=ledger.flops[WORKING],
    )


def _padded(model: PreTrainedModel, mode: FakeTensorMode, batch: BatchShape) -> dict[str, Any]:
    shape = (batch.rows, batch.length)
    with mode:
        inputs = {
            "input_ids": torch.zeros(shape, dtype=torch.long),
            "attention_mask": torch.ones(shape, dtype=torch.long),
        }
        if model.config.is_encoder_decoder:
            answer = (batch.rows, max(1, -(-batch.labels // batch.rows)))
            inputs["decoder_input_ids"] = torch.zeros(answer, dtype=torch.long)
    return inputs


def _packed(model: PreTrainedModel, mode: FakeTensorMode, batch: BatchShape) -> dict[str, Any]:
    """The batch as `models.packing` makes it, with nothing shared between its rows."""
    with mode:
        rows = (batch.length,) * batch.rows
        packing = Packing(rows, (-1,) * batch.rows, torch.device("cpu"))
        return {
            "input_ids": torch.zeros((1, packing.num_tokens), dtype=torch.long),
            "position_ids": packing.positions[None],
            "attention_mask": torch.zeros(1, 1, 1, 1),
            "packing": packing,
        }


def _call(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
    arguments: dict[str, Any] = dict(inputs)
    if head_of(model) is not None:
        arguments["use_cache"] = False
    with prompts_before(model, inputs["input_ids"]):
        found = model(**arguments)
    return found.logits if "logits" in found else found[0]


def head_of(model: PreTrainedModel) -> nn.Module | None:
    """The language-modelling head, or None."""
    head = model.get_output_embeddings()
    return head if isinstance(head, nn.Module) else None


def _loss(
    model: PreTrainedModel, ledger: Ledger, inputs: Mapping[str, Any], targets: Tensor
) -> Tensor:
    """The loss as `models.label_head` takes it: at the labels alone, in chunks where it can be."""
    head = head_of(model)
    if head is None:
        outputs = _call(model, inputs)
        ledger.enter(LOGITS, LOSS)
        return outputs.float().square().mean()
    frozen = frozen_parameters(head)
    seen = _AtHead(ledger, targets, catch=frozen is not None)
    handles = [
        head.register_forward_pre_hook(seen.before),
        head.register_forward_hook(seen.after),
    ]
    try:
        outputs = _call(model, inputs)
        if frozen is not None and outputs is seen.output and seen.hidden is not None:
            return chunked_cross_entropy(seen.hidden, *frozen, targets) / max(1, len(targets))
        if frozen is not None:
            # The model does something to its logits: they are needed whole.
            del outputs
            seen.catch, seen.hidden, seen.output = False, None, None
            ledger.enter(ACTIVATIONS, FORWARD)
            outputs = _call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    seen.output = None
    logits = outputs.float().flatten(0, -2)
    del outputs
    total = F.cross_entropy(logits[: len(targets)], targets, reduction="sum")
    return total / max(1, len(targets))


class _AtHead:
    """What the head is given: the labelled positions; or none of them, and they stay here."""

    def __init__(self, ledger: Ledger, targets: Tensor, *, catch: bool) -> None:
        self.catch = catch
        self.hidden: Tensor | None = None
        self.output: Tensor | None = None
        self._ledger = ledger
        self._targets = targets

    def before(self, _head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Forward pre-hook."""
        self._ledger.enter(LOGITS, LOSS)
        chosen = args[0].flatten(0, -2).index_select(0, self._targets)
        if self.catch:
            self.hidden = chosen
            chosen = chosen[:0].detach()
        return (chosen.unsqueeze(0), *args[1:])

    def after(self, _head: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        """Forward hook."""
        self.output = output if isinstance(output, Tensor) else None


def _note_gradients(model: nn.Module, ledger: Ledger, hooks: contextlib.ExitStack) -> None:
    """Count a gradient as one as soon as it stands beside its parameter."""

    def note(parameter: Tensor) -> None:
        if parameter.grad is not None:
            ledger.move(parameter.grad, GRADIENTS)

    for parameter in model.parameters():
        if parameter.requires_grad:
            hooks.callback(parameter.register_post_accumulate_grad_hook(note).remove)


def _note_blocks(blocks: nn.Module, ledger: Ledger, hooks: contextlib.ExitStack) -> None:
    """Say when the backward pass reaches the output of each block."""
    count = len(list(blocks.children()))

    def entered(stretch: str) -> Callable[[Tensor], None]:
        def note(_gradient: Tensor) -> None:
            ledger.enter(WORKING, stretch)

        return note

    def watch(stretch: str) -> Callable[..., None]:
        def note(_block: nn.Module, _args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            # Not in a recomputation: that belongs to the stretch it happens in.
            if ledger.phase == ACTIVATIONS and hidden.requires_grad:
                hidden.register_hook(entered(stretch))

        return note

    for index, block in enumerate(blocks.children()):
        stretch = MIDDLE
        if index == 0:
            stretch = FIRST_BLOCK
        elif index == count - 1:
            stretch = LAST_BLOCK
        hooks.callback(block.register_forward_hook(watch(stretch)).remove)
