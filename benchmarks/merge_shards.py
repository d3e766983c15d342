"""Merge an adapter into a synthetic sharded checkpoint: peak memory, and speed beside a copy.

Called by benchmarks/inference.py. Files of bfloat16 numbers of Llama's names; the adapter is on
every linear layer. What is measured is the writing of the shards (`merging.shards`), which is what
grows with the model: a copy of the same files, written to the same disk and flushed, before and
after it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

import lorakit as lk
from lorakit.adapters.adapter import Adapter, Factors
from lorakit.environment import memory_bytes, peak_memory_bytes
from lorakit.merging.plan import plan_merge
from lorakit.merging.shards import write_shards
from lorakit.models.empty import empty_from_config

BLOCKS_PER_SHARD = 4
WIDTH, MLP, VOCABULARY = 2048, 8192, 32000


def main() -> None:
    """Make the checkpoint, merge it, print what it took as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    args = parser.parse_args()
    source, merged = args.folder / "base", args.folder / "merged"
    for directory in (source, merged):
        directory.mkdir(parents=True)
    shard_bytes = _make(source, args.gigabytes)
    adapter = _adapter(source)
    plan = plan_merge(source, adapter)
    assert plan is not None
    copies = [_copy(source, args.folder / "copy")]
    before = memory_bytes()
    _reset_peak()
    begun = time.perf_counter()
    changes = write_shards(plan, merged)
    _flush(merged)
    merge_s = time.perf_counter() - begun
    peak_bytes = peak_memory_bytes() - before
    copies.append(_copy(source, args.folder / "copy"))
    total_bytes = sum(shard_bytes)
    print(
        json.dumps(
            {
                "total_bytes": total_bytes,
                "num_shards": len(shard_bytes),
                "largest_shard_bytes": max(shard_bytes),
                "num_changed": len(changes),
                "merge_s": merge_s,
                "copy_s": copies,
                "merge_bytes_per_s": total_bytes / merge_s,
                "copy_bytes_per_s": total_bytes * len(copies) / sum(copies),
                "speed_over_copy": sum(copies) / len(copies) / merge_s,
                "peak_bytes": peak_bytes,
                "peak_over_largest_shard": peak_bytes / max(shard_bytes),
            }
        )
    )


def _make(directory: Path, gigabytes: float) -> list[int]:
    """Shards of random numbers; returns their sizes."""
    block = 2 * (2 * WIDTH * WIDTH + 2 * WIDTH * WIDTH + 3 * WIDTH * MLP)
    num_blocks = max(BLOCKS_PER_SHARD, round(gigabytes * 1e9 / block))
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=MLP,
        num_hidden_layers=num_blocks,
        num_attention_heads=16,
        num_key_value_heads=16,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(directory)
    shapes = {n: p.shape for n, p in empty_from_config(config).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    groups: dict[int, dict[str, torch.Size]] = {}
    for name, shape in shapes.items():
        parts = name.split(".")
        number = int(parts[2]) // BLOCKS_PER_SHARD if parts[1] == "layers" else 0
        groups.setdefault(number, {})[name] = shape
    weight_map: dict[str, str] = {}
    sizes: list[int] = []
    for number, group in sorted(groups.items()):
        file = f"model-{number + 1:05}-of-{len(groups):05}.safetensors"
        tensors = {
            name: (0.02 * torch.randn(shape, generator=generator)).bfloat16()
            for name, shape in group.items()
        }
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(group, file))
        sizes.append((directory / file).stat().st_size)
        del tensors
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return sizes


def _adapter(directory: Path) -> Adapter:
    """An adapter with random factors, made on the meta device."""
    model = empty_from_config(LlamaConfig.from_pretrained(directory))
    plan = lk.plan_adapter(model, lk.LoraSpec(r=8, targets="all-linear"))
    generator = torch.Generator().manual_seed(1)
    factors = {
        site.name: Factors(
            A=torch.randn((site.r, site.shape[1]), generator=generator) / site.shape[1] ** 0.5,
            B=0.01 * torch.randn((site.shape[0], site.r), generator=generator),
            alpha=site.alpha,
            scaling=site.scaling,
            kind=site.kind,
            module=site.module,
        )
        for site in plan.sites
    }
    return Adapter(spec=plan.spec, factors=factors)


def _copy(source: Path, target: Path) -> float:
    """Seconds to read and write all files through a buffer, flushed to the disk."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    begun = time.perf_counter()
    for file in sorted(source.glob("*.safetensors")):
        with file.open("rb") as reader, (target / file.name).open("wb") as writer:
            shutil.copyfileobj(reader, writer, 1 << 24)
    _flush(target)
    seconds = time.perf_counter() - begun
    shutil.rmtree(target)
    return seconds


def _flush(directory: Path) -> None:
    for file in directory.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


def _reset_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


if __name__ == "__main__":
    main()
