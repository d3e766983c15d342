"""How long an experiment may take: counted from its config and a few speeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from lorakit.compare.arms import Arm
from lorakit.compare.config import DEFAULT_SHARE, CompareConfig
from lorakit.paper.comparisons import comparison
from lorakit.paper.experiments import MINILM, SMOLLM2, Experiment, Part
from lorakit.paper.latency import LatencySettings, num_flops


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """What a machine does.

    Attributes:
        tokens_per_s: in training, by model; a pass without gradients is three times as fast.
        seconds_per_answer: of a written answer.
        start_s: of a run: load, read, save, score.
        flops: floating-point operations per second of a forward pass.
    """

    tokens_per_s: Mapping[str, float]
    seconds_per_answer: float
    start_s: float
    flops: float


# laptop: two cores with AMX, from committed and noted runs (SmolLM2: benchmarks/results/e2e.json).
# gpu: assumed, not measured.
SPEEDS = {
    "laptop": Speeds(
        tokens_per_s={MINILM: 3_900, SMOLLM2: 330}, seconds_per_answer=0.5, start_s=6, flops=1.5e11
    ),
    "gpu": Speeds(
        tokens_per_s={MINILM: 60_000, SMOLLM2: 40_000},
        seconds_per_answer=0.05,
        start_s=15,
        flops=2e13,
    ),
}
_FORWARD = 3.0


@lru_cache
def estimate_seconds(experiment: Experiment, scale: str) -> float:
    """How long the experiment may take at a scale, alone on its machine; pure.

    Comparisons that another experiment shares are counted in each.
    """
    speeds, chosen = SPEEDS[scale], experiment.scales[scale]
    if experiment.kind == "latency":
        return num_flops(LatencySettings.from_overrides(chosen.overrides)) / speeds.flops
    return sum(_of_part(part, comparison(part, chosen), speeds) for part in experiment.parts)


def _of_part(part: Part, config: CompareConfig, speeds: Speeds) -> float:
    return sum(_of_arm(arm, part, config, speeds) for arm in config.arms)


def _of_arm(arm: Arm, part: Part, config: CompareConfig, speeds: Speeds) -> float:
    tokens_per_s = speeds.tokens_per_s[part.model]
    steps = _steps(arm, part, config)
    search = config.lr_search
    short = search.steps or steps * (search.share or DEFAULT_SHARE)
    num_searches = len(arm.rates) if len(arm.rates) > 1 else 0
    training = _training(arm, part, config, tokens_per_s)
    seeds = len(config.seeds)
    seconds = num_searches * (speeds.start_s + training(short))
    seconds += seeds * (speeds.start_s + training(steps))
    if config.eval.data is None:
        return seconds
    scored = config.eval.limit or part.num_scored
    writes = part.model == SMOLLM2
    per_row = part.tokens / (_FORWARD * tokens_per_s) + writes * speeds.seconds_per_answer
    return seconds + seeds * scored * per_row


def _training(
    arm: Arm, part: Part, config: CompareConfig, tokens_per_s: float
) -> Callable[[float], float]:
    rows = _rows_per_step(arm)
    section = config.base["data"]
    share = section.get("validation_share") or 0.0
    held_out = config.rows.validation or share * (config.rows.train or part.num_rows)
    every = config.base["train"].get("eval_every") or float("inf")

    def seconds(steps: float) -> float:
        passes = 1 + steps // every
        learned = steps * rows * part.tokens
        return (learned + passes * held_out * part.tokens / _FORWARD) / tokens_per_s

    return seconds


def _steps(arm: Arm, part: Part, config: CompareConfig) -> float:
    if config.budget.steps is not None:
        return config.budget.steps
    rows = config.rows.train or part.num_rows
    return (config.budget.epochs or 0) * rows / _rows_per_step(arm)


def _rows_per_step(arm: Arm) -> int:
    train = arm.values["train"]
    return train.get("batch_size", 8) * train.get("gradient_accumulation", 1)
