"""Examples to a batch of tensors, padded on the right."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorakit.data.classification import ClassifyExample
from lorakit.data.encode import IGNORED, Example
from lorakit.data.preference import Judged


class Collator:
    """Pads a batch to its longest example.

    Padding is told apart by the attention mask and the labels alone, never by its token id, so a
    tokenizer whose pad token is its EOS still learns EOS.

    Args:
        pad_token_id: the id to fill with; any valid id will do.
        pad_to_multiple_of: round the length up to this multiple (8 suits tensor cores).
    """

    def __init__(self, pad_token_id: int = 0, pad_to_multiple_of: int = 1) -> None:
        if pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of must be at least 1, not {pad_to_multiple_of}")
        self.pad_token_id = pad_token_id
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """The batch.

        Returns:
            input_ids, attention_mask and labels, each int64 (batch, length); attention_mask is 0
            and labels are -100 on padding.
        """
        longest = max(map(len, examples))
        length = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        shape = (len(examples), length)
        input_ids = torch.full(shape, self.pad_token_id, dtype=torch.long)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, IGNORED, dtype=torch.long)
        for i, example in enumerate(examples):
            n = len(example)
            input_ids[i, :n] = torch.tensor(example.input_ids, dtype=torch.long)
            attention_mask[i, :n] = 1
            labels[i, :n] = torch.tensor(example.labels, dtype=torch.long)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


class PreferenceCollator:
    """Pads the answers of a batch, each behind its prompt, to the longest on the right.

    Args:
        pad_token_id: the id to fill with; any valid id will do.
        mismatched: also pair every prompt with the next example's answer, as KTO's estimate of
            the distance from the reference asks for.
    """

    def __init__(self, pad_token_id: int, *, mismatched: bool) -> None:
        self._collator = Collator(pad_token_id)
        self.mismatched = mismatched

    def __call__(self, examples: Sequence[Judged]) -> dict[str, Tensor]:
        """The batch.

        Returns:
            input_ids, attention_mask and labels, each int64 (answers, length), and desirable, bool
            (answers,). Of pairs all chosen answers come first, then the rejected ones in the same
            order. With `mismatched`, as many rows again for the mismatched answers. Where it is
            known of all answers, reference, float32 (answers,).
        """
        num_each = len(examples[0].answers)
        answers = [example.answers[i] for i in range(num_each) for example in examples]
        rows = [answer.example for answer in answers]
        if self.mismatched:
            rows += [_crossed(one, two) for one, two in zip(rows, rows[1:] + rows[:1], strict=True)]
        batch = self._collator(rows)
        batch["desirable"] = torch.tensor([answer.desirable for answer in answers])
        known = [answer.reference for answer in answers if answer.reference is not None]
        if len(known) == len(rows):
            batch["reference"] = torch.tensor(known)
        return batch


def _crossed(prompt_of: Example, answer_of: Example) -> Example:
    """The prompt of one example with the answer of another."""
    start = _answer_start(prompt_of)
    other = _answer_start(answer_of)
    ids = prompt_of.input_ids[:start] + answer_of.input_ids[other:]
    labels = [IGNORED] * start + answer_of.labels[other:]
    return Example(ids, labels, prompt_of.row)


def _answer_start(example: Example) -> int:
    return next(i for i, label in enumerate(example.labels) if label != IGNORED)


class ClassifyCollator:
    """Pads a batch of classification examples to its longest on the right.

    Args:
        pad_token_id: the id to fill with; decoders look for the last token that is another one, so
            it must be the model's own.
        regression: whether labels are numbers.
    """

    def __init__(self, pad_token_id: int, *, regression: bool) -> None:
        self.pad_token_id = pad_token_id
        self.regression = regression

    def __call__(self, examples: Sequence[ClassifyExample]) -> dict[str, Tensor]:
        """The batch.

        Returns:
            input_ids, attention_mask and, where the model takes them, token_type_ids, each int64
            (batch, length); labels (batch,), int64 class ids or float32 numbers.
        """
        shape = (len(examples), max(map(len, examples)))
        input_ids = torch.full(shape, self.pad_token_id, dtype=torch.long)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        token_type_ids = torch.zeros(shape, dtype=torch.long)
        for i, example in enumerate(examples):
            n = len(example)
            input_ids[i, :n] = torch.tensor(example.input_ids)
            attention_mask[i, :n] = 1
            if example.token_type_ids is not None:
                token_type_ids[i, :n] = torch.tensor(example.token_type_ids)
        dtype = torch.float32 if self.regression else torch.long
        batch = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": torch.tensor([example.label for example in examples], dtype=dtype),
        }
        if examples[0].token_type_ids is not None:
            batch["token_type_ids"] = token_type_ids
        return batch
