"""One arm of a measuring script in a process of its own, and the handle its parent holds.

`train_speed.py` and `preference_speed.py` are the scripts.

The arm trains with whatever Trainer it has; a callback of all Trainers holds it before each step
until the parent says so, and measures the step. Before the first step it gives the arm's losses on
fixed batches with fixed factors.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import re
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any, TextIO

SETTING = "LORAKIT_TRAIN_ARM"
# What `lorakit.pages` sets for the verbs that train.
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
_FACTOR = re.compile(r"layers\.(\d+)\.\w+\.(\w+)\..*lora_([AB])")


class Worker:
    """The parent's handle: one line in, one line out."""

    def __init__(self, setting: dict[str, Any]) -> None:
        threads = str(setting["threads"])
        environment = {
            **os.environ,
            SETTING: json.dumps(setting),
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "TOKENIZERS_PARALLELISM": "false",
        }
        environment[HUGE_PAGES] = "1" if setting["huge_pages"] else "0"
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if setting["verbose"] else subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self._name = setting["arm"]

    def read(self) -> dict[str, Any]:
        """What the arm says next; waits for it."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._name} ended with status {self._process.wait()}")
        return json.loads(line)

    def step(self) -> dict[str, float]:
        """One optimizer step."""
        self._say("step")
        return self.read()

    def finish(self) -> dict[str, Any]:
        """The arm's peak memory, and its profile if it makes one."""
        self._say("finish")
        return self.read()

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()

    def _say(self, word: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()


def main() -> None:
    """Run the arm that the environment names."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever prints must not be taken for an answer
    setting = json.loads(os.environ[SETTING])
    import torch
    import transformers

    torch.set_num_threads(setting["threads"])
    arm = importlib.import_module(setting.get("module", "train_arms")).Arm(setting)
    pacer = _pacer(setting, arm, answers)
    transformers.trainer.DEFAULT_CALLBACKS.append(pacer)
    arm.train()


def _pacer(setting: dict[str, Any], arm: Any, answers: TextIO) -> type:
    from transformers import Trainer, TrainerCallback

    trainers: list[Any] = []
    run = Trainer.train

    def train(self: Trainer, *args: Any, **options: Any) -> Any:
        trainers.append(self)
        return run(self, *args, **options)

    Trainer.train = train  # type: ignore[method-assign]

    class Pacer(TrainerCallback):
        started = 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            trainer = trainers[-1]
            losses = _at_start(trainer, arm) if setting.get("checks_start") else []
            losses += _losses(trainer, arm) if setting["checks"] else []
            trainer.model.zero_grad()
            _give_back()
            base_bytes = _status("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
            _answer(answers, {"losses": losses, "base_bytes": base_bytes})
            self.wait()

        def wait(self) -> None:
            word = sys.stdin.readline().strip()
            if word != "step":
                found = {"peak_bytes": _status("VmHWM"), "profile": arm.profiled()}
                _answer(answers, found)
                os._exit(0)
            arm.before_step()
            self.started = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            seconds = time.perf_counter() - self.started
            arm.after_step()
            _answer(
                answers,
                {
                    "seconds": seconds,
                    "rows": setting["batch_size"],
                    "tokens": arm.tokens_per_step,
                    "loss": 0.0,
                },
            )
            self.wait()

    return Pacer


def _losses(trainer: Any, arm: Any) -> list[float]:
    """The trainer's own losses of fixed batches with fixed factors; one goes backwards too."""
    import torch

    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            found = _FACTOR.search(name)
            if found is not None and parameter.requires_grad:
                generator = torch.Generator().manual_seed(zlib.crc32(repr(found.groups()).encode()))
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(0.02 * noise)
    trainer.model.train()
    losses = []
    for batch in arm.batches():
        loss = _loss(trainer, batch)
        losses.append(round(float(loss), 6))
    loss.backward()
    return losses


def _at_start(trainer: Any, arm: Any) -> list[float]:
    """The losses of the same batches with the factors as they start."""
    import torch

    trainer.model.train()
    with torch.no_grad():
        return [round(float(_loss(trainer, batch)), 6) for batch in arm.batches()]


def _loss(trainer: Any, batch: dict[str, Any]) -> Any:
    with trainer.compute_loss_context_manager():
        return trainer.compute_loss(trainer.model, dict(batch))


def _answer(answers: TextIO, found: dict[str, Any]) -> None:
    answers.write(json.dumps(found) + "\n")
    answers.flush()


def _give_back() -> None:
    """Freed memory back to the system, so that the peak is the steps' own."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {key}: memory is measured on Linux")


if __name__ == "__main__":
    main()
