import pytest
import torch

from lorakit.data.collate import Collator
from lorakit.data.encode import Example

EXAMPLES = [Example([5, 6, 2], [-100, 6, 2]), Example([7, 8, 9, 4, 2], [-100, -100, 9, 4, 2])]


def test_pads_on_the_right_to_the_longest():
    batch = Collator(pad_token_id=3)(EXAMPLES)
    assert batch["input_ids"].tolist() == [[5, 6, 2, 3, 3], [7, 8, 9, 4, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 6, 2, -100, -100], [-100, -100, 9, 4, 2]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_eos_stays_learned_when_it_is_also_the_pad_token():
    batch = Collator(pad_token_id=2)(EXAMPLES)
    assert batch["labels"][0].tolist() == [-100, 6, 2, -100, -100]
    assert batch["attention_mask"][0].tolist() == [1, 1, 1, 0, 0]


def test_pads_to_a_multiple():
    batch = Collator(pad_to_multiple_of=4)(EXAMPLES)
    assert {tuple(tensor.shape) for tensor in batch.values()} == {(2, 8)}
    assert batch["attention_mask"].sum(dim=1).tolist() == [3, 5]
    assert Collator(pad_to_multiple_of=5)(EXAMPLES)["labels"].shape == (2, 5)
    with pytest.raises(ValueError, match="at least 1"):
        Collator(pad_to_multiple_of=0)
