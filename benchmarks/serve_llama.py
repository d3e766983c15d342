"""Against llama.cpp, the CPU bar: one stream, and 16 streams of 16 adapters; part of serve.py.

llama.cpp answers from the same GGUF file: as it is (4 bits, products in 8-bit integers, where the
engine here computes in float32), and multiplied out to float32, which is the same arithmetic.
Needs `pip install xllamacpp`, llama.cpp in a wheel.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from lorakit.adapters.spec import LoraSpec
from lorakit.handover.run import export_adapter
from lorakit.models.named import NAMED_MODELS, find_named
from lorakit.serve.engine import Engine
from lorakit.serve.request import EngineOptions
from serve_queue import TENSORS, Work, answer_all, made, own_tensors
from serve_rounds import Bench, ratios, sharing, spread

NUM_STREAMS = 16
PROMPT = 32
SLOT = 256  # tokens of a stream's cache in llama.cpp
OURS, BASES = "lorakit", ("llama.cpp Q4_1", "llama.cpp float32")


def llama_section(bench: Bench) -> Iterator[dict[str, Any]]:
    """Tokens per second of both servers over one base, answers of half the longest."""
    missing = _missing(bench)
    if missing is not None:
        yield {"not run": missing}
        return
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        file = find_named(bench.reference)
        names, exported = _adapters(bench, root, base=bench.reference)
        files = {BASES[0]: file, BASES[1]: in_float32(file, root / "float32.gguf")}
        options = EngineOptions(adapters_dir=root / "adapters", max_batch=NUM_STREAMS)
        engine = Engine(sharing(bench.model), bench.tokenizer, options=options)
        engine.start()
        try:
            calls: dict[str, Callable[[Work], int]] = {
                OURS: lambda work: sum(
                    end.num_generated_tokens for end in answer_all(engine, work)[1]
                )
            }
            for name, path in files.items():
                calls[name] = _asking(_server(path, exported), names)
            yield from _rounds(bench, calls, names)
        finally:
            engine.stop()


def _rounds(
    bench: Bench, calls: dict[str, Callable[[Work], int]], names: list[str]
) -> Iterator[dict[str, Any]]:
    """Everything once per round; the first round reads adapters and is not counted."""
    order = random.Random(bench.seed)
    limit = max(4, bench.answer // 2)
    loads = {"one stream": 1, f"{NUM_STREAMS} streams, {NUM_STREAMS} adapters": NUM_STREAMS}
    rates = {(call, load): list[float]() for call in calls for load in loads}
    for index in bench.rounds(at_least=2, at_most=20):
        for call, load in order.sample(sorted(rates), len(rates)):
            work: Work = [
                (bench.prompt(PROMPT, 100 * index + i), limit, names[i]) for i in range(loads[load])
            ]
            start = time.perf_counter()
            tokens = calls[call](work)
            seconds = time.perf_counter() - start
            if tokens != limit * len(work):
                raise SystemExit(f"{call}: {tokens} tokens instead of {limit * len(work)}")
            if index:
                rates[call, load].append(tokens / seconds)
        if not index:
            continue
        yield {
            "xllamacpp": importlib.metadata.version("xllamacpp"),
            "prompt": PROMPT,
            "answer": limit,
            "r": 8,
            "targets": "all-linear",
            **{
                load: {
                    call: {
                        "tokens_per_s": spread(rates[call, load], 1),
                        **_over(rates, call, load),
                    }
                    for call in calls
                }
                for load in loads
            },
        }


def _over(rates: dict[tuple[str, str], list[float]], call: str, load: str) -> dict[str, Any]:
    if call == OURS:
        return {}
    return {f"{OURS}_over_this": ratios(rates[OURS, load], rates[call, load])}


def _missing(bench: Bench) -> str | None:
    """Why there is nothing to compare with, or None."""
    if importlib.util.find_spec("xllamacpp") is None:
        return "pip install xllamacpp"
    named = NAMED_MODELS.get(bench.reference)
    if named is None or not named.inside.endswith(".gguf"):
        return "the base is no GGUF file of a wheel"
    return None


def _adapters(bench: Bench, root: Path, *, base: str) -> tuple[list[str], Path]:
    """16 adapters of their own for the engine here, and one of them as llama.cpp reads it."""
    first = made(bench, root / "made", LoraSpec(r=8, alpha=16, targets="all-linear"))
    export_adapter(first, root / "exported", engine="llama.cpp", base=base)
    (exported,) = (root / "exported").glob("*.gguf")
    tensors = (first / TENSORS).read_bytes()
    names = [f"a{i:04d}" for i in range(NUM_STREAMS)]
    for i, name in enumerate(names):
        shutil.copytree(first, root / "adapters" / name)
        (root / "adapters" / name / TENSORS).unlink()
        own_tensors(root / "adapters" / name / TENSORS, tensors, i)
    return names, exported


def _server(base: Path, adapter: Path) -> Any:
    """llama.cpp with a slot per stream and the adapter under 16 numbers."""
    xlc = importlib.import_module("xllamacpp")
    params = xlc.CommonParams()
    params.model.path = str(base)
    params.n_ctx = SLOT * NUM_STREAMS
    params.n_parallel = NUM_STREAMS
    params.cache_ram_mib = 0  # no prompt is asked twice: nothing is gained by keeping them
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    params.lora_adapters = [xlc.CommonAdapterLoraInfo(str(adapter), 0.0)] * NUM_STREAMS
    return xlc.Server(params)


def _asking(server: Any, names: list[str]) -> Callable[[Work], int]:
    """Ask for everything at once, each with its own adapter; returns the generated tokens."""

    def one(prompt: list[int], limit: int, name: str | None) -> int:
        answer = server.handle_completions(
            {
                "prompt": prompt,
                "max_tokens": limit,
                "temperature": 0.0,
                "ignore_eos": True,
                "cache_prompt": False,
                "lora": [{"id": names.index(name or ""), "scale": 1.0}],
            }
        )
        if "usage" not in answer:
            raise SystemExit(f"llama.cpp: {answer}")
        return int(answer["usage"]["completion_tokens"])

    def ask(work: Work) -> int:
        with ThreadPoolExecutor(len(work)) as threads:
            return sum(threads.map(one, *zip(*work, strict=True)))

    return ask


def in_float32(source: Path, target: Path) -> Path:
    """A GGUF file with its tensors multiplied out: llama.cpp then rounds no activations.

    Args:
        source: any GGUF file that the package gguf can multiply out.
        target: written.
    """
    gguf = importlib.import_module("gguf")
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type=inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
