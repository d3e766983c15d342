import random

import pytest
import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

from lorakit.data.sampling import LengthGroupedSampler, padding_share

LENGTHS = random.Random(0).choices(range(5, 300), k=1003)


def sampler(**options):
    return LengthGroupedSampler(LENGTHS, 8, **({"seed": 7} | options))


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("epoch", [0, 3])
def test_every_row_once(grouped, epoch):
    batches = sampler(grouped=grouped).batches(epoch)
    assert sorted(i for batch in batches for i in batch) == list(range(len(LENGTHS)))
    assert {len(batch) for batch in batches[:-1]} == {8}
    assert len(batches[-1]) == 3


def test_grouping_removes_padding():
    grouped = padding_share(LENGTHS, sampler().batches(1))
    shuffled = padding_share(LENGTHS, sampler(grouped=False).batches(1))
    assert shuffled > 0.3
    assert grouped < 0.05


def test_padding_share_counts_positions():
    assert padding_share([1, 3, 4], [[0, 1], [2]]) == pytest.approx(2 / 10)


def test_the_longest_batch_comes_first_in_the_first_epoch_only():
    first = sampler().batches(0)[0]
    assert max(LENGTHS) in [LENGTHS[i] for i in first]
    starts = [max(LENGTHS[i] for i in sampler().batches(epoch)[0]) for epoch in range(1, 9)]
    assert len(set(starts)) > 1


def test_the_longest_row_is_first_even_when_it_would_be_left_over():
    for seed in range(20):
        lengths = [1] * 8 + [9]
        order = LengthGroupedSampler(lengths, 4, seed=seed).order(0).tolist()
        assert order[0] == 8


def test_the_order_depends_on_seed_and_epoch_alone():
    one = sampler()
    orders = {}
    for epoch in (2, 0, 1):
        one.set_epoch(epoch)
        orders[epoch] = list(one)
    torch.manual_seed(99)
    assert orders[1] == sampler().order(1).tolist()
    assert orders[0] != orders[1] != orders[2]
    assert orders[1] != sampler(seed=8).order(1).tolist()


def test_it_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    sampler().batches(0)
    assert torch.equal(before, torch.get_rng_state())


def test_batches_of_one_step_are_similar_across_processes():
    batches = sampler(num_processes=4).batches(1)
    spreads = []
    for step in range(len(batches) // 4 - 1):
        longest = [max(LENGTHS[i] for i in batch) for batch in batches[4 * step : 4 * step + 4]]
        spreads.append(max(longest) - min(longest))
    assert sum(spreads) / len(spreads) < 20


@pytest.mark.parametrize("num_rows", [1, 3, 8, 9])
def test_data_sets_smaller_than_a_few_batches(num_rows):
    lengths = LENGTHS[:num_rows]
    order = LengthGroupedSampler(lengths, 4, seed=1, num_processes=2).order(0)
    assert sorted(order.tolist()) == list(range(num_rows))


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        LengthGroupedSampler(LENGTHS, 0, seed=1)


def loader(num_processes=1, process_index=0):
    Accelerator(cpu=True)
    raw = DataLoader(
        list(range(len(LENGTHS))), batch_size=8, sampler=sampler(num_processes=num_processes)
    )
    return prepare_data_loader(
        raw, num_processes=num_processes, process_index=process_index, put_on_device=False
    )


def test_accelerate_sets_the_epoch_and_a_resumed_epoch_goes_on():
    prepared = loader()
    prepared.set_epoch(2)
    whole = [batch.tolist() for batch in prepared]
    assert whole == sampler().batches(2)
    resumed = skip_first_batches(loader(), 40)
    resumed.set_epoch(2)
    assert [batch.tolist() for batch in resumed] == whole[40:]


def test_two_processes_share_the_steps():
    shares = []
    for rank in (0, 1):
        prepared = loader(2, rank)
        prepared.set_epoch(1)
        shares.append([batch.tolist() for batch in prepared])
    batches = sampler(num_processes=2).batches(1)
    assert shares[0][:60] == batches[:120:2]
    assert shares[1][:60] == batches[1:120:2]
