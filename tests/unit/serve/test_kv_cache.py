from __future__ import annotations

import pytest
import torch

from lorakit.serve.kv_cache import PromptCache, RowCache, bucket_size, window_mask


def prompt(length: int, seed: int) -> tuple[PromptCache, torch.Tensor]:
    """A read prompt of two layers with 2 heads, keys of 3 and values of 5 numbers."""
    generator = torch.Generator().manual_seed(seed)
    cache = PromptCache(bucket_size(length))
    keys = torch.randn(2, length, 3, generator=generator)
    for layer in (0, 1):
        cache.append(layer, keys + layer, keys.new_ones(2, length, 5) * seed)
    cache.length = length
    return cache, keys


def test_buckets_are_powers_of_two() -> None:
    assert [bucket_size(n) for n in (1, 64, 65, 128, 129, 1000)] == [64, 64, 128, 128, 256, 1024]


def test_pieces_of_a_prompt_follow_each_other() -> None:
    cache = PromptCache(64)
    keys, values = torch.randn(2, 9, 3), torch.randn(2, 9, 5)
    first, _ = cache.append(0, keys[:, :4], values[:, :4])
    assert first.equal(keys[:, :4])
    cache.length = 4
    whole, whole_values = cache.append(0, keys[:, 4:], values[:, 4:])
    assert whole.equal(keys)
    assert whole_values.equal(values)


def held(cache: RowCache, row: str) -> torch.Tensor:
    bucket = next(b for b in cache.buckets.values() if row in b.rows)
    place = bucket.rows.index(row)
    return bucket.keys[1][place, :, : bucket.lengths[place]]


def test_rows_keep_their_keys_while_others_come_and_go() -> None:
    cache = RowCache()
    expected: dict[str, torch.Tensor] = {}
    for i, length in enumerate([5, 70, 9, 63, 20]):
        given, keys = prompt(length, seed=i)
        cache.insert(f"r{i}", given)
        expected[f"r{i}"] = keys + 1
    assert sorted(cache.buckets) == [64, 128]
    for gone in ("r0", "r4", "r1"):
        cache.remove(gone)
        del expected[gone]
        assert {r: cache.length(r) for r in expected} == {
            r: keys.shape[1] for r, keys in expected.items()
        }
        for row, keys in expected.items():
            assert held(cache, row).equal(keys)
    assert sorted(cache.buckets) == [64], "an empty bucket gives its memory back"
    assert "r0" not in cache


def test_a_row_that_outgrows_its_bucket_moves() -> None:
    cache = RowCache()
    keys = {}
    for i, length in enumerate([63, 10, 63]):
        given, keys[f"r{i}"] = prompt(length, seed=i)
        cache.insert(f"r{i}", given)
    cache.make_room()
    assert sorted(cache.buckets) == [64]
    cache.advance(["r0", "r2"])
    cache.make_room()
    assert cache.buckets[64].rows == ["r1"]
    assert sorted(cache.buckets[128].rows) == ["r0", "r2"]
    for row in ("r0", "r2"):
        assert held(cache, row)[:, :63].equal(keys[row] + 1)
    assert cache.num_tokens() == 64 + 64 + 10


@pytest.mark.parametrize("window", [None, 3])
def test_a_query_sees_its_own_past(window: int | None) -> None:
    mask = window_mask(torch.tensor([4, 1]), 6, window, torch.float32)
    for query, row in zip((4, 1), mask, strict=True):
        seen = [j for j in range(6) if row[j] == 0]
        first = 0 if window is None else max(0, query - window + 1)
        assert seen == list(range(first, query + 1))
    assert set(mask.unique().tolist()) == {float("-inf"), 0.0}
