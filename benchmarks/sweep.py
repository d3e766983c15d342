"""K adapters trained in one batch against one after the other, and against one adapter alone.

Three ways to take the same rows through a step, on one base with K LoRA adapters attached:

    together    one forward and backward pass of K x rows, each row with its own adapter
    in turn     K passes of `rows` rows, one adapter each: what K runs do one after the other
    one         one pass of K x rows with one adapter: a single run with as many rows in a step

Rounds go through the three, so that a ratio compares what was measured at about the same time. The
peak of memory is measured in a process of its own for each. Rows are random tokens of random
lengths, of which the last quarter is learned.

    python benchmarks/sweep.py
    python benchmarks/sweep.py --tiny     a few layers: does the script run
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import lorakit as lk
from lorakit.environment import command_line, hardware, memory_bytes, peak_memory_bytes, versions
from lorakit.files import write_json
from lorakit.layers.rms_norm import use_fast_norms
from lorakit.models.attention import GROUPED, use_attention
from lorakit.models.fast_layers import use_fast_layers
from lorakit.models.label_head import LabelHead
from lorakit.models.loss_share import LossShare
from lorakit.models.packing import can_pack

WAYS = ("together", "in turn", "one")
Step = Callable[[], None]
Row = list[int]


def main() -> None:
    """Measure, or give the peak of one way in a child process."""
    args = _arguments()
    if args.child:
        print(json.dumps(_peak(args)))
        return
    steps = _steps(args)
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(args.rounds):
        for way, step in steps.items():
            seconds[way].append(_timed(step))
    ratios = {way: _ratio(seconds[way], seconds["together"]) for way in WAYS[1:]}
    peaks = {way: _child(args, way) for way in WAYS}
    for way in WAYS:
        above = peaks[way]["peak_bytes"] - peaks[way]["base_bytes"]
        print(
            f"{way:9} {statistics.median(seconds[way]):.3f} s, {above / 2**20:.0f} MiB above base"
        )
    for way, ratio in ratios.items():
        low, high = ratio["range"]
        print(f"{way} / together: {ratio['median']:.2f} ({low:.2f} to {high:.2f})")
    result = {
        "benchmark": "sweep",
        "measured": not args.tiny,
        "command": command_line(),
        "adapters": args.adapters,
        "rows_each": args.rows,
        "length": args.length,
        "num_threads": torch.get_num_threads(),
        "step_s": seconds,
        "time_over_together": ratios,
        "memory": peaks,
        "hardware": hardware(),
        "versions": versions(),
    }
    write_json(args.output, result)
    print(f"written to {args.output}")


def _ratio(other: list[float], ours: list[float]) -> dict[str, Any]:
    each = [a / b for a, b in zip(other, ours, strict=True)]
    return {"median": statistics.median(each), "range": [min(each), max(each)]}


def _timed(step: Step) -> float:
    started = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _child(args: argparse.Namespace, way: str) -> dict[str, int]:
    options = ["--tiny"] if args.tiny else []
    for name in ("model", "adapters", "rows", "length", "rank"):
        options += [f"--{name}", str(vars(args)[name])]
    done = subprocess.run(
        [sys.executable, __file__, *options, "--child", way],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def _peak(args: argparse.Namespace) -> dict[str, int]:
    if args.child == "one":
        # A run of its own has one adapter, and one optimizer's state.
        args.adapters, args.rows = 1, args.adapters * args.rows
    model = _base(args)
    base_bytes = memory_bytes()
    step = _steps(args, model)[args.child]
    step()
    step()
    return {"base_bytes": base_bytes, "peak_bytes": peak_memory_bytes()}


def _base(args: argparse.Namespace) -> PreTrainedModel:
    if not args.tiny:
        model = lk.load_model(args.model)[0]
    else:
        torch.manual_seed(0)
        shape = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 128}
        config = LlamaConfig(
            **shape, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
        )
        model = LlamaForCausalLM(config)
    if model.device.type == "cpu" and can_pack(model):
        use_attention(model, GROUPED)
    return model


def _steps(args: argparse.Namespace, model: PreTrainedModel | None = None) -> dict[str, Step]:
    """The three ways; each is as `lorakit train` and `lorakit sweep` compute it."""
    model = _base(args) if model is None else model
    names = [f"member{i}" for i in range(args.adapters)]
    learned: dict[str, list[Tensor]] = {}
    for name in names:
        lk.attach(model, lk.LoraSpec(r=args.rank, alpha=2 * args.rank, targets="all-linear"), name)
        learned[name] = [p for p in model.parameters() if p.requires_grad]
    for tensors in learned.values():
        for tensor in tensors:
            tensor.requires_grad_(True)
    use_fast_norms(model)
    use_fast_layers(model)
    model.train()
    optimizers = {name: torch.optim.AdamW(tensors, lr=1e-4) for name, tensors in learned.items()}
    head = LabelHead(model)
    rng = random.Random(0)
    rows = [_row(rng, args.length, model.config.vocab_size) for _ in range(args.rows * len(names))]
    batches = [rows[i * args.rows : (i + 1) * args.rows] for i in range(len(names))]

    def run(batch: list[Row], selection: list[str] | str, used: list[str]) -> None:
        shares = [LossShare(len(batch) // len(used)) for _ in used]
        with lk.use(model, selection):
            torch.stack(head.losses(_collated(batch, model.device), shares)).sum().backward()
        for name in used:
            optimizers[name].step()
            optimizers[name].zero_grad()

    def in_turn() -> None:
        for name, batch in zip(names, batches, strict=True):
            run(batch, name, [name])

    each = [name for name in names for _ in range(args.rows)]
    # The first batch a head sees is compared with the full forward: here one adapter's.
    run(batches[0], names[0], names[:1])
    return {
        "together": lambda: run(rows, each, names),
        "in turn": in_turn,
        "one": lambda: run(rows, names[0], names[:1]),
    }


def _row(rng: random.Random, length: int, vocabulary: int) -> Row:
    return [rng.randrange(vocabulary) for _ in range(rng.randint(max(4, length // 4), length))]


def _collated(rows: list[Row], device: torch.device) -> dict[str, Tensor]:
    shape = (len(rows), max(map(len, rows)))
    ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, -100)
    for i, row in enumerate(rows):
        n, first = len(row), 3 * len(row) // 4
        ids[i, :n], mask[i, :n] = torch.tensor(row), 1
        labels[i, first:n] = ids[i, first:n]
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: value.to(device) for name, value in batch.items()}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rows", type=int, default=2, help="of each adapter in a step")
    parser.add_argument("--length", type=int, default=128, help="tokens of the longest row")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/sweep.json"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
