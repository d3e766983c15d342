"""Run as a process of its own: each line on the standard input starts a server in a fork.

The line says what is served, and where; the server's process id is printed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from lorakit.serve.auth import Keys
from lorakit.serve.request import EngineOptions
from lorakit.serve.run import ListenOptions
from lorakit.serve.start import ServeSettings, serve


def run(order: dict[str, Any]) -> None:
    """Serve until somebody kills it."""
    with Path(order["stderr"]).open("w") as stream:
        os.dup2(stream.fileno(), 2)
    os.dup2(2, 1)
    settings = ServeSettings(
        model=order["base"],
        name="tiny",
        engine=EngineOptions(adapters_dir=Path(order["adapters"])),
        listen=ListenOptions(port=order["port"]),
        keys=Keys(admin="root"),
    )
    serve(settings, on_ready=lambda _service, _url: None)


if __name__ == "__main__":
    torch.set_num_threads(1)
    # Nobody waits for the dead.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            run(json.loads(line))
            os._exit(0)
        print(pid, flush=True)
