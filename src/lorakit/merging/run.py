"""Merge, prove, and only then give the result its name."""

from __future__ import annotations

import dataclasses
import gc
import time
import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lorakit.data.adopted_task import adopted_task
from lorakit.data.trained import TEMPLATE_NAME, trained_data
from lorakit.errors import AdapterFileError, LorakitWarning, MergeError, ModelError, RequestError
from lorakit.files import atomic_directory, require_free, temporary_beside, write_json, write_text
from lorakit.formats.peft import read_adapter
from lorakit.formats.peft_config import CONFIG_NAME, named_base
from lorakit.merging.certificate import (
    CERTIFICATE_NAME,
    Proof,
    make_certificate,
    require_proved,
)
from lorakit.merging.four_bit import (
    layer_survivals,
    require_requantizable,
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
from lorakit.models.quiet import quiet_transformers
from lorakit.models.resolve import resolve_model
from lorakit.models.task_head import ClassificationHead
from lorakit.weights.nf4 import require_nf4

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
    adapter = read_adapter(request.adapter) if saved.name == LoraMethod.name else None
    require_free(request.output)
    ref = request.base or (
        named_base(adapter.config, request.adapter / CONFIG_NAME, "--base")
        if adapter
        else _base_in_passport(saved)
    )
    resolved = resolve_model(ref)
    _require_four_bit(request, saved)
    with ExitStack() as stack:
        directory = resolved.path
        if request.onto == "nf4-dequantized":
            directory = stack.enter_context(temporary_beside(request.output))
            made_on = None if request.any_base else saved.passport
            write_dequantized(resolved.path, directory, made_on, head=_head(request, saved))
            # The base was checked above; its dequantized weights have another fingerprint.
            request = dataclasses.replace(request, any_base=True)
        # A classifier's head is not in the base's files: its merged form is written as a whole.
        by_shard = adapter is not None and _head(request, saved) is None
        plan = plan_merge(directory, adapter) if adapter and by_shard else None
        _require_shards(request, plan)
        proof, probes = _before(directory, _tokenizer(directory), request)
        staging = stack.enter_context(atomic_directory(request.output))
        dense = (
            stack.enter_context(temporary_beside(request.output)) if request.requantize else staging
        )
        changes: list[StoredChange] = []
        dtype = None
        if plan is not None:
            changes = write_shards(plan, dense)
        else:
            dtype = _write_whole(directory, request, dense)
        _write_template(saved, staging)
        certificate = make_certificate(proof, _reread(dense, probes, request), changes, plan, dtype)
        require_proved(certificate)
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


def _write_template(saved: Saved, staging: Path) -> None:
    """Turns are rendered as in training wherever the merged model is loaded."""
    template = trained_data(saved.passport).get("chat_template")
    if template is not None:
        write_text(staging / TEMPLATE_NAME, str(template))


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
    if request.requantize and _head(request, saved) is not None:
        raise RequestError(
            "a classifier is merged as a whole: what survives in 4 bits cannot be told per layer",
            where="--requantize",
            remedy="leave --requantize out, and load the merged model with quantize='nf4'",
        )


def _require_shards(request: MergeRequest, plan: MergePlan | None) -> None:
    if not request.requantize:
        return
    if plan is None:
        raise RequestError(
            "this checkpoint's tensors have other names than the model's parameters: "
            "what survives in 4 bits cannot be told per layer",
            where="--requantize",
            remedy="leave --requantize out, and load the merged model with quantize='nf4'",
        )
    require_requantizable(plan.directory)


def _requantize(
    plan: MergePlan,
    dense: Path,
    staging: Path,
    proof: Proof,
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


def _before(
    directory: Path, tokenizer: PreTrainedTokenizerBase | None, request: MergeRequest
) -> tuple[Proof, list[dict[str, Tensor]]]:
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
    proof = Proof(base, live, ask(model, probes))
    del model
    gc.collect()
    return proof, probes


def _load(directory: Path, request: MergeRequest, dtype: str | None) -> tuple[Any, Method]:
    """The base with the method on it."""
    head = _head(request, read_saved(request.adapter))
    model = load_base_model(directory, dtype=dtype, head=head)
    with warnings.catch_warnings():
        if request.onto == "nf4-dequantized":
            # Dense by now, and still the numbers that the adapter was trained beside.
            warnings.filterwarnings("ignore", ".* was trained beside", LorakitWarning)
        method = load_saved(model, request.adapter, name="adapter", any_base=request.any_base)
    return model, method


def _head(request: MergeRequest, saved: Saved) -> ClassificationHead | None:
    task = adopted_task(saved.path, saved.passport, base=request.base)
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
    with quiet_transformers():
        model.save_pretrained(staging)
    return str(model.dtype).removeprefix("torch.")


def _base_in_passport(saved: Saved) -> str:
    if saved.base is None:
        raise AdapterFileError(
            "the passport does not name its base",
            where=str(saved.path),
            remedy="name it: --base REF",
        )
    return saved.base


def _tokenizer(directory: Path) -> PreTrainedTokenizerBase | None:
    try:
        return load_tokenizer(directory)
    except ModelError:
        return None
