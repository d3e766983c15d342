"""What a checkpoint of loralib holds beside the factors: a classifier's head, trained biases.

`lora_state_dict(model, bias=...)` saves factors and trained biases, and the examples add the head:
in such a file everything is trained. A checkpoint of the whole model has frozen weights too, maybe
with the update merged in: of it the head alone is known to be trained.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from lorakit.adapters.adapter import Adapter
from lorakit.errors import LorakitWarning
from lorakit.formats.foreign import Names, one_name_each

# The last matrix of a head that classifies sequences has a row for each class.
_HEADS = ("classifier.out_proj.weight", "classifier.weight", "score.weight")
_ENDINGS = (".lora_A", ".lora_B")


def classifying_head(tensors: Mapping[str, Tensor]) -> tuple[str, int] | None:
    """The last matrix of the head that a file brings, and its outputs; None without one."""
    for name, tensor in tensors.items():
        bare = name.removeprefix("module.")
        if bare in _HEADS and tensor.ndim == 2:
            return bare, tensor.shape[0]
    return None


def with_what_is_beside(
    adapter: Adapter, tensors: Mapping[str, Tensor], model: nn.Module, where: Path
) -> Adapter:
    """The adapter with the parameters that a file has beside its factors.

    Args:
        adapter: of the file's factors.
        tensors: the whole file.
        model: the base, with or without weights.
        where: the file, for errors.

    Raises:
        AdapterFileError: two names in the file mean one parameter.

    Warns:
        LorakitWarning: tensors that are not read.
    """
    rest = {key: tensor for key, tensor in tensors.items() if not key.endswith(_ENDINGS)}
    places = _places(list(rest), model)
    one_name_each(places, where)
    modules = adapter.modules()
    is_whole = any(f"{module}.weight" in places.values() for module in modules)
    heads = _heads(model)
    read = {k: n for k, n in places.items() if not is_whole or _inside(n, heads)}
    _warn([key for key in rest if key not in read], is_whole=is_whole)
    named = {name: rest[key] for key, name in read.items()}
    biases = {m: named.pop(f"{m}.bias") for m in modules if f"{m}.bias" in named}
    leaves: dict[str, set[str]] = {}
    for name in named:
        owner, _, leaf = name.rpartition(".")
        leaves.setdefault(owner, set()).add(leaf)
    own_heads = tuple(head for head in heads if any(_inside(n, (head,)) for n in named))
    outside = [owner for owner in leaves if not _inside(f"{owner}.", own_heads)]
    only_biases = [owner for owner in outside if leaves[owner] == {"bias"}]
    whole_modules = tuple(owner for owner in outside if owner not in only_biases)
    spec = {
        **adapter.spec.to_dict(),
        "bias": "all" if only_biases else "lora_only" if biases else "none",
        "also_train": (*own_heads, *whole_modules),
    }
    task = {"task_type": "SEQ_CLS"} if own_heads and own_heads == heads else {}
    return replace(
        adapter,
        spec=adapter.spec.from_dict(spec),
        biases=biases,
        overrides=named,
        config={**adapter.config, **task},
    )


def _places(keys: Sequence[str], model: nn.Module) -> dict[str, str]:
    """Name in the file -> the base's parameter, where it has one."""
    names = Names(model)
    places: dict[str, str] = {}
    for key in keys:
        owner, _, leaf = key.rpartition(".")
        module = names.find(owner)
        if module is not None and leaf in dict(
            names.modules[module].named_parameters(recurse=False)
        ):
            places[key] = f"{module}.{leaf}"
    return places


def _heads(model: nn.Module) -> tuple[str, ...]:
    """The modules of a classifier that are not its pretrained body."""
    if not type(model).__name__.endswith("ForSequenceClassification"):
        return ()
    body = str(getattr(model, "base_model_prefix", ""))
    return tuple(
        name
        for name, child in model.named_children()
        if name != body and next(child.parameters(), None) is not None
    )


def _inside(name: str, modules: Sequence[str]) -> bool:
    return name.startswith(tuple(f"{module}." for module in modules))


def _warn(left: Sequence[str], *, is_whole: bool) -> None:
    if left and is_whole:
        warnings.warn(
            f"{len(left)} tensors that are no low-rank update are not read ({left[0]}, ...): a "
            "whole checkpoint's frozen weights may have the update merged in",
            LorakitWarning,
            stacklevel=5,
        )
    elif left:
        warnings.warn(
            f"{len(left)} tensors have no place in the base and are not read ({left[0]}, ...): is "
            "--base right, with the head that was trained?",
            LorakitWarning,
            stacklevel=5,
        )
