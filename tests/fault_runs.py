"""What tests of injected faults share: the process that does the work, and what it left."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

# A kill at a file operation or at any moment; a full disk, met by Python's own writes only or, as a
# limit on the size of files, by every write; a directory that became read-only.
HOWS = ("kill", "moment", "ENOSPC", "size", "EACCES")
FAULT_SERVER = Path(__file__).with_name("faults") / "fault_server.py"


class Server:
    """The process of fault_server.py.

    Args:
        directory: below it the file operations count.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.stderr = directory / "stderr.txt"
        self.process = subprocess.Popen(
            [sys.executable, str(FAULT_SERVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, at: float, how: str, **order: Any) -> int:
        """Carry out an order; its exit code, 137 where it was killed.

        Args:
            at: see `strikes`.
            how: one of `HOWS`; anything else harms nothing.
            order: see `fault_server.work`.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        told = {"at": at, "how": how, "root": str(self.directory), "stderr": str(self.stderr)}
        self.process.stdin.write(json.dumps({**order, **told}) + "\n")
        self.process.stdin.flush()
        code = int(self.process.stdout.readline())
        assert code in (0, 2, 137), self.stderr.read_text()
        return code

    def count(self, **order: Any) -> int:
        """How many file operations it takes when nothing goes wrong."""
        assert self.run(0, "count", **order) == 0
        return int(self.stderr.read_text())


def strikes(server: Server, how: str, most: int, **order: Any) -> list[float]:
    """Where an order is struck, after it was carried out once without harm.

    Args:
        server: carries it out.
        how: "kill", "ENOSPC" and "EACCES" strike at a file operation, counted from 1: all of them,
            or a random choice; "moment" at so many seconds; "size" is a limit in bytes on every
            file.
        most: so many at most.
        order: see `fault_server.work`.
    """
    started = time.perf_counter()
    total = server.count(**order)
    longest_s = time.perf_counter() - started
    rng = random.Random(total)
    if how == "moment":
        return [longest_s * (i + rng.random()) / most for i in range(most)]
    if how == "size":
        return [rng.randrange(4096 if i % 2 else 1 << 17) for i in range(most)]
    if total <= most:
        return list(range(1, total + 1))
    return sorted(rng.sample(range(1, total + 1), most))


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """What an adapter's directory holds."""
    return load_file(path / "adapter_model.safetensors")


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    """Whether two files hold the same names and bits."""
    return one.keys() == two.keys() and all(one[name].equal(two[name]) for name in one)
