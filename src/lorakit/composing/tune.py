"""Choose the weights of a composition by a small search on validation rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedModel

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.attach import detach, use
from lorakit.adapters.bind import bind_adapter
from lorakit.adapters.composition.compose import compose_parts
from lorakit.adapters.composition.recipe import Part, Recipe, is_identity
from lorakit.errors import SpecError
from lorakit.evaluate.likelihood import Labelled, answer_nll

_FIRST_STEP = 0.5
_LAST_STEP = 0.1
_NAME = "trial"

Weights = tuple[float, ...]


@dataclass(slots=True)
class Tuned:
    """What a search found; perplexities on the validation rows.

    Attributes:
        names: the parts, in the order of the weights.
        weights: the best weights found.
        perplexity: with them.
        base: of the base alone.
        alone: of each part alone, neither thinned out nor cut off.
        trials: every composition that was tried: its weights and its perplexity.
    """

    names: tuple[str, ...]
    weights: Weights = ()
    perplexity: float = math.inf
    base: float = math.inf
    alone: dict[str, float] = field(default_factory=dict[str, float])
    trials: dict[Weights, float] = field(default_factory=dict[Weights, float])

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "weights": dict(zip(self.names, self.weights, strict=True)),
            "perplexity": self.perplexity,
            "base": self.base,
            "alone": self.alone,
            "trials": [
                {"weights": list(weights), "perplexity": value}
                for weights, value in self.trials.items()
            ],
        }


def require_tunable(parts: Sequence[Part], recipe: Recipe, max_trials: int) -> None:
    """Refuse a search that cannot be.

    Raises:
        SpecError: slerp, whose two weights are one number, or too few trials for the baselines.
    """
    if recipe.how == "slerp":
        raise SpecError(
            "slerp has one number to choose, not a weight per part",
            where="tune",
            remedy="tune another way, or try slerp at a few values by hand",
        )
    if max_trials < len(parts) + 2:
        raise SpecError(
            "the search needs a trial for the base, for each part alone, and for the start",
            where="max_trials",
            expected=f"at least {len(parts) + 2}",
            found=str(max_trials),
        )


def tune_weights(
    model: PreTrainedModel,
    parts: Sequence[Part],
    recipe: Recipe,
    examples: Sequence[Labelled],
    *,
    max_trials: int = 24,
    batch_size: int = 16,
) -> Tuned:
    """Search weights with the lowest perplexity on the examples, by moving one at a time.

    The base and each part alone, as it is, are tried first. From the best composition (the base and
    parts at weight 1 included) and the given weights, each weight is moved up and down by 0.5, then
    by halves of it down to 0.1, as long as it helps.

    Args:
        model: the base, nothing attached; left as it was.
        parts: the adapters; their weights are where the search starts.
        recipe: how they are composed at every trial.
        examples: validation rows with labels.
        max_trials: what is scored at most, the base and the parts included.
        batch_size: rows per forward pass.

    Raises:
        SpecError: see `require_tunable`, and what composing raises.
    """
    require_tunable(parts, recipe, max_trials)
    found = Tuned(tuple(part.name for part in parts))

    numbers = itertools.count(1)

    def measure(adapter: Adapter | None) -> float:
        label = f"trial {next(numbers)} of at most {max_trials}"
        return _perplexity(
            model, adapter, lambda: answer_nll(model, examples, batch_size=batch_size, label=label)
        )

    def score(weights: Weights) -> float:
        if weights not in found.trials:
            weighted = [replace(p, weight=w) for p, w in zip(parts, weights, strict=True)]
            made = compose_parts(weighted, recipe, base=model, quiet=True).adapter
            found.trials[weights] = measure(made)
        return found.trials[weights]

    # Thinned out or cut off, weight 1 of a part would not be that part.
    apart = [part.name for part in parts if not is_identity([replace(part, weight=1.0)], recipe)]
    num = len(parts)
    found.base = found.trials[(0.0,) * num] = measure(None)
    for i, part in enumerate(parts):
        found.alone[part.name] = measure(part.adapter)
        if part.name not in apart:
            found.trials[tuple(float(i == j) for j in range(num))] = found.alone[part.name]
    score(tuple(float(part.weight) for part in parts))
    found.weights = _climb(score, found.trials, max_trials - len(apart))
    found.perplexity = found.trials[found.weights]
    return found


def _climb(
    score: Callable[[Weights], float], trials: dict[Weights, float], max_trials: int
) -> Weights:
    best = min(trials, key=lambda weights: trials[weights])
    step = _FIRST_STEP
    while step >= _LAST_STEP:
        improved = False
        for i in range(len(best)):
            for direction in (step, -step):
                moved = (*best[:i], round(best[i] + direction, 6), *best[i + 1 :])
                if moved not in trials and len(trials) >= max_trials:
                    return best
                if score(moved) < trials[best]:
                    best, improved = moved, True
        step = step if improved else step / 2
    return best


def _perplexity(
    model: PreTrainedModel, adapter: Adapter | None, measure: Callable[[], Any]
) -> float:
    if adapter is None:
        with use(model, None):
            return _of(measure())
    # The parts were checked against this base when they were composed.
    bind_adapter(model, adapter, _NAME, any_base=True)
    try:
        return _of(measure())
    finally:
        detach(model, _NAME)


def _of(statistics: Any) -> float:
    nll, tokens = statistics.sum(axis=0)
    return float(math.exp(nll / tokens))
