"""What an adapter costs when a model answers, and what loading and switching cost, beside PEFT.

SmolLM2 with an r=8 adapter on all linear layers, one run, interleaved: every round times the base,
PEFT's model, lorakit's live one and the merged one in an order of its own, so that whatever
disturbs the machine disturbs all of them. All but the merged one share the base's weights.
A round's ratio is a variant over the same round's base; the base is timed twice, and the ratio of
the two is the noise.

    python benchmarks/inference.py --output benchmarks/results/inference.json
    python benchmarks/inference.py --parts load switch start    # some parts, printed
    python benchmarks/inference.py --parts shards --gigabytes 4
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lorakit as lk
from lorakit.environment import command_line, hardware, versions
from lorakit.files import write_json
from lorakit.planner.ledger import Ledger

MODEL = "smollm2-135m-instruct"
SPEC = lk.LoraSpec(r=8, targets="all-linear")
PARTS = ("forward", "load", "switch", "start", "shards")
PROMPT, DECODED = 256, 8
BASE, AGAIN, PEFT, LIVE, MERGED = "base", "base again", "peft", "lorakit live", "lorakit merged"


def main() -> None:
    """Measure the chosen parts, print them, write the result."""
    args = _arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        if {"forward", "load", "switch"} & set(args.parts):
            base = _base(path)
            if "forward" in args.parts:
                found["forward"] = _shown("forward", forward(base, path, args.rounds))
            if "load" in args.parts:
                found["load"] = _shown("load", load(base, path, args.rounds, args.adapters))
            if "switch" in args.parts:
                found["switch"] = _shown("switch", switch(base, path))
            del base
            gc.collect()
        if "start" in args.parts:
            found["start"] = _shown("start", start())
        if "shards" in args.parts:
            found["shards"] = _shown("shards", shards(path, args.gigabytes))
    if args.output is not None:
        _write(args.output, found, args)


def _base(folder: Path) -> nn.Module:
    """The base, and the adapter that every part uses, saved in `folder/adapter`."""
    base, _ = lk.load_model(MODEL)
    lk.attach(base, SPEC, "made")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.01 * torch.randn(parameter.shape, generator=generator))
    lk.save_adapter(base, folder / "adapter", "made")
    lk.detach(base)
    return base


def _shared(base: nn.Module) -> nn.Module:
    """Another model on the same parameters."""
    memo: dict[int, object] = {id(p): p for p in base.parameters()}
    return copy.deepcopy(base, memo)


def _variants(base: nn.Module, folder: Path) -> dict[str, nn.Module]:
    from peft import PeftModel

    live, merged = _shared(base), copy.deepcopy(base)
    lk.load_adapter(live, folder / "adapter")
    lk.load_adapter(merged, folder / "adapter")
    lk.merge(merged)
    lk.detach(merged)
    peft = PeftModel.from_pretrained(_shared(base), str(folder / "adapter"))
    found = {BASE: base, AGAIN: base, PEFT: peft, LIVE: live, MERGED: merged}
    return {name: model.eval() for name, model in found.items()}


def forward(base: nn.Module, folder: Path, rounds: int) -> dict[str, Any]:
    """A prompt of 256 tokens, and one-token steps behind it."""
    variants = _variants(base, folder)
    ids = torch.randint(10, 40_000, (1, PROMPT))
    seconds: dict[str, dict[str, list[float]]] = {
        kind: {name: [] for name in variants} for kind in ("prefill", "decode")
    }
    logits: dict[str, torch.Tensor] = {}
    order = list(variants)
    with torch.no_grad():
        for number in range(rounds + 1):
            random.Random(number).shuffle(order)
            for name in order:
                model = variants[name]
                begun = time.perf_counter()
                output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
                prefill_s = time.perf_counter() - begun
                token = output.logits[:, -1:].argmax(-1)
                cache = output.past_key_values
                begun = time.perf_counter()
                for _ in range(DECODED):
                    output = model(input_ids=token, past_key_values=cache, use_cache=True)
                decode_s = (time.perf_counter() - begun) / DECODED
                logits[name] = output.logits
                if number:  # the first round warms up
                    seconds["prefill"][name].append(prefill_s)
                    seconds["decode"][name].append(decode_s)
    worst = max(float((logits[n] - logits[PEFT]).abs().max()) for n in (LIVE, MERGED))
    return {
        "rounds": rounds,
        "prompt_tokens": PROMPT,
        "max_abs_logit_difference_to_peft": worst,
        **{kind: _ratios(times) for kind, times in seconds.items()},
    }


def _ratios(times: dict[str, list[float]]) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for name, measured in times.items():
        ratios = [mine / base for mine, base in zip(measured, times[BASE], strict=True)]
        rows[name] = {"seconds": _spread(measured), "over_base": _spread(ratios)}
    overheads = {n: rows[n]["over_base"]["median"] - 1 for n in (PEFT, LIVE)}
    rows["live_overhead_over_peft_overhead"] = overheads[LIVE] / overheads[PEFT]
    return rows


def load(base: nn.Module, folder: Path, rounds: int, num_adapters: int) -> dict[str, Any]:
    """Loading one adapter with both tools, in turn; then a hundred with ours."""
    from peft import PeftModel

    path = folder / "adapter"
    ours, peft = _shared(base), PeftModel.from_pretrained(_shared(base), str(path))
    lk.load_adapter(ours, path, "held")  # like PEFT's model, which is born with one
    seconds: dict[str, list[float]] = {"lorakit": [], "peft": []}
    for number in range(rounds + 1):
        mine = _timed(lambda: lk.load_adapter(ours, path, "next"))
        theirs = _timed(lambda: peft.load_adapter(str(path), "next"))
        lk.detach(ours, "next")
        peft.delete_adapter("next")
        if number:
            seconds["lorakit"].append(mine)
            seconds["peft"].append(theirs)
    lk.detach(ours)
    many = [
        _timed(lambda name=f"a{i}": lk.load_adapter(ours, path, name)) for i in range(num_adapters)
    ]
    first, last = statistics.median(many[:5]), statistics.median(many[-5:])
    ratios = [a / b for a, b in zip(seconds["lorakit"], seconds["peft"], strict=True)]
    return {
        **{name: _spread(values) for name, values in seconds.items()},
        "lorakit_over_peft": _spread(ratios),
        "num_adapters": num_adapters,
        "first_five_s": first,
        "last_five_s": last,
        "last_over_first": last / first,
    }


def switch(base: nn.Module, folder: Path) -> dict[str, Any]:
    """Switching between two adapters: time, and what it allocates."""
    model = _shared(base)
    for name in ("one", "two"):
        lk.load_adapter(model, folder / "adapter", name)

    def turn(count: int) -> None:
        for _ in range(count):
            with lk.use(model, "one"):
                pass
            with lk.use(model, "two"):
                pass

    turn(100)
    times = [_timed(lambda: turn(500)) / 1000 for _ in range(9)]
    with Ledger() as ledger:
        turn(100)
    tracemalloc.start()
    turn(10)
    before, _ = tracemalloc.get_traced_memory()
    turn(1000)
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return {
        "seconds": _spread(times),
        "tensor_bytes": sum(ledger.alive.values()) + sum(map(len, ledger.peaks.values())),
        "python_bytes_kept_by_2000": max(0, after - before),
    }


def start() -> dict[str, Any]:
    """Wall time of the import and of the help, the interpreter's own start included."""
    commands = {
        "python": ["-c", "pass"],
        "import": ["-c", "import lorakit"],
        "help": ["-m", "lorakit.cli.main", "--help"],
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(8):
        for name, words in commands.items():
            taken = _timed(
                lambda w=words: subprocess.run(
                    [sys.executable, *w], check=True, capture_output=True
                )
            )
            if number:
                times[name].append(taken)
    return {name: _spread(values) for name, values in times.items()}


def shards(folder: Path, gigabytes: float) -> dict[str, Any]:
    """Merging a sharded checkpoint of this size, in a process of its own; see merge_shards.py."""
    script = Path(__file__).with_name("merge_shards.py")
    words = [str(script), str(folder / "shards"), "--gigabytes", str(gigabytes)]
    done = subprocess.run([sys.executable, *words], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def _timed(work: Callable[[], object]) -> float:
    gc.collect()
    begun = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        work()
    return time.perf_counter() - begun


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _shown(name: str, result: dict[str, Any]) -> dict[str, Any]:
    print(name, flush=True)
    for key, value in result.items():
        print(f"  {key}: {value}", flush=True)
    return result


def _write(path: Path, found: dict[str, Any], args: argparse.Namespace) -> None:
    write_json(
        path,
        {
            "title": "inference, loading and switching beside PEFT",
            "kind": "inference",
            "command": command_line(),
            "model": MODEL,
            "spec": SPEC.to_dict(),
            "threads": torch.get_num_threads(),
            "hardware": hardware(),
            "versions": versions(),
            **found,
        },
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--adapters", type=int, default=100)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--output", type=Path, help="where the result goes")
    return parser.parse_args()


if __name__ == "__main__":
    main()
