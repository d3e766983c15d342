"""Queues of requests: many registered adapters, and against transformers' `generate`."""

from __future__ import annotations

import os
import random
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

from lorakit.adapters.attach import attach, detach
from lorakit.adapters.spec import LoraSpec
from lorakit.formats.peft import save_adapter
from lorakit.serve.engine import Engine
from lorakit.serve.request import (
    EngineOptions,
    FinishedEvent,
    GenerateRequest,
    SamplingOptions,
    TokenEvent,
)
from serve_rounds import Bench, percentiles, pretend_learned, ratios, sharing, spread

MAX_BATCH = 16
RAM = 32  # adapters kept in memory, whatever is registered
MOST_ROUNDS = 8
TENSORS = "adapter_model.safetensors"

Work = list[tuple[list[int], int, str | None]]


def registered_section(bench: Bench) -> Iterator[dict[str, Any]]:
    """The same prompts and lengths for every count of adapters, adapters by Zipf's law.

    One engine per count, kept over the rounds: in the first round nothing is in memory.
    """
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        listed = list_thousand(bench, root)
        drawn = {count: _names(bench, count) for count in bench.counts}
        _write_adapters(bench, root, drawn)
        engines = {
            count: Engine(
                sharing(bench.model),
                bench.tokenizer,
                options=EngineOptions(
                    adapters_dir=root / str(count),
                    max_batch=MAX_BATCH,
                    max_adapters_ram=RAM,
                    max_queue=10_000,
                ),
            )
            for count in bench.counts
        }
        for engine in engines.values():
            engine.start()
        try:
            yield from _zipf_rounds(bench, engines, drawn, {"list_1000": listed})
        finally:
            for engine in engines.values():
                engine.stop()


