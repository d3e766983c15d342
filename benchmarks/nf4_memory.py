"""What loading a base in 4 bits takes at its peak, beside loading it dense.

A random Llama is written in bfloat16. A process of its own loads it in each way and watches its
anonymous memory every millisecond; what it held before (Python, the libraries, a first model as
small as can be) is taken off. Pages of the mapped files are not counted: the system takes them
back when it likes.

    python benchmarks/nf4_memory.py --output benchmarks/results/nf4_memory.json

Without `--output` nothing is written.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lorakit.environment import command_line, hardware, versions
from lorakit.files import write_json
from lorakit.models.load import load_base_model
from lorakit.models.nf4 import quantization_of
from lorakit.weights.nf4 import bitsandbytes

# How each row loads: what `quantize` is, and the dtype computed in.
WAYS: dict[str, tuple[Literal["nf4"] | None, str]] = {
    "nf4, float32": ("nf4", "float32"),
    "nf4, bfloat16": ("nf4", "bfloat16"),
    "dense, bfloat16": (None, "bfloat16"),
    "dense, float32": (None, "float32"),
}
_EVERY_S = 0.001


def main() -> None:
    """Write the model, load it in each way, print the table, write the result."""
    args = _arguments()
    if args.watch:
        print(json.dumps(_watched(*args.watch)))
        return
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        small = _write_model(Path(scratch) / "small", layers=1, hidden=64, shard="1GB")
        big = _write_model(
            Path(scratch) / "big", layers=args.layers, hidden=args.hidden, shard=args.shard
        )
        rows = {way: _measure(small[0], big[0], way) for way in args.ways or WAYS}
    bf16_bytes = 2 * big[1]
    for way, row in rows.items():
        row["peak_share"] = row["peak_bytes"] / bf16_bytes
        row["held_share"] = row["held_bytes"] / bf16_bytes
        print(f"{way:>16}: peak {row['peak_share']:.3f}, held {row['held_share']:.3f}", end="")
        print(f" of {bf16_bytes / 1e6:.0f} MB in bfloat16, {row['seconds']:.1f} s")
    if args.output:
        write_json(args.output, _result(args, big[1], rows))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="peak memory of a 4-bit load")
    parser.add_argument("--layers", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--hidden", type=int, default=1024, help="default: %(default)s")
    parser.add_argument("--shard", default="200MB", help="of the checkpoint; default: %(default)s")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), help="default: all")
    parser.add_argument("--scratch", help="a directory for the models; default: the system's")
    parser.add_argument("--output", type=Path, help="write the result here")
    parser.add_argument("--watch", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def _write_model(directory: Path, *, layers: int, hidden: int, shard: str) -> tuple[Path, int]:
    """The directory and the number of parameters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        dtype="bfloat16",
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    model.save_pretrained(directory, max_shard_size=shard)
    return directory, sum(p.numel() for p in model.parameters())


def _measure(small: Path, big: Path, way: str) -> dict[str, Any]:
    words = [sys.executable, __file__, "--watch", str(small), str(big), way]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def _watched(small: str, big: str, way: str) -> dict[str, Any]:
    """Load the big model, having loaded the small one; bytes beyond what was held in between."""
    quantize, dtype = WAYS[way]
    bitsandbytes()
    load_base_model(small, quantize, dtype=dtype, device="cpu")
    gc.collect()
    before = peak = _anonymous_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, _anonymous_bytes())
            time.sleep(_EVERY_S)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    started = time.monotonic()
    model = load_base_model(big, quantize, dtype=dtype, device="cpu")
    seconds = time.monotonic() - started
    done.set()
    watcher.join()
    gc.collect()
    found = quantization_of(model)
    return {
        "peak_bytes": peak - before,
        "held_bytes": _anonymous_bytes() - before,
        "seconds": round(seconds, 2),
        "quantization": None if found is None else found.to_json(),
    }


def _anonymous_bytes() -> int:
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(next(x.split()[1] for x in text.splitlines() if x.startswith("RssAnon")))


def _result(args: argparse.Namespace, num_params: int, rows: dict[str, Any]) -> dict[str, Any]:
    return {
        "benchmark": "nf4_memory",
        "command": command_line(),
        "model": {"layers": args.layers, "hidden": args.hidden, "num_params": num_params},
        "bf16_bytes": 2 * num_params,
        "rows": rows,
        "versions": versions(),
        "hardware": hardware(),
    }


if __name__ == "__main__":
    main()
