"""Run as a process of its own: train, and die (SIGKILL) at one exact place.

python killed_run.py DIRECTORY PLACE STEP
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny_runs
from lorakit.train.checkpoints import CheckpointStore
from lorakit.train.run import train
from lorakit.train.trainer import AdapterTrainer

# place -> (class, method): death comes when the method is entered at that step.
PLACES = {
    "second batch of a step": (AdapterTrainer, "training_step"),
    "before the checkpoint": (AdapterTrainer, "_save_checkpoint"),
    "inside the checkpoint": (AdapterTrainer, "_save_rng_state"),
    "after the checkpoint": (CheckpointStore, "_rotate"),
}


def die_at(place: str, step: int) -> None:
    owner, method = PLACES[place]
    original = getattr(owner, method)
    num_calls = 0

    def deadly(self, *args):
        nonlocal num_calls
        now = args[0] if owner is CheckpointStore else self.state.global_step
        num_calls += now == step
        second = place.startswith("second")
        if now == step and num_calls == 1 + second:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *args)

    setattr(owner, method, deadly)


def go_slowly() -> None:
    """Slow enough for a signal from outside to arrive in the middle of the run."""
    training_step = AdapterTrainer.training_step

    def slowly(self, *args):
        time.sleep(0.1)
        return training_step(self, *args)

    AdapterTrainer.training_step = slowly


def run(order: dict[str, Any]) -> int:
    with Path(order["stderr"]).open("w") as stream:
        os.dup2(stream.fileno(), 2)
    if order["place"] == "slow":
        go_slowly()
    else:
        die_at(order["place"], order["step"])
    try:
        train(tiny_runs.config(Path(order["directory"]), output=order["output"]))
    except Exception as error:
        print(error, file=sys.stderr, flush=True)
        return getattr(error, "exit_code", 1)
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            os._exit(run(json.loads(line)))
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
