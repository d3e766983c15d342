"""What a saved classifier classifies: from its passport, or from what another tool left.

PEFT writes that an adapter classifies sequences (`task_type: SEQ_CLS`) and the tensors of its head,
but neither the names of the classes nor the columns. The number of outputs is that of the head; the
names are the base's where it has as many, else numbers; columns are found in the rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lorakit.data.targets import Targets
from lorakit.data.task_facts import ClassifyTask, saved_task
from lorakit.errors import AdapterFileError, ConfigError, ModelError
from lorakit.formats.peft_config import CONFIG_NAME, named_base, read_config
from lorakit.formats.peft_tensors import TENSORS_NAME, read_tensors, sort_tensors
from lorakit.models.empty import empty_classifier
from lorakit.models.load import load_config, load_tokenizer
from lorakit.models.stored import missing_parameters
from lorakit.models.task_head import (
    ClassificationHead,
    head_modules,
    own_classes,
    padding_id,
    unstored_modules,
)

_TASK_TYPE = "SEQ_CLS"


def is_classifier(directory: Path, passport: Mapping[str, Any]) -> bool:
    """Whether what a directory holds gives a row a label, whoever saved it.

    Raises:
        AdapterFileError: the passport or the configuration cannot be understood.
    """
    if saved_task(passport, where=str(directory)) is not None:
        return True
    is_peft = (directory / CONFIG_NAME).is_file()
    return is_peft and read_config(directory).get("task_type") == _TASK_TYPE


def adopted_task(
    directory: Path,
    passport: Mapping[str, Any],
    *,
    base: str | None = None,
    classes: Sequence[str] = (),
) -> ClassifyTask | None:
    """The classification task of a saved adapter, or None where it writes text.

    Args:
        directory: of the adapter.
        passport: the facts beside it; empty where another tool wrote it.
        base: the base it is used on; None for the one that it names.
        classes: their names in the order of the outputs, where the adapter does not say them.

    Raises:
        AdapterFileError: files that cannot be understood, or a head of which a part is nowhere.
        ConfigError: classes that are not as many as the outputs, or that the passport says.
        ModelError: the base cannot be found or has no classification head.
    """
    if not is_classifier(directory, passport):
        return None
    own = saved_task(passport, where=str(directory))
    if own is not None:
        _refuse_classes(classes, ", ".join(own.targets.names) or "a regression")
        return own
    config = read_config(directory)
    named = config.get("base_model_name_or_path")
    ref = base or (named if isinstance(named, str) and named else None)
    ref = ref or named_base(config, directory / CONFIG_NAME, "--model")
    learned = sort_tensors(read_tensors(directory), directory).overrides
    base_config = load_config(ref)
    targets = Targets(_names(directory, base_config, learned, classes))
    task = ClassifyTask(
        targets=targets,
        columns={},
        max_length=None,
        pad_token_id=padding_id(base_config, _tokenizer(ref)),
    )
    _require_whole_head(directory, ref, task.head, learned)
    return task


def _tokenizer(ref: str) -> PreTrainedTokenizerBase | None:
    """None where the base has none: its weights can be looked at and merged all the same."""
    try:
        return load_tokenizer(ref)
    except ModelError:
        return None


def _names(
    directory: Path,
    base: PretrainedConfig,
    learned: Mapping[str, Tensor],
    classes: Sequence[str],
) -> tuple[str, ...]:
    """The classes, in the order of the outputs; empty for a number."""
    own = own_classes(base)
    heads = [value for name, value in learned.items() if name in _output_weights(base)]
    if not heads and not own:
        raise AdapterFileError(
            "the adapter has no classification head, and its base has none",
            where=str(directory / TENSORS_NAME),
            expected=", ".join(_output_weights(base)),
            found=", ".join(list(learned)[:6]) or "no module trained beside",
            remedy="train it again with the head in modules_to_save",
        )
    count = heads[0].shape[0] if heads else len(own)
    if count == 1:
        _refuse_classes(classes, "a regression: its head has one output")
        return ()
    if classes and (len(set(classes)) < len(classes) or len(classes) != count):
        raise ConfigError(
            "these cannot be the classes",
            where="classes",
            expected=f"{count} different names, one for each output of the head",
            found=", ".join(classes),
        )
    return tuple(classes) or (own if len(own) == count else tuple(map(str, range(count))))


def _refuse_classes(classes: Sequence[str], found: str) -> None:
    if classes:
        raise ConfigError(
            "the adapter says itself what its outputs mean",
            where="classes",
            expected="an adapter of several classes without names",
            found=found,
            remedy="leave classes out",
        )


def _output_weights(base: PretrainedConfig) -> tuple[str, ...]:
    """The matrices with a row for each class: those that are larger with one class more."""
    two, three = (
        dict(empty_classifier(base, _head(names)).named_parameters())
        for names in (("a", "b"), ("a", "b", "c"))
    )
    return tuple(n for n, p in two.items() if p.ndim == 2 and p.shape != three[n].shape)


def _head(names: tuple[str, ...]) -> ClassificationHead:
    return ClassificationHead(names=names, pad_token_id=0, seed=0)


def _require_whole_head(
    directory: Path, ref: str, head: ClassificationHead, learned: Mapping[str, Tensor]
) -> None:
    """Refuse a head that would start at random where the adapter and the base both lack a part."""
    model = empty_classifier(load_config(ref), head)
    missing = missing_parameters(ref, model)
    parts = (*head_modules(model), *unstored_modules(model, missing))
    inside = tuple(f"{part}." for part in parts)
    lacking = [n for n in missing if n.startswith(inside) and n not in learned]
    if lacking:
        raise AdapterFileError(
            "the adapter lacks a part of its head",
            where=str(directory / TENSORS_NAME),
            expected=f"{len(lacking)} tensors that the base does not have either",
            found=f"without {', '.join(lacking[:6])}",
            remedy="they were drawn at random when it was trained and not saved: train again with "
            "these modules in modules_to_save",
        )
