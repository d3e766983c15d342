"""What does not go together with several processes, and why."""

from __future__ import annotations

from lorakit.adapters.spec import MOVING
from lorakit.errors import ConfigError
from lorakit.processes import Processes
from lorakit.train.config import TrainConfig
from lorakit.train.sharded import require_sharding


def require_processes(config: TrainConfig, processes: Processes, *, sharded: bool) -> None:
    """Refuse a run whose result would be another one in several processes.

    Args:
        config: the run.
        processes: those that train it.
        sharded: whether they split the base.

    Raises:
        ConfigError: with the key that stands against it.
    """
    if processes.alone:
        return
    if sharded:
        require_sharding(config)
    if config.lora.ranks == MOVING:
        raise ConfigError(
            "ranks that move while they learn are decided in one process",
            where="lora.ranks",
            expected="uniform, eva or gradient",
            found=f"adalora in {processes.num} processes",
            remedy="start it without a launcher: lorakit train CONFIG.yaml",
        )
    if config.task == "grpo":
        raise ConfigError(
            "processes that sample answers of their own wait for the longest; this is not in this "
            "version",
            where="task",
            expected="one process, or task: sft, classify, dpo or orpo",
            found=f"task: grpo in {processes.num} processes",
            remedy="start it without a launcher: lorakit train CONFIG.yaml",
        )
    if config.task == "kto":
        raise ConfigError(
            "kto measures its distance over a whole batch, and processes see only their share",
            where="task",
            expected="one process, or task: sft, classify, dpo or orpo",
            found=f"task: kto in {processes.num} processes",
            remedy="start it without a launcher: lorakit train CONFIG.yaml",
        )
