"""Log-probabilities under the reference, computed once and kept for later runs.

They depend on the tokens, the base, the reference and the arithmetic alone, and these are what a
file is named by: a run with another beta, learning rate or method reads it.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorakit.data.preference import Judged, PreferenceExamples
from lorakit.errors import LorakitWarning
from lorakit.files import files_into
from lorakit.models.gguf import cache_directory
from lorakit.progress import progress

_FORMAT = 1
_NAME = "logps"

Compute = Callable[[Sequence[Judged]], Tensor]


def cached_reference(
    examples: PreferenceExamples, facts: Mapping[str, Any], compute: Compute, *, batch_size: int
) -> PreferenceExamples:
    """The examples with what the reference gives their answers, from the cache or computed now.

    Args:
        examples: pairs.
        facts: plain values that name base, reference and arithmetic.
        compute: the answers' log-probabilities under the reference, (answers,) in nats: all chosen
            ones first, then the rejected ones.
        batch_size: pairs in one call.

    Raises:
        OutputError: the cache cannot be written.
    """
    path = cache_directory() / "references" / f"{_key(examples, facts)}.safetensors"
    found = _read(path, len(examples))
    if found is None:
        found = _computed(examples, compute, batch_size)
        with files_into(path.parent) as staging:
            (staging / "new").mkdir()
            save_file({_NAME: found}, str(staging / "new" / path.name))
    return PreferenceExamples(
        [_with(example, row) for example, row in zip(examples, found.tolist(), strict=True)],
        examples.report,
    )


def _key(examples: PreferenceExamples, facts: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps([_FORMAT, dict(facts)], sort_keys=True).encode())
    for example in examples:
        for answer in example.answers:
            tokens = answer.example
            numbers = torch.tensor([len(tokens), *tokens.input_ids, *tokens.labels])
            digest.update(numbers.numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path, num_examples: int) -> Tensor | None:
    """The file's values, (examples, 2) float32; None without a good file."""
    if not path.is_file():
        return None
    try:
        found = load_file(path).get(_NAME)
    except (SafetensorError, OSError, ValueError) as error:
        found, reason = None, str(error).splitlines()[0]
    else:
        reason = "other values than expected"
    if found is not None and found.shape == (num_examples, 2) and found.isfinite().all():
        return found
    warnings.warn(
        f"the cached reference {path} is damaged and computed again: {reason}",
        LorakitWarning,
        stacklevel=4,
    )
    return None


def _computed(examples: PreferenceExamples, compute: Compute, batch_size: int) -> Tensor:
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i]))
    found = torch.empty(len(examples), 2)
    with progress("reference", len(examples)) as bar:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            logps = compute([examples[i] for i in chosen])
            found[chosen] = torch.stack(logps.float().cpu().chunk(2), dim=1)
            bar.advance(len(chosen))
    return found


def _with(example: Judged, logps: Sequence[float]) -> Judged:
    answers = zip(example.answers, logps, strict=True)
    return replace(example, answers=tuple(replace(a, reference=value) for a, value in answers))
