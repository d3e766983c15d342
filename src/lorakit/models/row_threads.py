"""The rows of a batch in groups, one thread for each, on a CPU.

Torch spreads every operation over all cores and lets them wait for each other behind it, thousands
of times in a step. Rows do not depend on each other, so each core can take some of them through
the whole model, forward and backward, and they meet once: when the gradients are added. Those are
added in the order of the groups, so that a run gives the same numbers again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from threading import Barrier
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# A group this small leaves a core with little but the calls of its operations.
_LEAST_TOKENS = 128
# A prompt with more of a batch than this share of a thread's is answered in several threads.
_LARGEST_FAMILY = 1.2
# Every group has its own gradients of what is learned, next to the model's.
_MOST_LEARNED = 0.1

Losses = Callable[[int], Tensor]


def row_groups(model: nn.Module, batch: Mapping[str, Tensor], *, shared: int) -> list[list[int]]:
    """The rows that each thread takes, about as many tokens for each; one group if it does not pay.

    Args:
        model: what the batch is for.
        batch: with its attention_mask, (rows, positions).
        shared: tokens at the start of every row that are computed once for a group.
    """
    mask = batch["attention_mask"]
    every = list(range(mask.shape[0]))
    threads = min(torch.get_num_threads(), len(every))
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    if mask.device.type != "cpu" or threads < 2 or learned > _MOST_LEARNED * total:
        return [every]
    counts: list[int] = (mask.sum(1) - shared).tolist()
    # What a row adds to a group that has its prompt already is its answer.
    prompts = _prompts(batch)
    singles: dict[tuple[int, ...], int] = {(i,): counts[i] for i in every}
    families = _families(prompts, counts, shared) if prompts else singles
    if max(families.values()) > _LARGEST_FAMILY * sum(families.values()) / threads:
        families = singles
    groups: list[list[int]] = [[] for _ in range(threads)]
    sizes = [0] * threads
    for family in sorted(families, key=lambda rows: -families[rows]):
        place = sizes.index(min(sizes))
        groups[place] += family
        sizes[place] += families[family]
    if min(sizes) < max(_LEAST_TOKENS, 4 * shared):
        return [every]
    return [sorted(group) for group in groups]


def _prompts(batch: Mapping[str, Tensor]) -> list[tuple[int, ...]]:
    """The tokens of each row in front of its first label; none where nothing is known of labels."""
    if "labels" not in batch or "input_ids" not in batch:
        return []
    firsts = (batch["labels"] >= 0).long().argmax(1).tolist()
    rows = batch["input_ids"].tolist()
    return [tuple(row[:first]) for row, first in zip(rows, firsts, strict=True)]


def _families(
    prompts: Sequence[tuple[int, ...]], counts: Sequence[int], shared: int
) -> dict[tuple[int, ...], int]:
    """The rows of each prompt, and the tokens that they are together, the prompt counted once."""
    rows: dict[tuple[int, ...], list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(row)
    return {
        tuple(own): sum(counts[i] for i in own) - (len(own) - 1) * max(0, len(prompt) - 1 - shared)
        for prompt, own in rows.items()
    }


def sum_of_groups(num: int, loss_of: Losses, learned: Sequence[nn.Parameter]) -> Tensor:
    """The sum of the groups' losses, a float32 scalar with gradients for `learned`.

    Args:
        num: how many groups.
        loss_of: the loss of the i-th group; called in a thread of its own, whose operations run on
            that thread alone.
        learned: all parameters that require a gradient.
    """
    cast = _cast_here()

    def run(i: int) -> Tensor:
        with torch.enable_grad(), torch.autocast("cpu", cast or torch.bfloat16, enabled=bool(cast)):
            return loss_of(i)

    return _Groups.apply(num, run, *learned)  # pyright: ignore[reportReturnType]


class _Groups(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, num: int, run: Losses, *learned: Tensor) -> Tensor:
        ctx.losses = _in_threads(run, range(num))
        ctx.save_for_backward(*learned)
        return torch.stack([loss.detach() for loss in ctx.losses]).sum()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Any, ...]:
        learned = ctx.saved_tensors
        losses, ctx.losses = ctx.losses, None

        def gradients(loss: Tensor) -> tuple[Tensor | None, ...]:
            return torch.autograd.grad(loss, learned, grads[0], allow_unused=True)

        first, *others = _in_threads(gradients, losses)
        found = list(first)
        for other in others:
            for i, more in enumerate(other):
                mine = found[i]
                found[i] = more if mine is None else mine if more is None else mine + more
        return (None, None, *found)


def _cast_here() -> torch.dtype | None:
    """What this thread autocasts to on a CPU; other threads do not know of it."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None


def _in_threads(run: Callable[[Any], Any], tasks: Sequence[Any]) -> list[Any]:
    """Run the tasks at once, each on one core, and wait for all of them."""
    futures = [_threads(len(tasks)).submit(run, task) for task in tasks]
    wait(futures)
    return [future.result() for future in futures]


@cache
def _threads(num: int) -> ThreadPoolExecutor:
    """Threads whose operations are not spread: torch keeps that for each of them."""
    here = torch.get_num_threads()
    started = Barrier(num)

    def begin() -> None:
        torch.set_num_threads(1)
        started.wait()

    threads = ThreadPoolExecutor(num, "lorakit-rows")
    wait([threads.submit(begin) for _ in range(num)])
    # Threads that begin later would have one too.
    torch.set_num_threads(here)
    return threads
