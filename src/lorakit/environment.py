"""What this machine is: versions, hardware, memory, and what its processor can do."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import resource
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypedDict

import psutil
import torch

from lorakit.errors import ModelError

_PACKAGES = (
    "lorakit",
    "torch",
    "transformers",
    "accelerate",
    "safetensors",
    "tokenizers",
    "datasets",
    "gguf",
    "numpy",
    "peft",
    "bitsandbytes",
)
# What decides the speed and the arithmetic of the matrix products on a CPU.
_INSTRUCTION_SETS = (
    "avx2",
    "avx512_f",
    "avx512_bf16",
    "avx512_vnni",
    "avx512_fp16",
    "amx_bf16",
    "amx_int8",
)
_CGROUP_ROOT = Path("/sys/fs/cgroup")
# What stands for a place of this machine in a command that others are to run.
_PLACES = {"--data": "DIR", "--output": "FILE"}


class Gpu(TypedDict):
    """One CUDA device."""

    name: str
    memory_bytes: int
    compute_capability: str


class Hardware(TypedDict):
    """The machine as it is written into a run record."""

    cpu: str
    num_cores: int
    num_threads: int
    memory_bytes: int
    instruction_sets: list[str]
    gpus: list[Gpu]


def versions() -> dict[str, str]:
    """The versions of Python, the system and the installed packages that decide a result."""
    found = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> Hardware:
    """The processor, its useful instruction sets, the memory (bytes) and the CUDA devices."""
    return {
        "cpu": _cpu_model(),
        "num_cores": num_cores(),
        "num_threads": torch.get_num_threads(),
        "memory_bytes": total_memory_bytes(),
        "instruction_sets": _instruction_sets(),
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())],
    }


def num_cores() -> int:
    """The cores this process may run on (its affinity, not the machine's count)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def peak_memory_bytes() -> int:
    """The most memory (bytes) this process has held so far: resident, plus CUDA where used."""
    peak_bytes = _status_bytes("VmHWM")
    if peak_bytes is None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        # The kernel counts in KiB on Linux and in bytes on macOS.
        peak_bytes = peak if sys.platform == "darwin" else peak * 1024
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        peak_bytes += sum(
            torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count())
        )
    return int(peak_bytes)


def memory_bytes() -> int:
    """The memory (bytes) this process holds now: resident, plus CUDA where used."""
    held_bytes = psutil.Process().memory_info().rss
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        held_bytes += sum(
            torch.cuda.memory_allocated(index) for index in range(torch.cuda.device_count())
        )
    return int(held_bytes)


def _status_bytes(key: str) -> int | None:
    """A size in /proc/self/status, or None where there is none.

    getrusage's maximum outlives exec: a small process that a large one started would report the
    large one's.
    """
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    for line in text.splitlines():
        name, _, rest = line.partition(":")
        if name == key:
            return int(rest.split()[0]) * 1024
    return None


def total_memory_bytes() -> int:
    """The memory (bytes) this process could ever have: the machine's, or its container's limit."""
    limits = [limit for limit, _ in _cgroup_memory(_CGROUP_ROOT)]
    return min([psutil.virtual_memory().total, *limits])


def available_memory_bytes() -> int:
    """The memory (bytes) this process can still take, on the machine and within its container."""
    rooms = [max(0, limit - used) for limit, used in _cgroup_memory(_CGROUP_ROOT)]
    return min([psutil.virtual_memory().available, *rooms])


def return_freed_memory() -> None:
    """Give freed memory back to the system, where the C library (glibc) keeps it for later."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def supports_bf16(device: str | torch.device | None = None) -> bool:
    """Whether bfloat16 products run in hardware on the device (default: where models load)."""
    kind = default_device().type if device is None else torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if kind == "cpu":
        return bool({"avx512_bf16", "amx_bf16"} & set(_instruction_sets()))
    return False


def require_device(device: str | torch.device | None) -> torch.device:
    """The device of that name, or the default one.

    Raises:
        ModelError: there is no such device, here or at all.
    """
    if device is None:
        return default_device()
    try:
        found = torch.device(device)
        # What torch cannot reach on this machine, it says when it puts something there.
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(
            "this machine cannot compute there",
            where=f"device {str(device)!r}",
            expected="cpu, or cuda where torch finds one",
            found=str(error).partition("\n")[0],
            remedy=f"leave the device out: {default_device()} is taken",
        ) from error
    return found


def default_device() -> torch.device:
    """The CUDA device of this process if there is one, else the CPU.

    Of several processes on a machine each has its own; otherwise it is the first.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    here = int(os.environ.get("LOCAL_RANK", "0"))
    return torch.device("cuda", here % torch.cuda.device_count())


def _instruction_sets() -> list[str]:
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if capabilities:
        return [name for name in _INSTRUCTION_SETS if capabilities.get(name)]
    checks = {
        "avx2": torch.cpu._is_avx2_supported,
        "avx512_f": torch.cpu._is_avx512_supported,
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported,
        "avx512_vnni": torch.cpu._is_vnni_supported,
    }
    return [name for name, check in checks.items() if check()]


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _gpu(index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "memory_bytes": int(properties.total_memory),
        "compute_capability": f"{properties.major}.{properties.minor}",
    }


def _cgroup_memory(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, used) in bytes of every control group with a memory limit that this process is in."""
    for directory in _cgroup_directories(root):
        for limit_file, used_file in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit = _read_int(directory / limit_file)
            used = _read_int(directory / used_file)
            # Version 1 writes "no limit" as a number near 2^63.
            if limit is None or used is None or limit >= 1 << 60:
                continue
            yield limit, used - _reclaimable_bytes(directory)


def _cgroup_directories(root: Path) -> Iterator[Path]:
    """The control groups of this process from the innermost to the root, versions 1 and 2."""
    membership = Path("/proc/self/cgroup")
    if not root.is_dir() or not membership.is_file():
        return
    seen: set[Path] = set()
    for line in membership.read_text(encoding="utf-8").splitlines():
        _, controllers, name = [*line.split(":", 2), "", ""][:3]
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "memory" if controllers else root
        here = top / name.lstrip("/")
        for directory in (here, *here.parents):
            if directory not in seen:
                seen.add(directory)
                yield directory
            if directory == top:
                break


def _reclaimable_bytes(directory: Path) -> int:
    # Page cache counts as used, but the kernel gives it up before it refuses an allocation.
    try:
        text = (directory / "memory.stat").read_text(encoding="utf-8")
    except OSError:
        return 0
    values = dict(line.split(" ", 1) for line in text.splitlines() if " " in line)
    value = values.get("inactive_file", values.get("total_inactive_file", "0"))
    return int(value)


def _read_int(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="utf-8").strip())
    except (OSError, ValueError):
        return None


def command_line(places: Mapping[str, str] = _PLACES) -> str:
    """The command this process was started with, as another machine can run it.

    The program is named without its directory, a script as `python` and its path in the project.

    Args:
        places: option -> what stands for its value, which is a place of this machine.
    """
    program = Path(sys.argv[0])
    words = [program.name]
    if program.name == "__main__.py":
        words = [program.parent.name]
    elif program.suffix == ".py":
        words = ["python", "/".join(program.parts[-2:])]
    given = sys.argv[1:]
    for before, word in zip(["", *given], given, strict=False):
        key, equals, _ = word.partition("=")
        if equals and f"--{key}" in places:
            words.append(f"{key}={places[f'--{key}']}")
        else:
            words.append(places.get(before, word))
    return shlex.join(words)
