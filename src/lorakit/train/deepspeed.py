"""DeepSpeed's settings for a run, carried out with FSDP2 (DeepSpeed itself is not used).

What ZeRO-3 is for beside an adapter is that the frozen base is split over the processes; that is
what `sharded` does. Stages 1 and 2 split the optimizer's state and the gradients: those of an
adapter are small, and every process keeps them whole. A number that the settings fix and the run
has otherwise is refused, so that no file says what did not happen; "auto" is the run's number.

The settings are those of https://www.deepspeed.ai/docs/config-json, named by accelerate's
environment variables (`accelerate launch --use_deepspeed --deepspeed_config_file FILE`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.errors import ConfigError
from lorakit.files import read_json
from lorakit.processes import Processes
from lorakit.train.config import TrainConfig
from lorakit.train.sharded import Sharding, is_set

_ASKED = "ACCELERATE_USE_DEEPSPEED"
_FILE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"
_SPLITS_PARAMETERS = 3
_SCHEDULES = {"warmuplr": "constant", "warmupdecaylr": "linear", "warmupcosinelr": "cosine"}
_ADAMW = frozenset({"adam", "adamw"})
# They say how DeepSpeed's engine goes about it, or what it prints, never what is computed.
_ENGINE = frozenset(
    {
        "activation_checkpointing",
        "comms_logger",
        "communication_data_type",
        "flops_profiler",
        "steps_per_print",
        "wall_clock_breakdown",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
    }
)
_READ = frozenset(
    {
        "bf16",
        "fp16",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "optimizer",
        "scheduler",
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "zero_optimization",
    }
)


@dataclass(frozen=True, slots=True)
class DeepSpeedSettings:
    """What DeepSpeed's settings come to.

    Attributes:
        sharding: how the base is split; None keeps it whole in each process.
        notes: what the user should know, one sentence each.
    """

    sharding: Sharding | None
    notes: tuple[str, ...]


def deepspeed_asked(config: TrainConfig, processes: Processes) -> DeepSpeedSettings | None:
    """What accelerate's settings say of DeepSpeed, or None; takes them out of the environment.

    They are taken out because transformers and accelerate would start DeepSpeed's engine, which
    also splits what is learned: no process could save a whole adapter.

    Raises:
        ConfigError: the file cannot be read; it fixes a number that the run has otherwise; or it
            asks for what no run here does.
    """
    if not is_set(_ASKED):
        return None
    where = os.environ.get(_FILE, "")
    named = where not in ("", "none", "None")
    settings = _read(Path(where)) if named else _from_environment()
    del os.environ[_ASKED]
    place = where if named else "accelerate's settings"
    _require_same(settings, config, processes, place)
    zero = _section(settings, "zero_optimization", place)
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, _SPLITS_PARAMETERS):
        raise ConfigError(
            "there is no such stage of ZeRO",
            where=f"{place}: zero_optimization.stage",
            expected="0, 1, 2 or 3",
            found=repr(stage),
        )
    sharding = _sharding(zero, place) if stage == _SPLITS_PARAMETERS else None
    if processes.alone:
        sharding = None
    notes = tuple(_notes(settings, stage, sharding, processes))
    return DeepSpeedSettings(sharding=sharding, notes=notes)


def _read(path: Path) -> Mapping[str, Any]:
    try:
        settings = read_json(path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            "DeepSpeed's settings cannot be read",
            where=str(path),
            expected="a JSON file (deepspeed_config_file)",
            found=str(error),
        ) from error
    if not isinstance(settings, Mapping):
        raise ConfigError(
            "DeepSpeed's settings are not an object",
            where=str(path),
            expected='{"zero_optimization": {"stage": 3}, ...}',
            found=type(settings).__name__,
        )
    return settings


def _from_environment() -> Mapping[str, Any]:
    """The same settings as accelerate passes them on without a file; its stage is 2 by default."""

    def said(name: str) -> str:
        return os.environ.get(f"ACCELERATE_{name}", "auto")

    stage = said("DEEPSPEED_ZERO_STAGE")
    device = said("DEEPSPEED_OFFLOAD_PARAM_DEVICE")
    return {
        "zero_optimization": {
            "stage": int(stage) if stage.isdecimal() else 2 if stage == "auto" else stage,
            "offload_param": {"device": "none" if device == "auto" else device},
        },
        "gradient_accumulation_steps": _number(said("GRADIENT_ACCUMULATION_STEPS")),
        "gradient_clipping": _number(said("GRADIENT_CLIPPING")),
    }


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return "auto"


def _section(settings: Mapping[str, Any], key: str, place: str) -> Mapping[str, Any]:
    found = settings.get(key) or {}
    if not isinstance(found, Mapping):
        raise ConfigError(
            f"{key} is not an object", where=f"{place}: {key}", found=type(found).__name__
        )
    return found


def _sharding(zero: Mapping[str, Any], place: str) -> Sharding:
    device = str(_section(zero, "offload_param", place).get("device", "none")).lower()
    if device not in ("none", "cpu"):
        raise ConfigError(
            "shards of the base wait on the device or in the host's memory, not on a disk",
            where=f"{place}: zero_optimization.offload_param.device",
            expected="none or cpu",
            found=device,
            remedy="take cpu, or model.quantize: nf4",
        )
    return Sharding(offload=device == "cpu")


def _require_same(
    settings: Mapping[str, Any], config: TrainConfig, processes: Processes, place: str
) -> None:
    """Refuse settings that fix what the run has otherwise."""
    for key, fixed, ours, name in _fixed(settings, config, processes, place):
        if fixed in ("auto", None) or _equal(fixed, ours):
            continue
        raise ConfigError(
            "DeepSpeed's settings and the run's disagree",
            where=f"{place}: {key}, and {name}",
            expected=f"{ours!r}, or auto" if ours is not None else "auto, or nothing",
            found=repr(fixed),
            remedy=f"change one of them; {name} is what counts",
        )


def _fixed(
    settings: Mapping[str, Any], config: TrainConfig, processes: Processes, place: str
) -> Iterator[tuple[str, object, object, str]]:
    """(DeepSpeed's key, its value, the run's value, the run's key)."""
    train = config.train
    rows, forwards = train.batch_size, train.gradient_accumulation
    for key, ours, name in (
        ("train_micro_batch_size_per_gpu", rows, "train.batch_size"),
        ("gradient_accumulation_steps", forwards, "train.gradient_accumulation"),
        (
            "train_batch_size",
            rows * forwards * processes.num,
            "train.batch_size x train.gradient_accumulation x processes",
        ),
        # DeepSpeed's 0 does not clip either.
        ("gradient_clipping", train.max_grad_norm or 0.0, "train.max_grad_norm"),
    ):
        yield key, settings.get(key), ours, name
    yield (
        "fp16.enabled",
        _section(settings, "fp16", place).get("enabled"),
        False,
        "train.precision (fp32 or bf16)",
    )
    if train.precision != "auto":
        half = _section(settings, "bf16", place).get("enabled")
        yield "bf16.enabled", half, train.precision == "bf16", "train.precision"
    yield from _fixed_optimizer(_section(settings, "optimizer", place), config, place)
    yield from _fixed_schedule(_section(settings, "scheduler", place), config, place)


def _fixed_optimizer(
    optimizer: Mapping[str, Any], config: TrainConfig, place: str
) -> Iterator[tuple[str, object, object, str]]:
    train, params = config.train, _section(optimizer, "params", f"{place}: optimizer")
    kind = optimizer.get("type")
    if kind is not None and str(kind).lower() not in _ADAMW:
        yield "optimizer.type", kind, "AdamW", "train.optimizer"
    for key, ours in (
        ("lr", train.lr),
        ("weight_decay", train.weight_decay),
        ("betas", train.adam_betas),
        ("eps", train.adam_eps),
    ):
        name = f"train.{'adam_' if key in ('betas', 'eps') else ''}{key}"
        yield f"optimizer.params.{key}", params.get(key), ours, name


def _fixed_schedule(
    scheduler: Mapping[str, Any], config: TrainConfig, place: str
) -> Iterator[tuple[str, object, object, str]]:
    kind, train = scheduler.get("type"), config.train
    if kind is None:
        return
    ours = next(name for name, same in _SCHEDULES.items() if same == train.schedule)
    same = str(kind).lower() == ours
    yield "scheduler.type", None if same else kind, train.schedule, "train.schedule"
    for key, fixed in _section(scheduler, "params", f"{place}: scheduler").items():
        wanted = {"warmup_min_lr": 0.0, "warmup_max_lr": train.lr, "warmup_type": "linear"}
        if key == "warmup_num_steps" and not train.warmup_ratio:
            wanted[key] = train.warmup_steps
        yield f"scheduler.params.{key}", fixed, wanted.get(key), "train.schedule and train.warmup_*"


def _equal(fixed: object, ours: object) -> bool:
    if isinstance(ours, tuple):
        return isinstance(fixed, list | tuple) and tuple(fixed) == ours
    if isinstance(fixed, bool) or isinstance(ours, bool):
        return fixed is ours
    if isinstance(fixed, int | float) and isinstance(ours, int | float):
        return math.isclose(fixed, ours)
    return fixed == ours


def _notes(
    settings: Mapping[str, Any], stage: int, sharding: Sharding | None, processes: Processes
) -> Iterator[str]:
    if sharding is not None:
        kept = ", its shards in the host's memory" if sharding.offload else ""
        yield f"DeepSpeed's ZeRO-3: the frozen base is split with torch's FSDP2 instead{kept}"
    elif stage == _SPLITS_PARAMETERS and processes.alone:
        yield "DeepSpeed's ZeRO-3: one process has nothing to split"
    else:
        yield (
            f"DeepSpeed's ZeRO-{stage}: each process keeps the base, and the adapter's gradients "
            "and optimizer state, whole"
        )
    unused = sorted(settings.keys() - _READ - _ENGINE)
    if unused:
        yield f"DeepSpeed's settings that are not used: {', '.join(unused)}"
