"""What an encoder-decoder model needs beside its inputs."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from lorakit.errors import DataError

_IGNORED = -100


def decoder_inputs(model: PreTrainedModel, labels: Tensor) -> Tensor:
    """The labels moved right by one behind the start token, as transformers' seq2seq models do."""
    start = model.config.decoder_start_token_id
    if start is None:
        start = model.config.bos_token_id
    pad = model.config.pad_token_id
    if start is None or pad is None:
        raise DataError(
            "this sequence-to-sequence model does not say how its decoder starts",
            where=type(model).__name__,
            expected="decoder_start_token_id and pad_token_id in its configuration",
            remedy="set them in the model's config.json",
        )
    shifted = F.pad(labels[:, :-1], (1, 0), value=start)
    return shifted.masked_fill(shifted == _IGNORED, pad)
