"""What each means of the training speed brings alone, and what is lost without it.

One process, one model (SmolLM2-135M-Instruct, LoRA r=8 on all linear layers) and the same E2E rows
for all; a round goes through the settings in an order of its own, one forward and backward pass
over every batch each. "alone" is added to the general path, together with what it stands on;
"without" is taken from all of them. Memory is the peak of the pass above what is held before it.

    python benchmarks/train_means.py --data DIR
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import gzip
import json
import random
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import PreTrainedModel

import lorakit as lk
from lorakit.data.collate import Collator
from lorakit.data.options import SftOptions
from lorakit.data.sampling import LengthGroupedSampler
from lorakit.data.sft import build_examples
from lorakit.data.sources import load_rows
from lorakit.environment import command_line, hardware, versions
from lorakit.files import write_json
from lorakit.layers.rms_norm import use_fast_norms, use_own_norms
from lorakit.models.attention import use_attention
from lorakit.models.fast_layers import use_fast_layers, use_own_layers
from lorakit.models.label_head import LabelHead
from train_speed import INSTRUCTION, RESULTS

Batch = dict[str, Tensor]

MEANS = {
    "labels": "logits at the labels alone",
    "chunks": "their loss in chunks, its gradient taken in the forward pass",
    "linear": "one autograd function for a linear layer and its update",
    "norms": "RMS norms that keep their input alone",
    "grouped": "attention with the query heads of a key head in one product",
    "lengths": "rows of similar length in a batch",
    "packed": "no padding: a batch is one row of real tokens",
    "shared": "the start that all rows have in common once",
    "layers": "one autograd function for a whole decoder layer",
    "threads": "each core takes some of the rows through the whole model",
}
STANDS_ON = {
    "chunks": ("labels",),
    # Under whole logits its memory is not seen.
    "norms": ("labels", "chunks"),
    "packed": ("labels", "grouped"),
    "shared": ("labels", "grouped", "packed"),
    "layers": ("labels", "grouped", "packed"),
    "threads": ("labels", "chunks", "grouped", "packed"),
}


def settings() -> dict[str, frozenset[str]]:
    """Every setting and its means: none, each alone, all, and all without one."""
    found = {"none": frozenset[str]()}
    found |= {f"{name} alone": frozenset({name, *STANDS_ON.get(name, ())}) for name in MEANS}
    everything = frozenset(MEANS)
    found["all"] = everything
    for name in MEANS:
        needed_by = {other for other, under in STANDS_ON.items() if name in under}
        if not needed_by:
            found[f"without {name}"] = everything - {name}
    return found


@contextmanager
def switched(model: PreTrainedModel, means: frozenset[str]) -> Iterator[LabelHead]:
    """The model and its loss with these means and no others; mutates the model."""
    use_own_layers(model)
    use_own_norms(model)
    use_attention(model, "grouped" if "grouped" in means else "sdpa")
    if "norms" in means:
        use_fast_norms(model)
    if "layers" in means:
        use_fast_layers(model)
    head = LabelHead(model)
    # What the first batch of a run would find out.
    head._checked, head._plain_head = True, "chunks" in means
    head._full, head._packs = "labels" not in means, "packed" in means
    with ExitStack() as stack:
        if "linear" not in means:
            stack.enter_context(patch("lorakit.layers.adapted.fused_forward", lambda *_: None))
        if "shared" not in means:
            stack.enter_context(patch("lorakit.models.packing.drops", lambda _model: True))
        if "threads" not in means:
            stack.enter_context(patch("lorakit.models.label_head.row_groups", _together))
        yield head


def _together(_model: Any, batch: Batch, **_: Any) -> list[list[int]]:
    return [list(range(len(batch["labels"])))]


def main() -> None:
    """Measure every setting, print the table, write the result."""
    args = _arguments()
    torch.set_num_threads(args.threads)
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    model, tokenizer = lk.load_model("smollm2-135m-instruct", dtype=dtype)
    torch.manual_seed(args.seed)
    lk.attach(model, lk.LoraSpec(r=8, alpha=16, targets="all-linear"))
    model.train()
    batches = _batches(args, tokenizer)
    chosen = settings()
    seconds: dict[str, list[float]] = {name: [] for name in chosen}
    peaks: dict[str, int] = {}
    losses: dict[str, float] = {}
    order = random.Random(args.seed)
    for number in range(args.rounds):
        for name in order.sample(list(chosen), len(chosen)):
            given = batches["lengths" in chosen[name]]
            with switched(model, chosen[name]) as head:
                peak, found_s, losses[name] = _pass(model, head, given, dtype)
            seconds[name].append(found_s)
            peaks[name] = max(peak, peaks.get(name, 0))
        print(f"round {number + 1} of {args.rounds}", flush=True)
    _require_equal(losses, 1e-4 if dtype == torch.float32 else 0.03)
    _write(args, chosen, seconds, peaks)


def _pass(
    model: PreTrainedModel, head: LabelHead, batches: list[Batch], dtype: torch.dtype
) -> tuple[int, float, float]:
    """Peak bytes above the start, seconds, and the mean loss of all rows."""
    held = _settle()
    total, num_labels = 0.0, 0
    started = time.perf_counter()
    for batch in batches:
        count = int((batch["labels"][:, 1:] != -100).sum())
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = head.loss(batch, num_items=count)
        loss.backward()
        total, num_labels = total + loss.item() * count, num_labels + count
        for parameter in model.parameters():
            parameter.grad = None
    return _status("VmHWM") - held, time.perf_counter() - started, total / num_labels


def _settle() -> int:
    """Give freed memory back, start the peak anew; what is held now, in bytes."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def _require_equal(losses: dict[str, float], tolerance: float) -> None:
    for name, loss in losses.items():
        if abs(loss - losses["none"]) > tolerance:
            raise SystemExit(f"{name}: loss {loss:.6f}, where none has {losses['none']:.6f}")


