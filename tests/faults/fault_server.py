"""Run as a process of its own: do some work, and let the n-th file operation of it be the last.

Each line on the standard input is an order; a fork carries it out, so that nothing is imported
twice. "kill" ends the process there as SIGKILL does: nothing is cleaned up; "moment" is a SIGKILL
from outside, so many seconds after the start, wherever the process is then. ENOSPC and EACCES make
that operation, and every later one that would write, fail as a full disk or a read-only directory
does; "size" is a limit on every file, which writes in Rust and C++ meet too, in their middle.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from lorakit.adapters.adapter import Adapter
from lorakit.compare.beside import train_beside
from lorakit.errors import LorakitError
from lorakit.files import write_json
from lorakit.formats.peft import write_adapter
from lorakit.merging.run import MergeRequest, merge_to_disk
from lorakit.sweep.config import SweepConfig
from lorakit.sweep.run import sweep
from lorakit.train.config import TrainConfig
from lorakit.train.run import train

# What changes a directory. Writes of safetensors happen in Rust and are not seen; the directory
# that they go to is made, flushed and renamed in Python.
_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "shutil.rmtree")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Fault:
    """Counts the file operations below a directory, and fails the n-th."""

    def __init__(self, root: str, at: int, how: str) -> None:
        self.root = root
        self.at = at
        self.how = how
        self.count = 0

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        """An audit hook."""
        path = self._path(event, args)
        if path is None:
            return
        self.count += 1
        if self.how == "kill" and self.count == self.at:
            os._exit(137)
        # What rmtree refuses is refused by the operations in it.
        fails = event in ("open", "os.mkdir")
        fails |= self.how == "EACCES" and event != "shutil.rmtree"
        if self.how in ("ENOSPC", "EACCES") and self.count >= self.at and fails:
            number = getattr(errno, self.how)
            raise OSError(number, os.strerror(number), path)

    def _path(self, event: str, args: tuple[Any, ...]) -> str | None:
        """What is changed below the directory; None for everything else."""
        if event == "ctypes.dlsym" and args[1] == "renameat2":
            return self.root  # the exchange of two directories comes next
        changes = event in _CHANGES or (event == "open" and args[2] & _WRITES)
        if not changes or not isinstance(args[0], str | os.PathLike):
            return None
        path = os.fspath(args[0])
        return path if self.root in path else None


def work(order: dict[str, Any]) -> None:
    """What is interrupted."""
    output = order["output"]
    if order["work"] == "save":
        write_adapter(Adapter.load(order["source"]), Path(output), replace=True)
    elif order["work"] == "record":
        write_json(output, {"new": True, "filler": "x" * 5000})
    elif order["work"] == "merge":
        adapter = Path(order["adapter"])
        merge_to_disk(MergeRequest(adapter=adapter, base=order["base"], output=Path(output)))
    elif order["work"] == "sweep":
        sweep(SweepConfig.from_dict({**order["config"], "output": output}), say=lambda _line: None)
    elif order["work"] == "beside":
        # What the process of a comparison does that trains several cells together.
        train_beside(
            [
                TrainConfig.from_dict({**config, "output": f"{output}/{name}"})
                for name, config in order["configs"].items()
            ]
        )
    else:
        config = TrainConfig.from_dict({**order["config"], "output": output})
        train(config, resume=order["resume"], say=lambda _line: None)


def carry_out(order: dict[str, Any]) -> int:
    """The exit code: 0 done, 2 a LorakitError, 3 another error (a failure of the test)."""
    with Path(order["stderr"]).open("w") as stream:
        os.dup2(stream.fileno(), 2)
    fault = Fault(order["root"], order["at"], order["how"])
    sys.addaudithook(fault)
    code, said = 0, ""
    try:
        with largest_file(order["at"] if order["how"] == "size" else None):
            work(order)
    except LorakitError as error:
        code, said = 2, str(error)
    except BaseException:
        code, said = 3, traceback.format_exc()
    finally:
        fault.how = "over"
    Path(order["stderr"]).write_text(said or str(fault.count))
    return code


@contextmanager
def largest_file(limit: int | None) -> Iterator[None]:
    """No write goes beyond so many bytes of a file inside the block; None: the system's limit."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, before if limit is None else (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def wait(pid: int, order: dict[str, Any]) -> int:
    """The exit code of the process that carries out an order, 137 where it was killed."""
    if order["how"] == "moment":
        time.sleep(order["at"])
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    return 137 if code == -signal.SIGKILL else code


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os._exit(carry_out(order))
        print(wait(pid, order), flush=True)
