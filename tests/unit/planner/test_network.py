"""What the network adds to a step, by its formula, and what a process holds of a split base."""

import json
import math

import pytest
import torch

from lorakit.cli.main import main
from lorakit.errors import RequestError
from lorakit.models.quantizable import quantizable
from lorakit.planner.network import estimate_network, shard_bytes
from lorakit.planner.plan import RunRequest, plan_run
from lorakit.planner.shapes import SHAPES


def test_gradients_cross_in_a_ring() -> None:
    # 4 processes: 2 x 3/4 of 1 GB = 1.5 GB = 12 Gbit, at 24 Gbit/s half a second.
    cost = estimate_network(processes=4, bandwidth_gbps=24, learned_bytes=10**9)
    assert cost.gradient_bytes == 1_500_000_000
    assert cost.gradient_s == pytest.approx(0.5)
    assert (cost.base_bytes, cost.base_s, cost.sharded) == (0, 0, False)
    assert cost.fastest_step_s is None
    assert cost.slowest_step_s is None


def test_a_split_base_comes_together_twice_in_every_pass() -> None:
    cost = estimate_network(
        processes=8,
        bandwidth_gbps=100,
        learned_bytes=0,
        base_bytes=16 * 10**9,
        passes=3,
        compute_s=4.0,
    )
    # 3 passes x forward and backward x 7/8 of 16 GB = 84 GB = 672 Gbit.
    assert cost.base_bytes == 84 * 10**9
    assert cost.base_s == pytest.approx(6.72)
    assert cost.fastest_step_s == pytest.approx(6.72)
    assert cost.slowest_step_s == pytest.approx(10.72)
    quicker = estimate_network(
        processes=8, bandwidth_gbps=1000, learned_bytes=0, base_bytes=16 * 10**9, compute_s=4.0
    )
    assert quicker.fastest_step_s == pytest.approx(4.0)


def test_one_process_sends_nothing() -> None:
    cost = estimate_network(
        processes=1, bandwidth_gbps=1, learned_bytes=10**9, base_bytes=10**9, compute_s=2.0
    )
    assert cost.slowest_step_s == 2.0


@pytest.mark.parametrize("name", ["processes", "bandwidth_gbps", "passes"])
def test_numbers_that_cannot_be(name) -> None:
    given = {"processes": 2, "bandwidth_gbps": 1.0, "learned_bytes": 1, name: 0}
    with pytest.raises(RequestError, match=name):
        estimate_network(**given)


def request(**changes) -> RunRequest:
    given = {"model": "smollm2-135m", "batch_size": 2, "length": 16, "device": "cuda"}
    return RunRequest(**{**given, **changes})


def test_a_plan_for_processes_splits_the_base_alone() -> None:
    alone = plan_run(request())
    whole = plan_run(request(processes=4, bandwidth_gbps=10, flops_per_s=1e12))
    split = plan_run(request(processes=4, bandwidth_gbps=10, flops_per_s=1e12, shard=True))
    assert whole.memory == alone.memory
    base = alone.memory.weights_bytes
    assert base / 4 < split.memory.weights_bytes < base
    assert split.memory.weights_bytes == shard_bytes(split.model, split.setup.dtype, 4)
    others = alone.memory.total_bytes - base
    assert split.memory.total_bytes - split.memory.weights_bytes == others
    assert split.gpus[0].used < whole.gpus[0].used
    assert whole.network is not None
    assert split.network is not None
    assert whole.network.gradient_bytes == 2 * 3 * 4 * alone.report.num_trainable // 4
    assert split.network.base_bytes == 2 * 3 * base // 4
    assert whole.network.base_bytes == 0
    assert split.network.compute_s == split.step_s


def test_an_epoch_of_several_processes_is_shorter_by_their_rows_and_longer_by_the_network() -> None:
    plan = plan_run(request(processes=4, bandwidth_gbps=0.5, flops_per_s=1e12, num_examples=800))
    assert plan.network is not None
    assert plan.network.gradient_s > 0
    assert plan.epoch_s == pytest.approx(100 * plan.network.slowest_step_s)


def test_shards_hold_a_share_two_blocks_and_what_is_outside() -> None:
    model = plan_run(request()).model
    shape = SHAPES["smollm2-135m"]
    total = sum(p.numel() for p in model.parameters())
    block = sum(p.numel() for p in model.get_submodule("model.layers.0").parameters())
    outside = total - shape["num_hidden_layers"] * block
    expected = 2 * (total / 8 + 2 * block + outside)
    assert shard_bytes(model, torch.bfloat16, 8) == pytest.approx(expected, rel=1e-6)
    assert shard_bytes(model, torch.bfloat16, 1) == 2 * total


def test_shards_of_a_base_in_4_bits_leave_its_scales_whole() -> None:
    plan = plan_run(request(quantize="nf4", processes=8, shard=True))
    model, whole = plan.model, plan_run(request(quantize="nf4"))
    packed = sum(m.get_parameter("weight").numel() for m in quantizable(model).values())
    dense = sum(p.numel() for p in model.parameters()) - packed
    layers = SHAPES["smollm2-135m"]["num_hidden_layers"]
    block = model.get_submodule("model.layers.0")
    block_packed = packed // layers
    block_dense = sum(p.numel() for p in block.parameters()) - block_packed
    outside = dense - layers * block_dense
    split = (packed / 2 + 2 * dense) / 8 + 2 * (block_packed / 2 + 2 * block_dense) + 2 * outside
    scales = packed * (1 / 64 + 4 / (64 * 256))
    assert plan.memory.weights_bytes == pytest.approx(split + scales, rel=1e-6)
    assert plan.memory.weights_bytes < whole.memory.weights_bytes
    assert plan.gpu_memory.weights_bytes == plan.memory.weights_bytes


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"shard": True}, "shard"),
        ({"bandwidth_gbps": 10.0}, "bandwidth_gbps"),
        ({"processes": 0}, "processes"),
    ],
)
def test_requests_that_mean_nothing(changes, where) -> None:
    with pytest.raises(RequestError) as caught:
        request(**changes)
    assert where in (caught.value.where or "")


def test_the_command_says_memory_and_network(capsys) -> None:
    words = ["plan", "smollm2-135m", "--batch-size", "2", "--length", "16", "--device", "cuda"]
    words += ["--processes", "8", "--shard", "--bandwidth-gbps", "100", "--flops", "1e14"]
    assert main([*words, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["processes"], record["sharded"]) == (8, True)
    network = record["network"]
    assert network["bandwidth_gbps"] == 100
    assert network["slowest_step_s"] > network["fastest_step_s"] > 0
    assert math.isclose(
        network["slowest_step_s"],
        network["compute_s"] + network["base_s"] + network["gradient_s"],
    )
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "8 that split the base" in said
    assert "(calculated)" in said
    assert main([*words[:2], "--shard"]) == 2
