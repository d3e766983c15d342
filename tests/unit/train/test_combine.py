"""What does not go together with several processes is refused with the reason."""

import pytest

import tiny_runs
from lorakit.cli.main import main
from lorakit.errors import ConfigError
from lorakit.processes import Processes
from lorakit.train.combine import require_processes
from lorakit.train.config import TrainConfig
from lorakit.train.sharded import Sharding, sharding_asked

TWO = Processes(rank=0, num=2, num_here=2)


def config(directory, **changes) -> TrainConfig:
    made = tiny_runs.values(directory)
    lora = {**made["lora"], **changes.pop("lora", {})}
    return TrainConfig.from_dict({**made, "lora": lora, **changes})


@pytest.mark.parametrize(
    ("changes", "sharded", "where"),
    [
        ({"task": "kto"}, False, "task"),
        (
            {"lora": {"ranks": "adalora", "r": "auto", "budget": "4k", "dropout": 0.0}},
            False,
            "lora.ranks",
        ),
        ({"lora": {"update": "dora"}}, True, "lora.update"),
        ({"lora": {"init": "pissa"}}, True, "lora.init"),
        ({"lora": {"init": "eva"}}, True, "lora.init"),
        ({"task": "dpo", "preference": {"cache_reference": True}}, True, "cache_reference"),
    ],
)
def test_it_is_refused_with_the_key(tmp_path, changes, sharded, where) -> None:
    made = config(tmp_path, **changes)
    with pytest.raises(ConfigError) as caught:
        require_processes(made, TWO, sharded=sharded)
    assert where in (caught.value.where or "")
    require_processes(made, Processes(), sharded=False)


def test_another_method_is_refused_in_shards(tmp_path) -> None:
    values = {k: v for k, v in tiny_runs.values(tmp_path).items() if k != "lora"}
    made = TrainConfig.from_dict({**values, "method": "bitfit"})
    require_processes(made, TWO, sharded=False)
    with pytest.raises(ConfigError, match="kept whole"):
        require_processes(made, TWO, sharded=True)


def test_what_accelerate_asks_for(monkeypatch) -> None:
    assert sharding_asked(TWO) is None
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="first version"):
        sharding_asked(TWO)
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_RESHARD_AFTER_FORWARD", "false")
    assert sharding_asked(TWO) == Sharding(reshard_after_forward=False, offload=False)
    # transformers and accelerate must not act on it too.
    assert sharding_asked(TWO) is None


def test_one_process_has_nothing_to_split(monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert sharding_asked(Processes()) is None


def test_other_verbs_are_the_work_of_one_process(monkeypatch, capsys) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main(["sweep", "x.yaml"]) == 2
    assert "one process" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    assert main(["sweep", "x.yaml"]) == 2
    assert capsys.readouterr().err == ""


def test_processes_without_a_launcher_are_refused(monkeypatch, capsys) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert main(["train", "x.yaml"]) == 2
    assert "torchrun" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "many")
    assert main(["train", "x.yaml"]) == 2
    assert "'many'" in capsys.readouterr().err
