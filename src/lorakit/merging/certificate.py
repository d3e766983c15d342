"""What a merge has to prove, and the file that says that it did."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.errors import LorakitError, MergeError
from lorakit.merging.plan import MergePlan
from lorakit.merging.probes import Answers, max_abs_difference
from lorakit.merging.shards import StoredChange

CERTIFICATE_NAME = "merge.json"
# The largest logit error that the stored dtype explains, as a share of the largest logit.
TOLERANCE = {"float64": 1e-5, "float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
_MIN_EFFECT_LEFT = 0.1
# Less of the change than this is left after rounding: the merged model is not the adapter's.
_MIN_SURVIVAL = 0.5


@dataclass(frozen=True, slots=True)
class Proof:
    """What the base, the live method and the in-memory merge answer to the same probes."""

    base: Answers
    live: Answers
    merged: Answers


def make_certificate(
    proof: Proof,
    reread: Answers,
    changes: list[StoredChange],
    plan: MergePlan | None,
    dtype: str | None,
) -> dict[str, Any]:
    """The numbers of the proof.

    Args:
        proof: from the loaded base.
        reread: what the written model answers.
        changes: what became of each tensor; empty where the model was written whole.
        plan: where the checkpoint was written shard by shard.
        dtype: what the weights are stored in; None to take it from the changes.
    """
    dtype = dtype or max(
        (c.dtype for c in changes), key=lambda d: TOLERANCE.get(d, 0.0), default="bfloat16"
    )
    live = proof.live
    scale = max(float(t.abs().max()) for t in live.outputs)
    same = sum(a == b for a, b in zip(live.continuations, reread.continuations, strict=True))
    return {
        "max_abs_logit_error": max_abs_difference(live.outputs, reread.outputs),
        "max_abs_logit_error_in_memory": max_abs_difference(live.outputs, proof.merged.outputs),
        "tolerance": TOLERANCE[dtype] * max(scale, 1.0),
        "max_abs_logit": scale,
        "max_abs_logit_change": max_abs_difference(live.outputs, proof.base.outputs),
        "max_abs_logit_change_left": max_abs_difference(reread.outputs, proof.base.outputs),
        "stored_dtype": dtype,
        "survival": _survival(changes),
        "num_probes": len(live.outputs),
        "continuations_equal": same,
        "num_continuations": len(live.continuations),
        "layers": _layer_errors(live, reread),
        "tensors": [dataclasses.asdict(change) for change in changes],
        "untied": bool(plan and plan.untied),
        "by_shard": plan is not None,
    }


def _survival(changes: list[StoredChange]) -> float | None:
    """The share of the whole change that the stored weights keep; None where it is not known."""
    wanted = sum(c.delta_norm**2 for c in changes)
    return sum(c.survival * c.delta_norm**2 for c in changes) / wanted if wanted else None


def _layer_errors(live: Answers, reread: Answers) -> list[dict[str, Any]]:
    count = len(live.layers[0]) if live.layers else 0
    return [
        {
            "layer": i,
            "max_abs_error": max(
                float((a[i] - b[i]).abs().max())
                for a, b in zip(live.layers, reread.layers, strict=True)
            ),
            "max_abs": max(float(a[i].abs().max()) for a in live.layers),
        }
        for i in range(count)
    ]


def require_proved(certificate: dict[str, Any]) -> None:
    """Refuse a merged model that is not the adapter's.

    Raises:
        MergeError: it answers otherwise, or the adapter is lost in the rounding.
    """
    error, tolerance = certificate["max_abs_logit_error"], certificate["tolerance"]
    worst = max(certificate["layers"], key=lambda x: x["max_abs_error"], default=None)
    if not error <= tolerance:
        raise MergeError(
            "the merged model does not answer as the live adapter does",
            expected=f"logits within {tolerance:.3g} ({certificate['stored_dtype']})",
            found=f"{error:.3g}" + (f", worst after layer {worst['layer']}" if worst else ""),
            remedy="nothing was written; keep the adapter unmerged, or merge into a wider dtype",
        )
    change, left = certificate["max_abs_logit_change"], certificate["max_abs_logit_change_left"]
    survival = certificate["survival"]
    if survival is not None and survival < _MIN_SURVIVAL:
        raise MergeError(
            "most of the adapter would be lost in the merge",
            expected=f"at least {_MIN_SURVIVAL:.0%} of the change left after rounding",
            found=f"{survival:.1%}, stored as {certificate['stored_dtype']}",
            remedy="keep the adapter unmerged, or merge into a wider dtype",
        )
    if left < _MIN_EFFECT_LEFT * change:
        raise MergeError(
            "the merged model equals the base: the adapter was lost in the merge",
            expected=f"logits that differ from the base's by {change:.3g}",
            found=f"{left:.3g}",
            remedy=f"the stored {certificate['stored_dtype']} is too coarse for so small a change: "
            "keep the adapter unmerged, or merge into a wider dtype",
        )


def read_certificate(directory: Path) -> dict[str, Any] | None:
    """The certificate in a merged model's directory, or None when there is none.

    Raises:
        LorakitError: the file is there and is not JSON.
    """
    path = directory / CERTIFICATE_NAME
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LorakitError(
            "the merge certificate is not JSON", where=str(path), found=str(error)
        ) from error
