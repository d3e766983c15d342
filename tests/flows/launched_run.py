"""Run as a process of its own: trains in several processes as a launcher starts them.

Everything is imported once; an order (a line of JSON on stdin) forks the processes of a run, and
their exit codes are printed.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from lorakit.errors import LorakitWarning
from lorakit.train.config import TrainConfig
from lorakit.train.run import train
from lorakit.train.trainer import AdapterTrainer


def signal_at(step: int) -> None:
    """SIGTERM to this process alone, once, in the middle of the run."""
    training_step = AdapterTrainer.training_step
    steps = [step]

    def signalled(self, *args):
        if self.state.global_step in steps:
            steps.clear()
            os.kill(os.getpid(), signal.SIGTERM)
        return training_step(self, *args)

    AdapterTrainer.training_step = signalled


def run(order: dict[str, Any], rank: int, port: int) -> int:
    with Path(f"{order['stderr']}.{rank}").open("w") as stream:
        os.dup2(stream.fileno(), 2)
        os.dup2(stream.fileno(), 1)
    if order["num"] > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(order["num"]),
            "LOCAL_WORLD_SIZE": str(order["num"]),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    os.environ |= order.get("env", {})
    if order.get("signal") is not None and rank == order["num"] - 1:
        signal_at(order["signal"])
    warnings.simplefilter("default", LorakitWarning)
    try:
        train(TrainConfig.from_dict(order["values"]), resume=order.get("resume", False))
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return getattr(error, "exit_code", 99)
    return 0


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        order = json.loads(line)
        port = free_port()
        children = []
        for rank in range(order["num"]):
            pid = os.fork()
            if pid == 0:
                os._exit(run(order, rank, port))
            children.append(pid)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
        print(json.dumps(codes), flush=True)
