"""Merge an adapter into a checkpoint on disk, shard by shard, and prove the result."""
