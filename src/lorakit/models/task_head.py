"""A classification head on any base: what the model is, where its head is, how it starts."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lorakit.errors import LorakitWarning, ModelError

_DEFAULT_STD = 0.02


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassificationHead:
    """A head with one output per class, or one number.

    Attributes:
        names: the classes in the order of their ids; empty for a number.
        pad_token_id: what batches are padded with.
        seed: of the head's first weights.
        mean: of the numbers that are to be learned; a fresh head starts by predicting it.
        learned: whether saved weights follow, so that nothing is said of where it starts.
    """

    names: tuple[str, ...]
    pad_token_id: int
    seed: int
    mean: float = 0.0
    learned: bool = False

    def configured(self, config: PretrainedConfig) -> PretrainedConfig:
        """A copy of the base's configuration that asks for this head."""
        changed = copy.deepcopy(config)
        names = self.names or ("LABEL_0",)
        # First, because it renames all classes where their number changes.
        changed.num_labels = len(names)
        changed.id2label = dict(enumerate(names))
        changed.label2id = {name: index for index, name in enumerate(names)}
        changed.problem_type = "single_label_classification" if self.names else "regression"
        # Decoders find a row's last token by it, also where the base itself does without.
        changed.get_text_config().pad_token_id = self.pad_token_id
        changed.pad_token_id = self.pad_token_id
        return changed

    def start(self, model: PreTrainedModel, missing: Iterable[str]) -> list[str]:
        """Give every head module that no file filled its first weights; mutates the model.

        W ~ N(0, initializer_range^2) and b = 0, from this head's seed alone; where a number is to
        be learned, the bias behind the last matrix is its mean. An optimizer whose steps have the
        size of the learning rate would else spend its first steps on the offset alone.

        Modules of the body that the files lack whole (see `unstored_modules`) start likewise.

        Returns:
            The missing tensors that are not the head's.
        """
        missing = tuple(missing)
        own = head_modules(model)
        heads = (*own, *unstored_modules(model, missing))
        mine = {n for n in missing if n.startswith(tuple(f"{head}." for head in heads))}
        generator = torch.Generator().manual_seed(self.seed)
        std = float(getattr(model.config, "initializer_range", None) or _DEFAULT_STD)
        for head in heads:
            for name, parameter in model.get_submodule(head).named_parameters(prefix=head):
                # Drawn also where it is not used: one tensor's values must not hang on another's.
                drawn = torch.randn(parameter.shape, generator=generator) * std
                if name in mine:
                    with torch.no_grad():
                        parameter.copy_(self._start_of(name, drawn))
        if (
            own
            and not self.learned
            and not any(n.startswith(tuple(f"{head}." for head in own)) for n in mine)
        ):
            warnings.warn(
                f"the base has a trained head of {len(self.names) or 1} outputs of its own: it is "
                "the start",
                LorakitWarning,
                stacklevel=2,
            )
        return sorted(set(missing) - mine)

    def _start_of(self, name: str, drawn: Tensor) -> Tensor:
        """Biases start at zero or the mean, the weights of norms at one, matrices as drawn."""
        if name.endswith("bias"):
            is_last = not self.names and drawn.numel() == 1
            return torch.full_like(drawn, self.mean if is_last else 0.0)
        return torch.ones_like(drawn) if drawn.ndim == 1 else drawn


def classifier_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class that puts a classification head on this architecture.

    Raises:
        ModelError: there is none, or it is a sequence-to-sequence model.
    """
    known = type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    if not known or config.is_encoder_decoder:
        raise ModelError(
            f"the model type {config.model_type!r} cannot classify sequences here",
            where=config.name_or_path or "config.json, key model_type",
            expected="an encoder (BERT, RoBERTa, DeBERTa-v2) or a decoder (Llama, Qwen, GPT-2)",
            found="a sequence-to-sequence model" if config.is_encoder_decoder else None,
            remedy="take another base, such as minilm-l6-v2",
        )
    found = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]
    return cast(type[PreTrainedModel], found)


def head_modules(model: PreTrainedModel) -> tuple[str, ...]:
    """The modules of a classifier that are not its pretrained body: what task classify trains.

    `classifier` in BERT and RoBERTa, `pooler` and `classifier` in DeBERTa-v2, `score` in decoders.
    """
    return tuple(
        name
        for name, child in model.named_children()
        if name != model.base_model_prefix and next(child.parameters(), None) is not None
    )


def unstored_modules(model: PreTrainedModel, missing: Iterable[str]) -> tuple[str, ...]:
    """Modules of a classifier's body of which the base's files hold nothing.

    A base that was saved for another task may lack what only a classifier reads: BERT for masked
    tokens has no pooler. Such a module is as new as the head, and is learned and saved with it.

    Args:
        model: with its classification head; one on the meta device will do.
        missing: the parameters that no tensor of the files is named for.
    """
    prefix = model.base_model_prefix
    if prefix not in dict(model.named_children()):
        return ()
    lacking = frozenset(missing)
    parts: dict[str, list[str]] = {}
    for name, _ in model.get_submodule(prefix).named_parameters():
        parts.setdefault(f"{prefix}.{name.partition('.')[0]}", []).append(f"{prefix}.{name}")
    found = tuple(part for part, inside in parts.items() if lacking.issuperset(inside))
    # Where most of the body is not there under its names, names say nothing.
    return found if 2 * len(found) < len(parts) else ()


def own_classes(config: PretrainedConfig) -> tuple[str, ...]:
    """The names of the classes that the base itself was trained on, in the order of their ids.

    Empty where it is no classifier, or its classes have no names of their own (LABEL_0, ...).
    """
    named = (config.architectures or [""])[0] or ""
    names = [str(name) for _, name in sorted((config.id2label or {}).items())]
    if not named.endswith("ForSequenceClassification") or len(set(names)) < max(2, len(names)):
        return ()
    return () if all(name == f"LABEL_{i}" for i, name in enumerate(names)) else tuple(names)


def own_head_names(wanted: type[PreTrainedModel], config: PretrainedConfig) -> tuple[str, ...]:
    """The top-level modules of the base's own task head (`lm_head`, `cls`), which is left behind.

    Args:
        wanted: the class that the base's configuration names.
        config: the base's configuration.
    """
    if not issubclass(wanted, PreTrainedModel):
        return ()
    with torch.device("meta"):
        model = wanted(config)
    names = [name for name, _ in model.named_children()]
    prefix = model.base_model_prefix
    return tuple(name for name in names if name != prefix) if prefix in names else ()


def without_own_head(unexpected: Iterable[str], own: Iterable[str]) -> list[str]:
    """The unexpected tensors that are not the base's own head."""
    heads = tuple(f"{name}." for name in own)
    return sorted(name for name in unexpected if not name.startswith(heads or ("\0",)))


def padding_id(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase | None) -> int:
    """What to pad with: the model's padding token, else the tokenizer's, else the end of text.

    Without a tokenizer the model's own tokens are asked.

    Raises:
        ModelError: none of them is there.
    """
    text = config.get_text_config()
    ends = text if tokenizer is None else tokenizer
    candidates: list[Any] = [text.pad_token_id, ends.pad_token_id, ends.eos_token_id]
    for found in candidates:
        if isinstance(found, int) and 0 <= found < text.vocab_size:
            return found
    raise ModelError(
        "there is no token to pad with",
        where=config.name_or_path or None,
        expected="a pad_token or an eos_token",
        remedy="set the tokenizer's pad_token",
    )


def head_parameters(model: nn.Module, names: Iterable[str]) -> int:
    """Learned numbers in these modules."""
    return sum(p.numel() for name in names for p in model.get_submodule(name).parameters())
