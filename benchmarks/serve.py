"""What it costs to serve many adapters over one base, as ratios within one run.

    python benchmarks/serve.py step --output benchmarks/results/serve.json
    python benchmarks/serve.py throughput --output benchmarks/results/serve.json
    python benchmarks/serve.py generate --output benchmarks/results/serve.json

step        one decode step of 8 rows and one prefill of 8 x 64 tokens: 8 adapters against the base,
            and PEFT's `adapter_names` against the same base under transformers. Every round times
            all of them in an order of its own; a ratio is taken within its round.
throughput  one queue of requests over 1, 8, 64 and 512 registered adapters, drawn by Zipf's law;
            and how long a list of 1,000 adapters takes.
generate    32 requests of mixed lengths against transformers' `generate` in static batches.

Each part is added to what the output file has of the others.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from lorakit.adapters.attach import attach, detach
from lorakit.adapters.spec import LoraSpec
from lorakit.environment import hardware, versions
from lorakit.files import write_json
from lorakit.formats.peft import save_adapter
from lorakit.models.load import load_model
from lorakit.serve.engine import Engine
from lorakit.serve.request import (
    EngineOptions,
    FinishedEvent,
    GenerateRequest,
    SamplingOptions,
    TokenEvent,
)
from serve_step import pretend_learned, random_prompt, step_part


def main() -> None:
    """Run one part, print it, and write it beside the others."""
    args = _arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    model, tokenizer = load_model(args.model, dtype="float32")
    parts = {"step": step_part, "throughput": _throughput_part, "generate": _generate_part}
    found = parts[args.part](model, tokenizer, args)
    path = Path(args.output)
    before = json.loads(path.read_text()) if path.is_file() else {}
    result = {
        **before,
        "benchmark": "serve",
        "model": args.model,
        "hardware": hardware(),
        "versions": versions(),
        args.part: {
            "command": shlex.join(["python", *sys.argv]),
            "threads": torch.get_num_threads(),
            **found,
        },
    }
    write_json(path, result)
    print(json.dumps(found, indent=1))


# A queue of requests.


def _throughput_part(model: Any, tokenizer: Any, args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        _write_adapters(model, root / "all", max(args.adapters))
        found: dict[str, Any] = {"requests": args.requests, "runs": []}
        for _ in range(args.repeats):
            for count in args.adapters:
                run = _zipf_run(model, tokenizer, root / "all", count=count, args=args)
                print(json.dumps(run), flush=True)
                found["runs"].append(run)
        found["over_one_adapter"] = _over_one(found["runs"], "tokens_per_s")
        found["over_one_adapter_cpu"] = _over_one(found["runs"], "tokens_per_cpu_s")
        found["list_1000"] = _list_thousand(model, tokenizer, root)
    return found


def _over_one(runs: list[dict[str, Any]], rate: str) -> dict[str, float]:
    """The median rate of each count of adapters over that of the smallest count."""
    counts = dict.fromkeys(run["adapters"] for run in runs)
    rates = {n: statistics.median(r[rate] for r in runs if r["adapters"] == n) for n in counts}
    first = rates[min(rates)]
    return {str(n): round(rate / first, 3) for n, rate in rates.items()}


def _write_adapters(model: Any, root: Path, count: int) -> None:
    """Different files of one shape: the first is made, the others change one number of it."""
    attach(model, LoraSpec(r=8, alpha=16, targets="all-linear"), name="one")
    pretend_learned(model, 0)
    save_adapter(model, root / "a0000", name="one")
    detach(model)
    tensors = (root / "a0000" / "adapter_model.safetensors").read_bytes()
    others = ["adapter_config.json", "lorakit.json"]
    for i in range(1, count):
        path = root / f"a{i:04d}"
        path.mkdir()
        end = torch.tensor([0.01 + i / 1e5]).numpy().tobytes()
        (path / "adapter_model.safetensors").write_bytes(tensors[:-4] + end)
        for name in others:
            (path / name).write_bytes((root / "a0000" / name).read_bytes())


def _zipf_run(
    model: Any, tokenizer: Any, root: Path, *, count: int, args: argparse.Namespace
) -> dict[str, Any]:
    drawn = random.Random(args.seed)
    weights = [1 / (rank + 1) for rank in range(count)]
    names = [f"a{i:04d}" for i in drawn.choices(range(count), weights, k=args.requests)]
    work = [
        (random_prompt(drawn.randrange(16, 64), i), drawn.randrange(16, 48), name)
        for i, name in enumerate(names)
    ]
    options = EngineOptions(adapters_dir=root, max_batch=16, max_adapters_ram=64, max_queue=10_000)
    process = psutil.Process()
    engine = Engine(model, tokenizer, options=options)
    engine.start()
    before, cpu = process.memory_info().rss, time.process_time()
    seconds, ends = _answer_all(engine, work)
    cpu_seconds = time.process_time() - cpu
    after = process.memory_info().rss
    engine.stop()
    tokens = sum(end.num_generated_tokens for end in ends)
    first = sorted(end.timings.first_token_s or 0.0 for end in ends)
    each = sorted(
        (end.timings.total_s - (end.timings.first_token_s or 0.0)) / (end.num_generated_tokens - 1)
        for end in ends
    )
    return {
        "adapters": count,
        "used": len(set(names)),
        "tokens_per_s": round(tokens / seconds, 1),
        "tokens_per_cpu_s": round(tokens / cpu_seconds, 2),
        "first_token_s": _percentiles(first),
        "per_token_s": _percentiles(each),
        "rss_growth_mb": round((after - before) / 1e6),
    }


def _percentiles(values: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {name: round(cuts[i - 1], 4) for name, i in (("p50", 50), ("p95", 95), ("p99", 99))}


def _answer_all(
    engine: Engine, work: list[tuple[list[int], int, str | None]]
) -> tuple[float, list[FinishedEvent]]:
    """Submit everything at once; seconds to the last end."""
    ends: list[FinishedEvent] = []
    done = threading.Event()

    def on_event(event: TokenEvent | FinishedEvent) -> None:
        if isinstance(event, FinishedEvent):
            ends.append(event)
            if len(ends) == len(work):
                done.set()

    start = time.perf_counter()
    for i, (prompt, limit, name) in enumerate(work):
        options = SamplingOptions(max_tokens=limit, ignore_eos=True)
        request = GenerateRequest(
            id=str(i), prompt_ids=tuple(prompt), adapter=name, sampling=options
        )
        engine.submit(request, on_event)
    done.wait()
    failed = [end.error for end in ends if end.error is not None]
    if failed:
        raise SystemExit(str(failed[0]))
    return time.perf_counter() - start, ends


def _list_thousand(model: Any, tokenizer: Any, root: Path) -> dict[str, Any]:
    many = root / "thousand"
    attach(model, LoraSpec(r=2, alpha=4, targets="qv"), name="one")
    save_adapter(model, many / "a0000", name="one")
    detach(model)
    files = {p.name: p.read_bytes() for p in (many / "a0000").iterdir()}
    for i in range(1, 1000):
        path = many / f"a{i:04d}"
        path.mkdir()
        for name, data in files.items():
            (path / name).write_bytes(data)
    process = psutil.Process()
    engine = Engine(model, tokenizer, options=EngineOptions(adapters_dir=many))
    before = process.memory_info().rss
    times = []
    for _ in range(3):
        start = time.perf_counter()
        assert len(engine.pool.list()) == 1000
        times.append(round(time.perf_counter() - start, 3))
    growth = process.memory_info().rss - before
    engine.stop()
    return {"first_s": times[0], "again_s": times[1:], "rss_growth_mb": round(growth / 1e6, 1)}


# Against transformers' generate.


def _generate_part(model: Any, tokenizer: Any, args: argparse.Namespace) -> dict[str, Any]:
    drawn = random.Random(args.seed)
    work = [(random_prompt(drawn.randrange(8, 96), i), drawn.randrange(8, 97)) for i in range(32)]
    tokens = sum(limit for _, limit in work)
    runs = []
    for _ in range(args.repeats):
        start, cpu = time.perf_counter(), time.process_time()
        for first in range(0, len(work), 16):
            _generate(model, work[first : first + 16])
        theirs, their_cpu = time.perf_counter() - start, time.process_time() - cpu
        cpu = time.process_time()
        engine = Engine(model, tokenizer, options=EngineOptions(max_batch=16))
        engine.start()
        ours, _ = _answer_all(engine, [(prompt, limit, None) for prompt, limit in work])
        our_cpu = time.process_time() - cpu
        engine.stop()
        runs.append(
            {
                "generate_cpu_s": round(their_cpu, 2),
                "engine_cpu_s": round(our_cpu, 2),
                "cpu_ratio": round(their_cpu / our_cpu, 3),
                "generate_tokens_per_s": round(tokens / theirs, 1),
                "engine_tokens_per_s": round(tokens / ours, 1),
                "ratio": round(theirs / ours, 3),
            }
        )
        print(json.dumps(runs[-1]), flush=True)
    ratio = statistics.median(run["ratio"] for run in runs)
    cpu_ratio = statistics.median(run["cpu_ratio"] for run in runs)
    found = {"requests": 32, "tokens": tokens, "batch": 16, "runs": runs}
    return {**found, "ratio": ratio, "cpu_ratio": cpu_ratio}


def _generate(model: Any, work: list[tuple[list[int], int]]) -> None:
    """A static batch, padded on the left, as long as its longest answer."""
    width = max(len(prompt) for prompt, _ in work)
    ids = torch.zeros((len(work), width), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, (prompt, _) in enumerate(work):
        ids[i, width - len(prompt) :] = torch.tensor(prompt)
        mask[i, width - len(prompt) :] = 1
    longest = max(limit for _, limit in work)
    model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=longest,
        min_new_tokens=longest,
        do_sample=False,
        pad_token_id=0,
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("step", "throughput", "generate"))
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--output", default="benchmarks/results/serve.json")
    parser.add_argument("--threads", type=int, default=0, help="0: as many as torch takes")
    parser.add_argument("--rounds", type=int, default=30, help="step: timed rounds")
    parser.add_argument(
        "--seconds", type=float, default=35, help="step: begin no round after this long"
    )
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--requests", type=int, default=64, help="throughput: requests per run")
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
