"""The model a verb works on: its arguments, and loading it with its adapter."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lorakit.cli.console import note
from lorakit.data.adopted_task import adopted_task, is_classifier
from lorakit.data.task_facts import ClassifyTask, saved_task
from lorakit.errors import AdapterFileError, RequestError
from lorakit.formats.peft_config import CONFIG_NAME, named_base, read_config
from lorakit.methods.base import Method
from lorakit.methods.files import read_saved
from lorakit.methods.lora import LoraMethod
from lorakit.methods.saved import load_saved
from lorakit.models.load import load_base_model, load_model, load_tokenizer

# The name an adapter from the command line has on the model.
ADAPTER = "adapter"


@dataclass(frozen=True, kw_only=True, slots=True)
class Session:
    """A loaded model.

    Attributes:
        ref: the base as it was named.
        model: the base, with what was learned attached and active if there is any.
        tokenizer: its tokenizer.
        method: what was learned, or None.
    """

    ref: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    method: Method | None

    @property
    def systems(self) -> dict[str, Callable[[], AbstractContextManager[object]]]:
        """What can answer: a label, and what switches the model over for a block."""
        if self.method is None:
            return {"base": nullcontext}
        return {"base": partial(self.method.disabled, self.model), "adapter": nullcontext}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare --model, --adapter, --dtype, --quantize, --device and --any-base."""
    parser.add_argument(
        "--model",
        "--base",
        metavar="REF",
        help="the base: a hub id, a directory, a .gguf file or a named model such as "
        "smollm2-135m-instruct; by default the base that the adapter names",
    )
    parser.add_argument("--adapter", metavar="DIR", help="a directory that a method saved")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16", "auto"],
        help="load the weights as this; by default float32 on a CPU, bfloat16 on CUDA",
    )
    parser.add_argument(
        "--quantize",
        choices=["nf4"],
        help="keep the base's linear layers in 4 bits, quantized while they are read",
    )
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--any-base",
        action="store_true",
        help="accept an adapter that was trained on another base",
    )


def open_session(args: argparse.Namespace) -> Session:
    """Load what `add_model_arguments` asked for.

    Raises:
        RequestError: neither a model nor an adapter is named, or the adapter is a classifier.
        ModelError, AdapterFileError, BaseMismatchError: see the loaders.
    """
    require_writer(args.adapter)
    ref = args.model or base_of(args.adapter)
    note(f"loading {ref}" + (f" with {args.adapter}" if args.adapter else ""))
    model, tokenizer = load_model(ref, args.quantize, dtype=args.dtype, device=args.device)
    method = None
    if args.adapter:
        method = load_saved(model, args.adapter, name=ADAPTER, any_base=args.any_base)
    return Session(ref=ref, model=model, tokenizer=tokenizer, method=method)


def open_classifier(args: argparse.Namespace, task: ClassifyTask) -> Session:
    """Load the base with the task's head, and what was learned on it.

    Raises:
        ModelError, AdapterFileError, BaseMismatchError: see the loaders.
    """
    ref = args.model or base_of(args.adapter)
    note(f"loading {ref} with {args.adapter}")
    tokenizer = load_tokenizer(ref)
    model = load_base_model(
        ref, args.quantize, dtype=args.dtype, device=args.device, head=task.head
    )
    method = load_saved(model, args.adapter, name=ADAPTER, any_base=args.any_base)
    return Session(ref=ref, model=model, tokenizer=tokenizer, method=method)


def require_writer(adapter: str | None) -> None:
    """Refuse an adapter that labels rows where text is to be written.

    Raises:
        RequestError: it was trained to classify.
        AdapterFileError: there is no adapter, or its files cannot be understood.
    """
    if adapter is None:
        return
    saved = read_saved(adapter)
    if not is_classifier(saved.path, saved.passport):
        return
    task = saved_task(saved.passport, where=adapter)
    raise RequestError(
        "this adapter was trained with task: classify; it gives a row a label and cannot write",
        where=adapter,
        expected="an adapter trained with task: sft",
        found=task.lines()["task"] if task else f"task_type SEQ_CLS in {CONFIG_NAME}",
        remedy="lorakit eval DATA --adapter DIR --predictions FILE gives each row its label",
    )


def task_of(
    adapter: str | None, base: str | None = None, *, classes: Sequence[str] = ()
) -> ClassifyTask | None:
    """The classification task of an adapter; None where there is no adapter, or it writes text.

    Args:
        adapter: its directory.
        base: the base it is used on; None for the one that it names.
        classes: see `adopted_task`.

    Raises:
        AdapterFileError: there is no adapter, or its files cannot be understood.
        ConfigError, ModelError: see `adopted_task`.
    """
    if adapter is None:
        return None
    saved = read_saved(adapter)
    return adopted_task(saved.path, saved.passport, base=base, classes=classes)


def base_of(adapter: str | None) -> str:
    """The base model that an adapter's own config names.

    Raises:
        RequestError: no adapter is given.
        AdapterFileError: the adapter does not name its base.
    """
    if adapter is None:
        raise RequestError(
            "no model is named",
            where="the command line",
            expected="--model REF, --adapter DIR, or both",
            remedy="for a first try: --model smollm2-135m-instruct",
        )
    saved = read_saved(adapter)
    if saved.name != LoraMethod.name:
        if saved.base is None:
            raise AdapterFileError(
                "the passport does not name its base", where=adapter, remedy="name it: --model REF"
            )
        return saved.base
    return named_base(read_config(Path(adapter)), Path(adapter) / CONFIG_NAME, "--model")
