"""From a row's logits to its next token, with the row's own random numbers."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lorakit.errors import LorakitError, ServeError
from lorakit.serve.adjust import Adjustments, needs_adjusting
from lorakit.serve.request import SamplingOptions

# Sorting a whole vocabulary costs more than the forward pass of a small model; nearly always the
# tokens that top_p keeps are among these.
_FIRST_LOOK = 1024


class Constraint(Protocol):
    """What may come next in a constrained answer."""

    def allowed(self) -> Tensor:
        """(vocabulary,) bool on the CPU: the tokens that may come next."""
        ...

    def accept(self, token: int) -> None:
        """Go on behind this token."""
        ...


class RowSampler:
    """One request's own choice of tokens.

    The i-th sampled token uses the i-th number of the request's own generator, so it does not
    depend on which other requests are in the batch.

    Args:
        options: the request's.
        constraint: what may come next, or None for anything.
        prompt: the request's tokens; for its penalty on repetition.

    Attributes:
        adjustments: its changes to the logits, or None for none.
    """

    def __init__(
        self,
        options: SamplingOptions,
        constraint: Constraint | None = None,
        *,
        prompt: Sequence[int] = (),
    ) -> None:
        self.options = options
        self.constraint = constraint
        self.adjustments = Adjustments(options, prompt) if needs_adjusting(options) else None
        self._random = random.Random(options.seed)

    def uniform(self) -> float:
        """The next random number, in [0, 1)."""
        return self._random.random()


@dataclass(frozen=True, slots=True)
class Chosen:
    """A row's next token.

    Attributes:
        token: its id.
        logprob: log p of it by the model's own distribution; None if it was not asked for.
        top: the most likely tokens and their log p, best first.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def choose(logits: Tensor, rows: Sequence[RowSampler]) -> list[Chosen | LorakitError]:
    """The next token of every row.

    Args:
        logits: (rows, vocabulary), any floating dtype; not changed.
        rows: their samplers; a constraint accepts its row's token.

    Returns:
        One choice per row, or why there is none: the row alone fails.
    """
    scores = logits.float()
    allowed = _allowed(scores, rows)
    # The largest of a row with a NaN is NaN; minus infinity alone may be meant, but not everywhere.
    best = allowed.max(-1)
    greedy, largest = best.indices.tolist(), best.values.tolist()
    chosen: list[Chosen | LorakitError] = []
    for i, row in enumerate(rows):
        if not math.isfinite(largest[i]):
            chosen.append(
                ServeError(
                    "the model gave no probabilities for the next token",
                    expected="finite logits",
                    found=f"a largest logit of {largest[i]}",
                )
            )
            continue
        token = greedy[i] if row.options.temperature == 0 else _sample(allowed[i], row)
        if row.adjustments is not None:
            row.adjustments.note(token)
        try:
            if row.constraint is not None:
                row.constraint.accept(token)
        except LorakitError as error:
            chosen.append(error)
        else:
            chosen.append(_with_logprobs(scores[i], token, row.options.logprobs))
    return chosen


def _allowed(scores: Tensor, rows: Sequence[RowSampler]) -> Tensor:
    """The scores with a row's bias and penalties, and minus infinity where it may not go."""
    if all(row.constraint is None and row.adjustments is None for row in rows):
        return scores
    allowed = scores.clone()
    for i, row in enumerate(rows):
        if row.adjustments is not None:
            row.adjustments.apply(allowed[i])
        if row.constraint is not None:
            mask = row.constraint.allowed()[: scores.shape[1]].to(scores.device)
            allowed[i, : len(mask)].masked_fill_(~mask, float("-inf"))
            allowed[i, len(mask) :] = float("-inf")
    return allowed


def _with_logprobs(scores: Tensor, token: int, num_top: int | None) -> Chosen:
    if num_top is None:
        return Chosen(token)
    total = torch.logsumexp(scores, -1)
    own = float(scores[token] - total)
    if not num_top:
        return Chosen(token, own)
    values, ids = torch.topk(scores, min(num_top, len(scores)))
    pairs = zip(ids.tolist(), (values - total).tolist(), strict=True)
    return Chosen(token, own, tuple(pairs))


def _sample(scores: Tensor, row: RowSampler) -> int:
    """Inverse transform sampling from the tokens that top_k and top_p keep."""
    options = row.options
    # Below their greatest: the least temperature divides it too, and 0 stays 0.
    scaled = (scores.double() - scores.max()) / options.temperature
    if options.min_p > 0:
        least = scaled.max() + math.log(options.min_p)
        scaled = scaled.masked_fill(scaled < least, float("-inf"))
    if options.top_k == 0 and options.top_p == 1.0:
        return _draw(scaled.softmax(-1), None, row.uniform())
    count = len(scaled) if options.top_k == 0 else min(options.top_k, len(scaled))
    look = min(count, _FIRST_LOOK)
    values, ids = torch.topk(scaled, look)
    if options.top_k == 0:
        # Shares of the whole vocabulary; if the first look does not reach top_p, look at all of it.
        probs = (values - torch.logsumexp(scaled, -1)).exp()
        if look < count and float(probs.sum()) < options.top_p:
            values, ids = torch.sort(scaled, descending=True, stable=True)
            probs = values.softmax(-1)
    else:
        if look < count:
            values, ids = torch.topk(scaled, count)
        probs = values.softmax(-1)
    if options.top_p < 1.0:
        # A token stays while those before it have not reached top_p; the first always does.
        before = probs.cumsum(-1) - probs
        kept = max(1, int((before < options.top_p).sum()))
        probs, ids = probs[:kept], ids[:kept]
    return _draw(probs, ids, row.uniform())


def _draw(probs: Tensor, ids: Tensor | None, number: float) -> int:
    total = probs.cumsum(-1)
    target = torch.tensor(number, dtype=total.dtype, device=total.device) * total[-1]
    place = int(torch.searchsorted(total, target, right=True))
    place = min(place, len(total) - 1)
    if float(probs[place]) == 0.0:
        # Rounding put the number behind the last token that can be drawn.
        place = int(torch.nonzero(probs)[-1])
    return place if ids is None else int(ids[place])