def _batches(args: argparse.Namespace, tokenizer: Any) -> dict[bool, list[Batch]]:
    """The same rows in batches of mixed (False) and of similar (True) length."""
    with gzip.open(args.data / "train.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = random.Random(args.seed).sample(
            [json.loads(line) for line in file], args.batch_size * args.batches
        )
    path = args.output.with_suffix(".rows.jsonl")
    texts = [{"prompt": INSTRUCTION + r["context"], "completion": r["ref"]} for r in rows]
    path.write_text("".join(json.dumps(text) + "\n" for text in texts), encoding="utf-8")
    try:
        examples = build_examples(load_rows(path), tokenizer, SftOptions())
    finally:
        path.unlink()
    collate = Collator(tokenizer.pad_token_id or 0)
    found: dict[bool, list[Batch]] = {}
    for grouped in (False, True):
        sampler = LengthGroupedSampler(
            examples.lengths, args.batch_size, seed=args.seed, grouped=grouped
        )
        found[grouped] = [collate([examples[i] for i in b]) for b in sampler.batches(0)]
    return found


def _write(
    args: argparse.Namespace,
    chosen: dict[str, frozenset[str]],
    seconds: dict[str, list[float]],
    peaks: dict[str, int],
) -> None:
    table: dict[str, Any] = {}
    print(f"{'':<18}{'speed':>7}{'rounds':>16}{'memory':>11}")
    for name, means in chosen.items():
        ratios = [a / b for a, b in zip(seconds["none"], seconds[name], strict=True)]
        table[name] = {
            "means": sorted(means),
            "speed_ratio": round(statistics.median(ratios), 3),
            "speed_ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
            "seconds": [round(s, 3) for s in seconds[name]],
            "peak_bytes": peaks[name],
            "memory_ratio": round(peaks[name] / peaks["none"], 3),
        }
        low, high = table[name]["speed_ratio_range"]
        print(
            f"{name:<18}{table[name]['speed_ratio']:>7.2f}{f'{low:.2f} to {high:.2f}':>16}"
            f"{peaks[name] / 2**20:>7.0f} MiB"
        )
    result = {
        "benchmark": "train_means",
        "command": command_line(),
        "note": args.note,
        "means": MEANS,
        "setting": {
            "model": "smollm2-135m-instruct",
            "adapter": "LoRA r=8, alpha=16, all linear layers",
            "precision": args.precision,
            "threads": args.threads,
            "batch_size": args.batch_size,
            "batches": args.batches,
            "rounds": args.rounds,
            "seed": args.seed,
        },
        "settings": table,
        "hardware": hardware(),
        "versions": versions(),
    }
    write_json(args.output, result)
    print(f"written to {args.output}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="directory of the E2E data set")
    parser.add_argument("--output", type=Path, default=RESULTS / "train_means.json")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--note", help="what else a reader should know of this run")
    return parser.parse_args()


if __name__ == "__main__":
    main()
