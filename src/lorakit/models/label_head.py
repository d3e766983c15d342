"""Losses and likelihoods with logits only where there is a label.

A completion-only batch has labels on a fraction of its positions, and the logits (positions x
vocabulary, in float32) are the largest tensor of a step. So the model's own forward runs once,
whole, and a hook in front of its output head lets only the labelled positions through. Everything
the model does to its logits afterwards (scaling, soft-capping) still happens, wrappers around the
model or around the head (data parallel, an adapter) still see the call, and the result is the
model's own. On the first batch it is compared with the full forward; where they disagree the full
forward is used from then on, with a warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from lorakit.adapters.attach import active_adapter
from lorakit.adapters.attachments import find_attachments
from lorakit.errors import DataError, LorakitWarning, ModelError
from lorakit.layers.adapted import Wrapper
from lorakit.layers.chunked_loss import chunked_cross_entropy
from lorakit.layers.fused import frozen_parameters
from lorakit.layers.prefix import prompts_before
from lorakit.models.head_watch import HeadWatch, Selection
from lorakit.models.logits_agree import agree, difference, excerpt
from lorakit.models.loss_share import LossShare
from lorakit.models.packing import PackedBatch, drops, pack_batch, takes_packed
from lorakit.models.row_threads import row_groups, sum_of_groups
from lorakit.models.seq2seq import decoder_inputs

IGNORED = -100

Batch = Mapping[str, Tensor]
# The weight and bias of a head that is nothing but a product.
FrozenHead = tuple[Tensor, Tensor | None]

_CHECKED_ROWS = 2


@dataclass(frozen=True, slots=True)
class LabelLogits:
    """The logits at the N labelled positions of a batch, row by row.

    `logits` is (N, vocabulary) in float32 with gradient; `targets` (N,) the token to be predicted
    there; `rows` (N,) the row of the batch that each position belongs to.
    """

    logits: Tensor
    targets: Tensor
    rows: Tensor

    def nll(self) -> Tensor:
        """Negative log-likelihood of each target, (N,) float32, in nats."""
        return F.cross_entropy(self.logits, self.targets, reduction="none")

    def row_nll(self, num_rows: int) -> Tensor:
        """The sum of `nll` over each row of the batch, (num_rows,) float32, in nats."""
        nll = self.nll()
        return nll.new_zeros(num_rows).index_add(0, self.rows, nll)


class LabelHead:
    """Computes the loss of a language model from the logits at its labels alone.

    Causal models are shifted by one, as in transformers' ForCausalLMLoss; sequence-to-sequence
    models are not. Keep one object per model: the comparison with the full forward runs on the
    first batch it sees (without gradient, without dropout, on two rows unless each row names its
    own adapter).

    Args:
        model: a transformers model with a language-modelling head; it is not changed.
        call: what to call in place of `model` when a wrapper must see the call (DDP, FSDP).

    Raises:
        ModelError: the model has no language-modelling head.
    """

    def __init__(self, model: PreTrainedModel, call: Callable[..., Any] | None = None) -> None:
        self._model = model
        self._call: Callable[..., Any] = model if call is None else call
        self._seq2seq = bool(model.config.is_encoder_decoder)
        self._head = require_head(model)
        self._watch = HeadWatch(self._head)
        self._full = False
        self._checked = False
        # Processes that split the base call it equally often; its head's weight is not here whole.
        self._in_shards = isinstance(model, FSDPModule)
        self._packs = takes_packed(model) and not self._in_shards
        self._plain_head = False

    @property
    def full_forward(self) -> bool:
        """Whether all logits are computed, because the short way does not hold for this model."""
        return self._full

    @property
    def packs(self) -> bool:
        """Whether batches run packed into one row, where they and the model allow it."""
        return self._packs

    def loss(
        self,
        batch: Batch,
        *,
        num_items: Tensor | int | None = None,
        label_smoothing: float = 0.0,
        row_weights: Tensor | None = None,
    ) -> Tensor:
        """Cross-entropy over the labels, a float32 scalar with gradient.

        loss = (1 - eps) * nll + eps * mean over the vocabulary of -log p, averaged over the labels,
        or summed and divided by `num_items` (the labels of all accumulated batches), as
        transformers' Trainer does. A batch without any label has loss 0 instead of nan.

        Args:
            batch: input_ids, labels (-100 where not learned), and what else the model takes, all
                (batch, positions).
            num_items: the divisor in place of the number of labels.
            label_smoothing: eps.
            row_weights: (batch,) float32, what the labels of each row count; None for 1.

        Raises:
            DataError: the batch has no labels entry.
        """
        mask, targets = self._asked(batch)
        head = frozen_parameters(self._head) if self._plain_head and not self._full else None
        groups = self._groups(batch, mask) if head is not None else []
        if len(groups) > 1:
            parts = [{k: v[rows] for k, v in batch.items()} for rows in groups]
            weights = [None if row_weights is None else row_weights[rows] for rows in groups]
            total = sum_of_groups(
                len(parts),
                lambda i: self._total(parts[i], head, label_smoothing, weights[i]),
                [p for p in self._model.parameters() if p.requires_grad],
            )
        else:
            total = self._total(batch, head, label_smoothing, row_weights)
        if num_items is None:
            return total / max(targets.numel(), 1)
        return total / (num_items.to(total.device) if isinstance(num_items, Tensor) else num_items)

    def losses(self, batch: Batch, shares: Sequence[LossShare]) -> list[Tensor]:
        """`loss` of the rows of each share on its own, from one forward pass of the whole batch.

        Args:
            batch: as `loss` takes it.
            shares: which rows, in the order of the batch; together all of them.

        Raises:
            DataError: the batch has no labels entry.
        """
        mask, _ = self._asked(batch)
        head = frozen_parameters(self._head) if self._plain_head and not self._full else None
        found = None if head is None else self._hidden(batch)
        if found is None:
            labels, head = self.logits(batch), None
            found = labels.logits, labels.targets
        counts = iter(mask.sum(1).tolist())
        sizes = [sum(islice(counts, share.num_rows)) for share in shares]
        parts = zip(shares, *(tensor.split(sizes) for tensor in found), strict=True)
        return [share.loss(states, targets, head) for share, states, targets in parts]

    def _total(
        self,
        batch: Batch,
        head: FrozenHead | None,
        label_smoothing: float,
        row_weights: Tensor | None = None,
    ) -> Tensor:
        """The cross-entropy summed over the labels; without logits where `head` is plain."""
        weights = None
        if row_weights is not None:
            mask, _ = self._positions(batch["labels"])
            weights = row_weights.to(mask.device)[mask.nonzero()[:, 0]]
        found = None if head is None else self._hidden(batch)
        if head is not None and found is not None:
            hidden, targets = found
            return chunked_cross_entropy(
                hidden, *head, targets, label_smoothing=label_smoothing, weights=weights
            )
        labels = self.logits(batch)
        each = F.cross_entropy(
            labels.logits,
            labels.targets,
            reduction="sum" if weights is None else "none",
            label_smoothing=label_smoothing,
        )
        return each if weights is None else (each * weights.to(each.device)).sum()

    def _groups(self, batch: Batch, mask: Tensor) -> list[list[int]]:
        """The rows that run in a thread of their own; one group where they cannot or need not."""
        here = torch.is_grad_enabled() and torch.get_num_threads() > 1
        # What drops would draw in the order in which the threads come.
        if not here or self._call is not self._model or drops(self._model):
            return []
        packed = self._packed(batch, mask)
        if packed is None:
            return []
        return row_groups(self._model, batch, shared=packed.packing.shared)

    def logits(self, batch: Batch) -> LabelLogits:
        """The float32 logits at the labelled positions of the batch.

        Raises:
            DataError: the batch has no labels entry.
        """
        mask, targets = self._asked(batch)
        logits = None if self._full else self._selected(batch, mask)
        if logits is None:
            if not self._full:
                self._fall_back("the model moves its positions")
            logits = self._whole(batch, mask)
        targets = targets.to(logits.device)
        rows = mask.nonzero()[:, 0].to(logits.device)
        return LabelLogits(logits.float(), targets, rows)

    def _asked(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Where an output is asked for, and what it should be; the first batch is checked."""
        if "labels" not in batch:
            raise DataError(
                "the batch has no labels", expected="`labels`, -100 where nothing is learned"
            )
        mask, targets = self._positions(batch["labels"])
        if not self._checked and targets.numel():
            self._check(batch, mask)
        return mask, targets

    def _hidden(self, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """What a plain head would read at the labels, and the targets."""
        mask, targets = self._positions(batch["labels"])
        if not targets.numel():
            return None
        selection, _ = self._run(batch, mask, catch=True)
        if selection.num_calls != 1 or selection.hidden is None:
            self._plain_head = False
            return None
        return selection.hidden, targets.to(selection.hidden.device)

    def _positions(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        if not self._seq2seq:
            labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        mask = labels != IGNORED
        return mask, labels[mask]

    def _forward(self, batch: Batch, packed: PackedBatch | None = None) -> Tensor:
        record = find_attachments(self._model)
        if record is not None:
            record.routing.lay_out(None if packed is None else packed.packing.spans)
        if packed is not None:
            return self._call(**packed.inputs, use_cache=False).logits
        inputs: dict[str, Any] = {k: v for k, v in batch.items() if k != "labels"}
        if self._seq2seq and "decoder_input_ids" not in inputs:
            inputs["decoder_input_ids"] = decoder_inputs(self._model, batch["labels"])
        with prompts_before(self._model, batch["labels"]):
            return self._call(**inputs, use_cache=False).logits

    def _run(self, batch: Batch, mask: Tensor, *, catch: bool = False) -> tuple[Selection, Tensor]:
        """One forward pass with the labelled positions alone at the head."""
        packed = self._packed(batch, mask)
        selection = Selection(mask if packed is None else packed.mask, catch)
        with self._watch.lead(selection):
            return selection, self._forward(batch, packed)

    def _packed(self, batch: Batch, mask: Tensor) -> PackedBatch | None:
        pack = self._packs and takes_packed(self._model)
        return pack_batch(self._model, batch, mask) if pack else None

    def _selected(self, batch: Batch, mask: Tensor) -> Tensor | None:
        selection, logits = self._run(batch, mask)
        num_positions = int(mask.sum())
        if selection.num_calls != 1 or not selection.fits:
            return None
        if logits.shape[:-1].numel() != num_positions:
            return None
        if not self._checked:
            self._plain_head = logits is selection.output and not self._in_shards
        return logits.reshape(num_positions, logits.shape[-1])

    def _whole(self, batch: Batch, mask: Tensor) -> Tensor:
        logits = self._forward(batch)
        # Virtual tokens that a method puts in front have logits too, but no labels.
        logits = logits[:, -mask.shape[1] :]
        return logits[mask.to(logits.device)]

    def _check(self, batch: Batch, mask: Tensor) -> None:
        rows = mask.any(dim=1).nonzero()[:_CHECKED_ROWS, 0]
        if isinstance(active_adapter(self._model), tuple):
            if isinstance(self._head, Wrapper):
                self._fall_back("its head has adapters, and each row names its own")
                return
            rows = torch.arange(mask.shape[0])  # the rows' names would not fit a part of them
        part, asked = excerpt(
            batch,
            mask,
            rows=rows,
            vocabulary=self._model.config.get_text_config().vocab_size,
            whole_rows=self._seq2seq,
        )
        with torch.no_grad(), evaluating(self._model):
            whole = self._whole(part, asked)
            short = self._selected(part, asked)
            if self._packs and (short is None or not agree(short, whole)):
                self._packs = False
                self._warn_unpacked(short, whole)
                short = self._selected(part, asked)
        self._checked = True
        if short is None:
            self._fall_back("its head does not see one hidden state per position")
        elif not agree(short, whole):
            self._fall_back(f"its logits differ by up to {difference(short, whole):.2g}")

    def _warn_unpacked(self, short: Tensor | None, whole: Tensor) -> None:
        why = (
            "its head does not see one hidden state per token"
            if short is None
            else f"its logits would differ by up to {difference(short, whole):.2g}"
        )
        warnings.warn(
            f"{type(self._model).__name__} computes every row of a batch padded to the longest, "
            f"which is slower: packed into one row it is not the same model ({why})",
            LorakitWarning,
            stacklevel=5,
        )

    def _fall_back(self, why: str) -> None:
        self._full = True
        self._checked = True
        warnings.warn(
            f"{type(self._model).__name__} computes all its logits, which is slower and takes more "
            f"memory: logits at the labels alone are not the model's own ({why})",
            LorakitWarning,
            stacklevel=4,
        )


def require_head(model: PreTrainedModel) -> nn.Module:
    """The model's language-modelling head; a model on the meta device has one too.

    Raises:
        ModelError: it has none, so it can neither learn answers nor write or score them.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Module):
        name = model.config.name_or_path
        raise ModelError(
            "this model has no language-modelling head: it cannot learn, write or score answers",
            where=f"{name} ({type(model).__name__})" if name else type(model).__name__,
            expected="a causal or sequence-to-sequence language model, such as "
            "smollm2-135m-instruct",
            remedy="take another base; an encoder is trained with task: classify, and then "
            "measured with --adapter",
        )
    return head


def label_nll(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, labels: Tensor
) -> tuple[Tensor, int]:
    """The summed negative log-likelihood of the labels, and how many there are.

    Args:
        model: a transformers language model.
        input_ids: (batch, positions) int64.
        attention_mask: (batch, positions), 1 where there is a token.
        labels: (batch, positions) int64, -100 where nothing is counted.

    Returns:
        A float32 scalar in nats, with gradient, and the number of labels.
    """
    head = LabelHead(model)
    found = head.logits(
        {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    )
    return found.nll().sum(), found.targets.numel()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off inside the block; every module's own mode is put back after it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
