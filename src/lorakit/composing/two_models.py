"""Two checkpoints of one architecture, parameter by parameter."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lorakit.errors import ModelError
from lorakit.models.load import Ref, load_base_model
from lorakit.models.resolve import resolve_model
from lorakit.models.stored import StoredParameters

_NUM_SHOWN = 6
# What a configuration says beside what the model computes.
_NOT_COMPUTED = re.compile(
    r"_name_or_path|torch_dtype|dtype|transformers_version|use_cache|architectures|auto_map|"
    r"tie_word_embeddings|initializer_range|.*_token_id|.*drop.*|output_.*|return_dict|use_return_.*|"
    r"id2label|label2id|problem_type|task_specific_params|finetuning_task|gradient_checkpointing|"
    r"max_position_embeddings|is_decoder|_attn_implementation.*|chunk_size_feed_forward|"
    r"classifier_.*|summary_.*|pretraining_tp"
)


class ModelPair:
    """The base and the tuned model: the parameters of both, one pair in memory at a time.

    Args:
        base, tuned: as they are named.
        base_model, tuned_model: the same without weights.

    Raises:
        ModelError: other architectures or other shapes, or a file that cannot be read.
    """

    def __init__(
        self, base: Ref, tuned: Ref, base_model: PreTrainedModel, tuned_model: PreTrainedModel
    ) -> None:
        _require_same_layout(base_model, tuned_model)
        self._models = base_model, tuned_model
        self._first = _first_names(base_model), _first_names(tuned_model)
        self._read = _reader(base, base_model), _reader(tuned, tuned_model)

    @property
    def names(self) -> dict[str, list[str]]:
        """Parameter of the base -> all names it has, itself first: tied weights have several."""
        groups: dict[str, list[str]] = {}
        for name, first in self._first[0].items():
            groups.setdefault(first, []).append(name)
        return groups

    def before(self, name: str) -> Tensor:
        """The base's values, as they are stored."""
        return self._read[0](self._first[0][name])

    def after(self, name: str) -> Tensor:
        """The tuned model's values, as they are stored.

        Raises:
            ModelError: one of them is not finite.
        """
        value = self._read[1](self._first[1][name])
        if not bool(torch.isfinite(value).all()):
            raise ModelError(
                "the tuned model has a NaN or an infinity",
                where=name,
                remedy="take an earlier checkpoint of its training",
            )
        return value

    def one_in_tuned(self, names: list[str]) -> bool:
        """Whether names that share their values in the base share them in the tuned model too."""
        return len({self._first[1][name] for name in names}) == 1

    def other_settings(self) -> dict[str, tuple[Any, Any]]:
        """What the configurations say differently of the computation: key -> base's and tuned's."""
        mine, theirs = (_settings(model.config.to_dict()) for model in self._models)
        return {
            key: (mine.get(key), theirs.get(key))
            for key in {**mine, **theirs}
            if mine.get(key) != theirs.get(key)
        }


def change_of(before: Tensor, after: Tensor) -> Tensor | None:
    """The difference in float32, or None where nothing but the storage's rounding differs."""
    if before.to(after.dtype).equal(after):
        return None
    return after.float() - before.float()


def rounding_of(before: Tensor, after: Tensor) -> float:
    """The norm of what storing the base as the tuned model is stored would change in it."""
    if torch.finfo(after.dtype).bits >= torch.finfo(before.dtype).bits:
        return 0.0
    return float((before.to(after.dtype).float() - before.float()).norm())


def _settings(config: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in config.items():
        if _NOT_COMPUTED.fullmatch(key):
            continue
        if isinstance(value, Mapping):
            found.update(_settings(value, f"{path}{key}."))
        else:
            found[f"{path}{key}"] = value
    return found


def _first_names(model: PreTrainedModel) -> dict[str, str]:
    """Every name of a parameter -> the first one that stands for the same values."""
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(parameter), name)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }


def _reader(ref: Ref, model: PreTrainedModel) -> Callable[[str], Tensor]:
    """From the files, or where transformers renames tensors on load, from the loaded model."""
    stored = StoredParameters(resolve_model(ref).path, model)
    if not stored.missing:
        return stored.read
    loaded = dict(load_base_model(ref, dtype="auto", device="cpu").named_parameters())
    return lambda name: loaded[name].detach()


def _require_same_layout(base: PreTrainedModel, tuned: PreTrainedModel) -> None:
    if type(base) is not type(tuned):
        raise ModelError(
            "the two models have different architectures",
            where="tuned",
            expected=type(base).__name__,
            found=type(tuned).__name__,
            remedy="give the base that this model was fine-tuned from",
        )
    mine, theirs = (
        {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
        for model in (base, tuned)
    )
    wrong = [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
    if wrong:
        shown = [
            f"{name}: {mine.get(name, 'absent')} and {theirs.get(name, 'absent')}"
            for name in wrong[:_NUM_SHOWN]
        ]
        more = [f"and {len(wrong) - _NUM_SHOWN} more"] if len(wrong) > _NUM_SHOWN else []
        raise ModelError(
            "the two models have different layers or shapes",
            where="tuned",
            found="\n".join([*shown, *more]),
            remedy=_resized(base, tuned)
            or "an adapter cannot add layers: give a base of the same shape",
        )


def _resized(base: PreTrainedModel, tuned: PreTrainedModel) -> str | None:
    """What to do where tokens were added to the vocabulary."""
    mine, theirs = base.get_input_embeddings(), tuned.get_input_embeddings()
    sizes = [getattr(embedding, "num_embeddings", None) for embedding in (mine, theirs)]
    if None in sizes or sizes[0] == sizes[1]:
        return None
    return (
        f"an adapter cannot add tokens, and the vocabulary went from {sizes[0]} to {sizes[1]}: "
        f"base.resize_token_embeddings({sizes[1]}), save that, and give it as --base, with "
        "--also-train for the embeddings; who uses the adapter resizes likewise"
    )
