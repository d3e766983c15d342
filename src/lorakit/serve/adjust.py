"""What a request does to its logits before a token is chosen: a bias, and penalties."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lorakit.serve.request import SamplingOptions


def needs_adjusting(options: SamplingOptions) -> bool:
    """Whether a request changes its logits at all."""
    return bool(
        options.logit_bias
        or options.repetition_penalty != 1.0
        or options.frequency_penalty
        or options.presence_penalty
    )


class Adjustments:
    """One answer's changes to the scores, in vLLM's order; knows what was generated.

    First `logit_bias` is added. Then scores of tokens that the prompt or the answer holds are
    divided (above zero) or multiplied (below) by `repetition_penalty` (Keskar et al. 2019,
    arXiv 1909.05858, section 4.1). Last, for tokens of the answer, c times there:
    score - c * frequency_penalty - presence_penalty (OpenAI's API reference).

    Args:
        options: the request's.
        prompt: its tokens.
    """

    def __init__(self, options: SamplingOptions, prompt: Sequence[int]) -> None:
        self._options = options
        self._held = set(prompt)  # tokens of the prompt and the answer
        self._counts: Counter[int] = Counter()

    def note(self, token: int) -> None:
        """The answer goes on with this token."""
        self._counts[token] += 1
        self._held.add(token)

    def apply(self, scores: Tensor) -> None:
        """Change the scores, (vocabulary,), in place."""
        options = self._options
        if options.logit_bias:
            ids, values = _columns(options.logit_bias.items(), scores)
            scores[ids] += values
        if options.repetition_penalty != 1.0 and self._held:
            ids = torch.tensor(list(self._held), device=scores.device)
            found, by = scores[ids], options.repetition_penalty
            scores[ids] = torch.where(found > 0, found / by, found * by)
        if self._counts and (options.frequency_penalty or options.presence_penalty):
            ids, counts = _columns(self._counts.items(), scores)
            scores[ids] -= counts * options.frequency_penalty + options.presence_penalty


def _columns(pairs: Iterable[tuple[int, float]], like: Tensor) -> tuple[Tensor, Tensor]:
    """Token ids, and their numbers."""
    first, second = zip(*pairs, strict=True)
    return (
        torch.tensor(first, device=like.device),
        torch.tensor(second, dtype=like.dtype, device=like.device),
    )
