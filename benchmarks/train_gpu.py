"""Training speed and memory on one GPU: a Llama-3-8B shape against PEFT, Liger and torch.compile.

Random weights in bfloat16 or NF4, LoRA r=16 on all linear layers, rows of 2,048 random tokens, all
of them learned. A cell is a storage, a batch and gradient checkpointing on or off; in a cell every
arm is built in turn in a process of its own, and rounds of a few steps go through the arms, so that
a ratio compares what was measured at about the same time. Tokens/s, the peak of allocated memory,
and the share of the GPU's dense bfloat16 peak (`--peak-tflops`; 989 is an H100's).

    python benchmarks/train_gpu.py
    python benchmarks/train_gpu.py --tiny     a few layers on the CPU: does the script run

Without a CUDA device only --tiny runs, and its result says that nothing was measured.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import itertools
import json
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

from lorakit.environment import command_line, hardware, versions
from lorakit.files import write_json

ARMS = ("peft", "peft-liger", "peft-compile", "lorakit", "lorakit-compile")
LLAMA_3_8B = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rope_theta": 500_000.0,
    "tie_word_embeddings": False,
}
TINY = {
    **LLAMA_3_8B,
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def main() -> None:
    """Measure every cell, or one arm of one cell in a child process."""
    args = _arguments()
    if args.child:
        print(json.dumps(_measure(args, json.loads(args.child))))
        return
    cells = []
    for storage, batch, checkpointing in itertools.product(args.storage, args.batch, (False, True)):
        cell = {"storage": storage, "batch": batch, "checkpointing": checkpointing}
        found = {arm: _child(args, {**cell, "arm": arm}) for arm in args.arms}
        _compare(found)
        _print(cell, found)
        cells.append({**cell, "arms": found})
    measured = torch.cuda.is_available() and not args.tiny
    result = {
        "benchmark": "train_gpu",
        "measured": measured,
        "note": None if measured else "not measured: a tiny model on a CPU shows that it runs",
        "command": command_line(),
        "shape": TINY if args.tiny else LLAMA_3_8B,
        "length": args.length,
        "cells": cells,
        "hardware": hardware(),
        "versions": versions(),
    }
    write_json(args.output, result)
    print(f"written to {args.output}")


def _child(args: argparse.Namespace, cell: dict[str, Any]) -> dict[str, Any]:
    """One arm in a process of its own, so that no arm inherits another's memory or patches."""
    skipped = _missing(cell["arm"])
    if skipped:
        return {"skipped": skipped}
    options = ["--tiny"] if args.tiny else []
    options += ["--length", str(args.length), "--steps", str(args.steps)]
    options += ["--peak-tflops", str(args.peak_tflops), "--child", json.dumps(cell)]
    done = subprocess.run(
        [sys.executable, __file__, *options], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        return {"skipped": f"ended with status {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def _missing(arm: str) -> str | None:
    package = {"peft-liger": "liger_kernel"}.get(arm, "peft" if "peft" in arm else "lorakit")
    found = importlib.util.find_spec(package) is not None
    return None if found else f"{package} is not installed"


def _measure(args: argparse.Namespace, cell: dict[str, Any]) -> dict[str, Any]:
    device = torch.device("cpu" if args.tiny else "cuda")
    torch.manual_seed(0)
    if cell["arm"] == "peft-liger" and device.type == "cpu":
        return {"skipped": "Liger's kernels need a GPU"}
    try:
        model = _base(args, cell, device)
        base_bytes = _allocated(device)
        step = _lorakit(model, cell) if "lorakit" in cell["arm"] else _peft(model, cell)
        ids = torch.randint(0, model.config.vocab_size, (cell["batch"], args.length), device=device)
        seconds = [_timed(step, ids) for _ in range(2 + args.steps)][2:]
    except torch.OutOfMemoryError:
        return {"skipped": "out of memory"}
    tokens_per_s = ids.numel() / statistics.median(seconds)
    peak_bytes = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return {
        "tokens_per_s": tokens_per_s,
        "step_s": seconds,
        "peak_bytes": peak_bytes,
        "above_base_bytes": peak_bytes - base_bytes,
        "peak_share": tokens_per_s * _flops_per_token(model) / (args.peak_tflops * 1e12),
    }


def _base(args: argparse.Namespace, cell: dict[str, Any], device: torch.device) -> PreTrainedModel:
    if cell["arm"] == "peft-liger":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    shape = TINY if args.tiny else LLAMA_3_8B
    config = LlamaConfig(**shape, max_position_embeddings=args.length)
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    if cell["storage"] == "nf4":
        _quantize(model, device)
    if cell["checkpointing"]:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def _quantize(model: PreTrainedModel, device: torch.device) -> None:
    from bitsandbytes.nn import Linear4bit, Params4bit

    from lorakit.models.nf4 import finish_four_bit, quantizable

    for name, layer in quantizable(model).items():
        weight = layer.get_parameter("weight")
        with torch.device("meta"):
            new = Linear4bit(
                weight.shape[1],
                weight.shape[0],
                bias=False,
                compute_dtype=torch.bfloat16,
                quant_type="nf4",
            )
        new.weight = Params4bit(weight.data.cpu(), requires_grad=False, quant_type="nf4")
        model.set_submodule(name, new.to(device))
    finish_four_bit(model, torch.bfloat16)
    gc.collect()


def _lorakit(model: PreTrainedModel, cell: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    import lorakit as lk
    from lorakit.models.label_head import LabelHead

    lk.attach(model, lk.LoraSpec(r=16, alpha=32, targets="all-linear"))
    if cell["arm"].endswith("compile"):
        for layer in model.model.layers:
            layer.compile()
    head = LabelHead(model)
    optimizer = _optimizer(model)

    def step(ids: Tensor) -> Tensor:
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        return _step(lambda: head.loss(batch), optimizer, ids)

    return step


def _peft(model: PreTrainedModel, cell: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    adapted.enable_input_require_grads()
    if cell["arm"].endswith("compile"):
        for layer in model.model.layers:
            layer.compile()
    optimizer = _optimizer(adapted)
    return lambda ids: _step(lambda: adapted(input_ids=ids, labels=ids).loss, optimizer, ids)


def _optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-4, fused=True)


def _step(loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer, ids: Tensor) -> Tensor:
    with torch.autocast(ids.device.type, dtype=torch.bfloat16):
        value = loss()
    value.backward()
    optimizer.step()
    optimizer.zero_grad()
    return value


def _timed(step: Callable[[Tensor], Tensor], ids: Tensor) -> float:
    started = time.perf_counter()
    value = step(ids).item()
    if ids.device.type == "cuda":
        torch.cuda.synchronize()
    if not value > 0:
        raise SystemExit(f"the loss is {value}")
    return time.perf_counter() - started


def _flops_per_token(model: PreTrainedModel) -> float:
    """Products with frozen weights: forward, and the gradient of their input."""
    config = model.config
    width, heads = config.hidden_size, config.num_attention_heads
    key_width = width // heads * config.num_key_value_heads
    layer = 2 * width * width + 2 * width * key_width + 3 * width * config.intermediate_size
    return 4.0 * (config.num_hidden_layers * layer + width * config.vocab_size)


def _allocated(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _compare(found: dict[str, dict[str, Any]]) -> None:
    reference = found.get("peft", {})
    for arm in found.values():
        if "tokens_per_s" in arm and "tokens_per_s" in reference:
            arm["ratio"] = arm["tokens_per_s"] / reference["tokens_per_s"]
            arm["memory_ratio"] = arm["peak_bytes"] / max(1, reference["peak_bytes"])


def _print(cell: dict[str, Any], found: dict[str, dict[str, Any]]) -> None:
    print(f"\n{cell['storage']}, batch {cell['batch']}, checkpointing {cell['checkpointing']}")
    for name, arm in found.items():
        if "skipped" in arm:
            print(f"  {name:<18}{arm['skipped']}")
        else:
            print(
                f"  {name:<18}{arm['tokens_per_s']:>10.0f} tokens/s{arm.get('ratio', 0):>7.2f}"
                f"{arm['peak_bytes'] / 2**30:>8.1f} GiB{arm['peak_share']:>8.1%} of the peak"
            )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a tiny shape on the CPU")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--storage", nargs="+", choices=("bf16", "nf4"), default=["bf16", "nf4"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=8, help="measured steps")
    parser.add_argument("--peak-tflops", type=float, default=989.0)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/results/train_gpu.json"), help="JSON file"
    )
    args = parser.parse_args()
    if not args.tiny and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --tiny shows on a CPU that the script runs")
    return args


if __name__ == "__main__":
    main()
