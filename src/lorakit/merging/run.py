"""Merge, prove, and only then give the result its name."""

from __future__ import annotations

import dataclasses
import gc
import json
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lorakit.adapters.adapter import Adapter
from lorakit.data.task_facts import saved_task
from lorakit.errors import AdapterFileError, LorakitError, MergeError, ModelError, RequestError
from lorakit.files import atomic_directory, require_free, write_json, writing
from lorakit.merging.four_bit import (
    layer_survivals,
    survival_report,
    write_dequantized,
    write_requantized,
)
from lorakit.merging.plan import MergePlan, plan_merge
from lorakit.merging.probes import Answers, ask, make_probes, max_abs_difference
from lorakit.merging.shards import StoredChange, write_shards
from lorakit.methods.base import Method
from lorakit.methods.files import Saved, read_saved
from lorakit.methods.lora import LoraMethod
from lorakit.methods.saved import load_saved
from lorakit.models.checkpoint import copy_companions
from lorakit.models.load import load_base_model, load_tokenizer
from lorakit.models.resolve import resolve_model
from lorakit.models.task_head import ClassificationHead
from lorakit.weights.nf4 import require_nf4

CERTIFICATE_NAME = "merge.json"
# The largest logit error that the stored dtype explains, as a share of the largest logit.
TOLERANCE = {"float64": 1e-5, "float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
_MIN_EFFECT_LEFT = 0.1
# Less of the change than this is left after rounding: the merged model is not the adapter's.
_MIN_SURVIVAL = 0.5

Onto = Literal["dense", "nf4-dequantized"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeRequest:
    """What to merge into what.

    Attributes:
        adapter: the adapter's directory.
        output: the directory to write; must be free.
        base: the base model; None for the one the adapter names.
        any_base: merge even if the passport names another base.
        dtype: the dtype the proof is computed in; None for the default of `load_model`.
        onto: "dense" for the original weights, "nf4-dequantized" for these as NF4 holds them: what
            an adapter that was trained on NF4 was trained beside.
        requantize: "nf4" stores the merged model in 4 bits, with a report of what survived.
    """

    adapter: Path
    output: Path
    base: str | None = None
    any_base: bool = False
    dtype: str | None = None
    onto: Onto = "dense"
    requantize: Literal["nf4"] | None = None


def merge_to_disk(request: MergeRequest) -> dict[str, Any]:
    """Write the merged model as a clean Hugging Face directory, with its certificate.

    Everything is planned and validated first. The live, the merged and the re-read model are asked
    the same probes, one model in memory at a time. The output takes its name only if they agree.

    Returns:
        The certificate, as written to merge.json.

    Raises:
        AdapterFileError, BaseMismatchError, ModelError, OutputError: the request was wrong.
        MergeError: the proof failed; nothing is left behind.
    """
    started = time.monotonic()
    saved = read_saved(request.adapter)
    adapter = Adapter.load(request.adapter) if saved.name == LoraMethod.name else None
    require_free(request.output)
    ref = request.base or (
        _named_base(adapter, request.adapter) if adapter else _base_in_passport(saved)
    )
    resolved = resolve_model(ref)
    _require_four_bit(request, saved)
    with ExitStack() as stack:
        directory = resolved.path
        if request.onto == "nf4-dequantized":
            directory = _beside(request.output, stack)
            _write_dequantized(resolved.path, directory, saved, request)
            # The base was checked above; its dequantized weights have another fingerprint.
            request = dataclasses.replace(request, any_base=True)
        # A classifier's head is not in the base's files: its merged form is written as a whole.
        by_shard = adapter is not None and _head(saved) is None
        plan = plan_merge(directory, adapter) if adapter and by_shard else None
        _require_shards(request, plan)
        proof, probes = _before(directory, _tokenizer(directory), request)
        staging = stack.enter_context(atomic_directory(request.output))
        dense = _beside(request.output, stack) if request.requantize else staging
        changes: list[StoredChange] = []
        dtype = None
        if plan is not None:
            changes = write_shards(plan, dense)
        else:
            dtype = _write_whole(directory, request, dense)
        certificate = _certificate(proof, _reread(dense, probes, request), changes, plan, dtype)
        _require(certificate)
        if request.requantize and plan is not None:
            certificate |= _requantize(plan, dense, staging, proof, (probes, request))
        certificate |= {
            "onto": request.onto,
            "adapter": str(request.adapter),
            "base": ref,
            "output": str(request.output),
            "seconds": round(time.monotonic() - started, 2),
        }
        write_json(staging / CERTIFICATE_NAME, certificate)
    return certificate


def _beside(output: Path, stack: ExitStack) -> Path:
    """A temporary directory on the disk that the result will take, gone when the stack closes."""
    parent = output.resolve().parent
    with writing(output):
        parent.mkdir(parents=True, exist_ok=True)
        held = TemporaryDirectory(prefix=f".{output.name}.", suffix=".partial", dir=parent)
    return Path(stack.enter_context(held))


def _require_four_bit(request: MergeRequest, saved: Saved) -> None:
    """Refuse, before anything is read, what cannot be merged around 4-bit weights."""
    if request.onto == "dense" and request.requantize is None:
        return
    require_nf4(torch.device("cpu"))
    if saved.name != LoraMethod.name:
        raise RequestError(
            "only low-rank adapters are merged around 4-bit weights",
            where="--onto" if request.onto != "dense" else "--requantize",
            found=saved.name,
            remedy="merge into the dense weights: leave --onto and --requantize out",
        )
    if request.requantize and _head(saved) is not None:
        raise RequestError(
            "a classifier is merged as a whole: what survives in 4 bits cannot be told per layer",
            where="--requantize",
            remedy="leave --requantize out, and load the merged model with quantize='nf4'",
        )


def _require_shards(request: MergeRequest, plan: MergePlan | None) -> None:
    if request.requantize and plan is None:
        raise RequestError(
            "this checkpoint's tensors have other names than the model's parameters: "
            "what survives in 4 bits cannot be told per layer",
            where="--requantize",
            remedy="leave --requantize out, and load the merged model with quantize='nf4'",
        )


def _write_dequantized(directory: Path, output: Path, saved: Saved, request: MergeRequest) -> None:
    with writing(request.output):
        write_dequantized(
            directory, output, None if request.any_base else saved.passport, head=_head(saved)
        )


def _requantize(
    plan: MergePlan,
    dense: Path,
    staging: Path,
    proof: _Before,
    asked: tuple[list[dict[str, Tensor]], MergeRequest],
) -> dict[str, Any]:
    """Store the merged model in 4 bits, and measure what that costs."""
    quantization = write_requantized(dense, staging)
    reread = _reread(staging, *asked)
    report = survival_report(layer_survivals(plan), proof.base, proof.live, reread)
    return {"quantization": quantization, "requantized": report}


def _reread(directory: Path, probes: list[dict[str, Tensor]], request: MergeRequest) -> Answers:
    model = load_base_model(directory, dtype=request.dtype)
    answers = ask(model, probes, generate=True)
    del model
    gc.collect()
    return answers


@dataclass(frozen=True, slots=True)
class _Before:
    base: Answers
    live: Answers
    merged: Answers


def _before(
    directory: Path, tokenizer: PreTrainedTokenizerBase | None, request: MergeRequest
) -> tuple[_Before, list[dict[str, Tensor]]]:
    """The base's, the live method's and the in-memory merge's answers, from one loaded model."""
    model, method = _load(directory, request, request.dtype)
    probes = make_probes(model, tokenizer)
    with method.disabled(model):
        base = ask(model, probes)
    live = ask(model, probes, generate=True)
    if max_abs_difference(base.outputs, live.outputs) == 0.0:
        raise MergeError(
            "the adapter changes nothing: the merged model would equal the base",
            where=str(request.adapter),
            remedy="was it trained? `lorakit inspect` shows its norms",
        )
    _merge(model, method, request)
    proof = _Before(base, live, ask(model, probes))
    del model
    gc.collect()
    return proof, probes


def _load(directory: Path, request: MergeRequest, dtype: str | None) -> tuple[Any, Method]:
    """The base with the method on it."""
    head = _head(read_saved(request.adapter))
    model = load_base_model(directory, dtype=dtype, head=head)
    method = load_saved(model, request.adapter, name="adapter", any_base=request.any_base)
    return model, method


def _head(saved: Saved) -> ClassificationHead | None:
    task = saved_task(saved.passport, where=str(saved.path))
    return None if task is None else task.head


def _merge(model: PreTrainedModel, method: Method, request: MergeRequest) -> None:
    try:
        method.merge(model)
    except MergeError as error:
        if method.name == LoraMethod.name:
            raise
        # Not a failure of the work: this method has no merged form.
        raise RequestError(
            f"{method.name} cannot be merged here: {error.what}",
            where=str(request.adapter),
            expected=error.expected,
            found=error.found,
            remedy=error.remedy,
        ) from error


def _write_whole(directory: Path, request: MergeRequest, staging: Path) -> str:
    """Merge the loaded model and save it; returns the dtype it is stored in.

    For methods other than LoRA, for classifiers, and for checkpoints whose tensor names
    transformers rewrites on load.
    """
    model, method = _load(directory, request, "auto")
    _merge(model, method, request)
    copy_companions(directory, staging)
    model.save_pretrained(staging)
    return str(model.dtype).removeprefix("torch.")


def _certificate(
    proof: _Before,
    reread: Answers,
    changes: list[StoredChange],
    plan: MergePlan | None,
    dtype: str | None,
) -> dict[str, Any]:
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


def _require(certificate: dict[str, Any]) -> None:
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


def _base_in_passport(saved: Saved) -> str:
    if saved.base is None:
        raise AdapterFileError(
            "the passport does not name its base",
            where=str(saved.path),
            remedy="name it: --base REF",
        )
    return saved.base


def _named_base(adapter: Adapter, path: Path) -> str:
    name = adapter.config.get("base_model_name_or_path")
    if not name:
        raise AdapterFileError(
            "the adapter does not name its base",
            where=str(path),
            remedy="name it: --base REF",
        )
    return str(name)


def _tokenizer(directory: Path) -> PreTrainedTokenizerBase | None:
    try:
        return load_tokenizer(directory)
    except ModelError:
        return None


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