def _zipf_rounds(
    bench: Bench,
    engines: dict[int, Engine],
    drawn: dict[int, list[list[str]]],
    found: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    order = random.Random(bench.seed)
    rates: dict[int, list[float]] = {count: [] for count in engines}
    cpu_rates: dict[int, list[float]] = {count: [] for count in engines}
    waits: dict[int, list[float]] = {count: [] for count in engines}
    rss = psutil.Process().memory_info().rss
    for index in bench.rounds(at_least=1, at_most=MOST_ROUNDS):
        for count in order.sample(sorted(engines), len(engines)):
            work = _work(bench, index, drawn[count][index])
            cpu = time.process_time()
            seconds, ends = answer_all(engines[count], work)
            tokens = sum(end.num_generated_tokens for end in ends)
            rates[count].append(tokens / seconds)
            cpu_rates[count].append(tokens / (time.process_time() - cpu))
            waits[count] += [end.timings.first_token_s or 0.0 for end in ends]
        first = min(engines)
        yield {
            **found,
            "requests_per_round": bench.requests,
            "longest_answer": bench.answer,
            "max_batch": MAX_BATCH,
            "max_adapters_ram": RAM,
            "rss_growth_mb": round((psutil.Process().memory_info().rss - rss) / 1e6),
            "counts": {
                str(count): {
                    "used": len({n for names in drawn[count][: index + 1] for n in names}),
                    "in_ram": engines[count].pool.counts()[0],
                    "tokens_per_s": spread(rates[count], 1),
                    f"over_{first}": ratios(rates[count], rates[first]),
                    f"cpu_over_{first}": ratios(cpu_rates[count], cpu_rates[first]),
                    "first_token_s": percentiles(waits[count]),
                }
                for count in engines
            },
        }


def _names(bench: Bench, count: int) -> list[list[str]]:
    """The adapters that each round's requests name."""
    drawn = random.Random(bench.seed)
    weights = [1 / (rank + 1) for rank in range(count)]
    rounds = range(MOST_ROUNDS)
    ranks = [drawn.choices(range(count), weights, k=bench.requests) for _ in rounds]
    return [[f"a{i:04d}" for i in row] for row in ranks]


def _work(bench: Bench, index: int, names: list[str]) -> Work:
    drawn = random.Random(bench.seed + index)
    longest = bench.answer
    return [
        (bench.prompt(drawn.randrange(16, 64), i), drawn.randrange(longest // 3, longest), name)
        for i, name in enumerate(names)
    ]


def _write_adapters(bench: Bench, root: Path, drawn: dict[int, list[list[str]]]) -> None:
    """A directory per count: files of their own for adapters that are drawn.

    What nobody asks for is never read, and is a hard link to the first.
    """
    first = made(bench, root / "made", LoraSpec(r=8, alpha=16, targets="all-linear"))
    tensors = (first / TENSORS).read_bytes()
    needed = {name for rounds in drawn.values() for names in rounds for name in names}
    for count in drawn:
        for i in range(count):
            path = root / str(count) / f"a{i:04d}"
            path.mkdir(parents=True)
            for file in first.iterdir():
                if file.name != TENSORS or path.name not in needed:
                    os.link(file, path / file.name)
            if path.name in needed:
                own_tensors(root / "own" / path.name, tensors, i)
                os.link(root / "own" / path.name, path / TENSORS)


def own_tensors(file: Path, tensors: bytes, i: int) -> None:
    """The first adapter's file with one number changed; one file for all counts."""
    if not file.is_file():
        file.parent.mkdir(exist_ok=True)
        end = torch.tensor([0.01 + i / 1e5]).numpy().tobytes()
        file.write_bytes(tensors[: -len(end)] + end)


def made(bench: Bench, path: Path, spec: LoraSpec) -> Path:
    attach(bench.model, spec, name="one")
    pretend_learned(bench.model, 0)
    save_adapter(bench.model, path, name="one")
    detach(bench.model)
    return path


def answer_all(engine: Engine, work: Work) -> tuple[float, list[FinishedEvent]]:
    """Submit everything at once; seconds to the last end.

    Raises:
        SystemExit: a request failed.
    """
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


def list_thousand(bench: Bench, root: Path) -> dict[str, Any]:
    """Seconds to list 1,000 adapters, first and again, and what memory that takes."""
    first = made(bench, root / "tiny", LoraSpec(r=2, alpha=4, targets="qv"))
    many = root / "thousand"
    for i in range(1000):
        path = many / f"a{i:04d}"
        path.mkdir(parents=True)
        for file in first.iterdir():
            os.link(file, path / file.name)
    process = psutil.Process()
    engine = Engine(bench.model, bench.tokenizer, options=EngineOptions(adapters_dir=many))
    before = process.memory_info().rss
    times: list[float] = []
    for _ in range(3):
        start = time.perf_counter()
        if len(engine.pool.list()) != 1000:
            raise SystemExit("not all adapters are listed")
        times.append(round(time.perf_counter() - start, 3))
    growth = process.memory_info().rss - before
    engine.stop()
    return {"first_s": times[0], "again_s": times[1:], "rss_growth_mb": round(growth / 1e6, 1)}


def static_section(bench: Bench) -> Iterator[dict[str, Any]]:
    """32 requests of mixed lengths: the engine against `generate` in two batches of 16."""
    drawn = random.Random(bench.seed)
    work: Work = [
        (bench.prompt(drawn.randrange(8, 64), i), drawn.randrange(4, bench.answer + 1), None)
        for i in range(32)
    ]
    tokens = sum(limit for _, limit, _ in work)
    times: dict[str, list[float]] = {"generate": [], "engine": []}
    cpu_times: dict[str, list[float]] = {"generate": [], "engine": []}
    engine = Engine(
        sharing(bench.model), bench.tokenizer, options=EngineOptions(max_batch=MAX_BATCH)
    )
    engine.start()
    try:
        for index in bench.rounds(at_least=1, at_most=20):
            names = sorted(times) if index % 2 else sorted(times, reverse=True)
            for name in names:
                start, cpu = time.perf_counter(), time.process_time()
                if name == "engine":
                    answer_all(engine, work)
                else:
                    for first in range(0, len(work), MAX_BATCH):
                        _generate(bench.model, work[first : first + MAX_BATCH])
                times[name].append(time.perf_counter() - start)
                cpu_times[name].append(time.process_time() - cpu)
            yield {
                "requests": len(work),
                "tokens": tokens,
                "batch": MAX_BATCH,
                "tokens_per_s": {n: spread([tokens / t for t in times[n]], 1) for n in times},
                "ratio": ratios(times["generate"], times["engine"]),
                "cpu_ratio": ratios(cpu_times["generate"], cpu_times["engine"]),
            }
    finally:
        engine.stop()


def _generate(model: Any, work: Work) -> None:
    """A static batch, padded on the left, as long as its longest answer."""
    width = max(len(prompt) for prompt, _, _ in work)
    ids = torch.zeros((len(work), width), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, (prompt, _, _) in enumerate(work):
        ids[i, width - len(prompt) :] = torch.tensor(prompt)
        mask[i, width - len(prompt) :] = 1
    longest = max(limit for _, limit, _ in work)
    model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=longest,
        min_new_tokens=longest,
        do_sample=False,
        pad_token_id=0,
    )
