"""How likely a model finds given answers: perplexity, and choice among alternatives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from lorakit.errors import DataError
from lorakit.models.label_head import IGNORED, LabelHead, evaluating
from lorakit.progress import progress

Floats = NDArray[np.float64]


class Labelled(Protocol):
    """Token ids and, at the same places, what is to be predicted (-100 where nothing is)."""

    @property
    def input_ids(self) -> Sequence[int]:
        """Token ids."""
        ...

    @property
    def labels(self) -> Sequence[int]:
        """Token ids, -100 where nothing is predicted."""
        ...


def answer_nll(
    model: PreTrainedModel,
    examples: Sequence[Labelled],
    *,
    batch_size: int = 16,
    label: str = "scoring",
    origins: Sequence[str] | None = None,
) -> Floats:
    """The negative log-likelihood of each example's labels, and how many labels it has.

    Examples of similar length share a batch; logits are computed at the labels only. The adapter
    that is active counts; the model comes back in the mode it was in.

    Args:
        model: a causal or sequence-to-sequence language model.
        examples: token ids and labels.
        batch_size: examples per forward pass.
        label: what the progress bar says.
        origins: where each example comes from, for error messages.

    Returns:
        (n, 2): the sum in nats, and the number of labels.

    Raises:
        DataError: an example has no label that anything precedes.
    """
    result = np.zeros((len(examples), 2))
    if not len(examples):
        return result
    _require_labels(examples, bool(model.config.is_encoder_decoder), origins)
    order = sorted(range(len(examples)), key=lambda i: (-len(examples[i].input_ids), i))
    head = LabelHead(model)
    with progress(label, len(examples)) as bar, evaluating(model), torch.inference_mode():
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = _collate([examples[i] for i in chosen], model.device)
            found = head.logits(batch)
            result[chosen, 0] = found.row_nll(len(chosen)).cpu().numpy()
            result[chosen, 1] = torch.bincount(found.rows, minlength=len(chosen)).cpu().numpy()
            bar.advance(len(chosen))
    return result


def perplexity_of(statistics: Floats) -> Floats:
    """Perplexity exp(sum of nll / number of tokens), (...), from summed statistics (..., 2)."""
    return np.exp(statistics[..., 0] / statistics[..., 1])


def perplexity(
    model: PreTrainedModel, examples: Sequence[Labelled], *, batch_size: int = 16
) -> float:
    """Perplexity: exp of the mean negative log-likelihood over all labels of all examples.

    Raises:
        DataError: there are no examples, or one has no labels.
    """
    if not len(examples):
        raise DataError("there are no examples to score", expected="at least one row")
    return float(perplexity_of(answer_nll(model, examples, batch_size=batch_size).sum(axis=0)))


def best_choices(statistics: Floats, num_choices: Sequence[int], *, per_token: bool) -> list[int]:
    """The most likely choice of each row, the first one on ties.

    Args:
        statistics: (sum of num_choices, 2), nll and number of tokens of every choice of every row.
        num_choices: how many choices each row has.
        per_token: compare nll / tokens, which does not favour short choices, in place of nll.
    """
    costs = statistics[:, 0] / statistics[:, 1] if per_token else statistics[:, 0]
    ends = np.cumsum(num_choices)
    return [int(np.argmin(costs[e - k : e])) for e, k in zip(ends, num_choices, strict=True)]


def _require_labels(
    examples: Sequence[Labelled], seq2seq: bool, origins: Sequence[str] | None
) -> None:
    for index, example in enumerate(examples):
        # The first token of a causal model is predicted by nothing.
        counted = example.labels if seq2seq else example.labels[1:]
        if all(token == IGNORED for token in counted):
            raise DataError(
                "an example has no label to score",
                where=origins[index] if origins is not None else f"example {index}",
                expected="at least one token that is learned, behind the first",
                remedy="check that the row's answer is not empty and was not cut off",
            )


def _collate(examples: Sequence[Labelled], device: torch.device) -> dict[str, Tensor]:
    input_ids = _padded([example.input_ids for example in examples], 0)
    return {
        "input_ids": input_ids.to(device),
        "attention_mask": _padded([[1] * len(e.input_ids) for e in examples], 0).to(device),
        "labels": _padded([example.labels for example in examples], IGNORED).to(device),
    }


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    tensor = torch.full((len(rows), max(len(row) for row in rows)), value)
    for index, row in enumerate(rows):
        tensor[index, : len(row)] = torch.tensor(row)
    return tensor
