"""The model a configuration describes, without weights: names, shapes, ties on the meta device."""

from __future__ import annotations

from typing import cast

import torch
from transformers import PretrainedConfig, PreTrainedModel

from lorakit.models.load import Ref, load_config, model_class
from lorakit.models.quiet import quiet_transformers
from lorakit.models.task_head import ClassificationHead, classifier_class


def empty_model(ref: Ref) -> PreTrainedModel:
    """A base model without its weights; from a hub, config.json alone is downloaded.

    Args:
        ref: see `lorakit.models.load.load_model`.

    Raises:
        ModelError: the model cannot be found, or its configuration is not one transformers knows.
    """
    return empty_from_config(load_config(ref))


def empty_from_config(config: PretrainedConfig) -> PreTrainedModel:
    """The model of a configuration, every parameter on the meta device."""
    wanted = model_class(config)
    with quiet_transformers(), torch.device("meta"):
        if issubclass(wanted, PreTrainedModel):
            model = wanted(config)
        else:
            # No architecture is named: one of transformers' Auto classes, which build themselves.
            model = cast(PreTrainedModel, wanted.from_config(config))
    model.tie_weights()
    return model


def empty_classifier(config: PretrainedConfig, head: ClassificationHead) -> PreTrainedModel:
    """The model of a configuration with a classification head, every parameter on the meta device.

    Raises:
        ModelError: the architecture has no classification head.
    """
    changed = head.configured(config)
    with quiet_transformers(), torch.device("meta"):
        return classifier_class(changed)(changed)
