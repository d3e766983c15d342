"""Checkpoints in the parts of an engine that splits single weights over its processes."""

from __future__ import annotations

import re
from pathlib import Path

from lorakit.errors import ModelError

# What engines write that split single weights: a file (or directory) per rank.
_RANKS = {
    r"consolidated\.\d+\.pth": "Meta's tensor-parallel parts",
    r"mp_rank_\d+.*": "Megatron's tensor-parallel parts",
    r"model-rank-\d+-part-\d+\.safetensors": "vLLM's sharded state",
    r"rank\d+\.safetensors": "TensorRT-LLM's parts",
    r"(bf16_)?zero_pp_rank_\d+.*": "DeepSpeed's parts",
    r"__\d+_\d+\.distcp": "a distributed checkpoint of PyTorch",
}


def require_whole(directory: Path) -> None:
    """Refuse a directory in which single weights are split over files.

    Raises:
        ModelError: it holds the parts of a tensor-parallel engine.
    """
    names = sorted(entry.name for entry in directory.iterdir())
    for pattern, whose in _RANKS.items():
        found = [name for name in names if re.fullmatch(pattern, name)]
        if found:
            raise ModelError(
                "the checkpoint is in parts: each file holds a slice of every weight",
                where=str(directory),
                expected="model.safetensors, or model.safetensors.index.json and its files",
                found=f"{whose}: {', '.join(found[:3])}",
                remedy="join them with the tool that wrote them, or take the checkpoint in "
                "transformers' layout",
            )
