"""DeepSpeed's settings are read, held to the run's, and carried out with FSDP2."""

import json
import os

import pytest

import tiny_runs
from lorakit.errors import ConfigError
from lorakit.processes import Processes
from lorakit.train.config import TrainConfig
from lorakit.train.deepspeed import deepspeed_asked
from lorakit.train.sharded import Sharding

TWO = Processes(rank=0, num=2, num_here=2)
AUTO = "auto"
# What transformers' documentation and LLaMA-Factory's examples give for ZeRO-3.
USUAL = {
    "train_batch_size": AUTO,
    "train_micro_batch_size_per_gpu": AUTO,
    "gradient_accumulation_steps": AUTO,
    "gradient_clipping": AUTO,
    "zero_allow_untested_optimizer": True,
    "fp16": {"enabled": AUTO, "loss_scale": 0, "initial_scale_power": 16},
    "bf16": {"enabled": AUTO},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": AUTO, "betas": AUTO, "eps": AUTO, "weight_decay": AUTO},
    },
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": AUTO,
        "stage3_prefetch_bucket_size": AUTO,
        "stage3_param_persistence_threshold": AUTO,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """What settings come to for a run; each call sets the environment anew."""

    def ask(settings, processes=TWO, **train):
        file = tmp_path / "deepspeed.json"
        file.write_text(settings if isinstance(settings, str) else json.dumps(settings))
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
        made = tiny_runs.values(tmp_path)
        made["train"] = {**made["train"], **train}
        return deepspeed_asked(TrainConfig.from_dict(made), processes)

    return ask


def test_nothing_is_asked_without_it(tmp_path) -> None:
    assert deepspeed_asked(TrainConfig.from_dict(tiny_runs.values(tmp_path)), TWO) is None


def test_zero_3_splits_the_base_and_keeps_others_from_acting_on_it(asked) -> None:
    found = asked(USUAL)
    assert found.sharding == Sharding(reshard_after_forward=True, offload=False)
    assert found.notes == (
        "DeepSpeed's ZeRO-3: the frozen base is split with torch's FSDP2 instead",
    )
    assert "ACCELERATE_USE_DEEPSPEED" not in os.environ


def test_the_shards_may_wait_in_the_hosts_memory(asked) -> None:
    zero = {"stage": 3, "offload_param": {"device": "cpu", "pin_memory": True}}
    assert asked({"zero_optimization": zero}).sharding == Sharding(offload=True)
    zero = {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/local"}}
    with pytest.raises(ConfigError, match=r"zero_optimization\.offload_param\.device"):
        asked({"zero_optimization": zero})


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_lower_stages_keep_the_base_whole(asked, stage) -> None:
    found = asked({"zero_optimization": {"stage": stage}, "curriculum_learning": {}})
    assert found.sharding is None
    assert f"ZeRO-{stage}" in found.notes[0]
    assert found.notes[1].endswith("not used: curriculum_learning")


def test_one_process_has_nothing_to_split(asked) -> None:
    found = asked(USUAL, processes=Processes())
    assert found.sharding is None
    assert "one process" in found.notes[0]


@pytest.mark.parametrize(
    ("changes", "train", "where"),
    [
        ({"train_micro_batch_size_per_gpu": 16}, {"batch_size": 4}, "train.batch_size"),
        (
            {"gradient_accumulation_steps": 8},
            {"gradient_accumulation": 2},
            "train.gradient_accumulation",
        ),
        ({"train_batch_size": 32}, {"batch_size": 4, "gradient_accumulation": 2}, "processes"),
        ({"gradient_clipping": 0.5}, {}, "train.max_grad_norm"),
        ({"gradient_clipping": 1.0}, {"max_grad_norm": None}, "train.max_grad_norm"),
        ({"fp16": {"enabled": True}}, {}, "fp16.enabled"),
        ({"bf16": {"enabled": True}}, {"precision": "fp32"}, "train.precision"),
        ({"optimizer": {"type": "Lamb"}}, {}, "train.optimizer"),
        ({"optimizer": {"params": {"lr": 1e-5}}}, {"lr": 2e-4}, "train.lr"),
        ({"optimizer": {"params": {"betas": [0.8, 0.999]}}}, {}, "train.adam_betas"),
        ({"scheduler": {"type": "WarmupLR"}}, {"schedule": "linear"}, "train.schedule"),
        (
            {"scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 10}}},
            {"schedule": "linear", "warmup_steps": 20},
            "warmup_num_steps",
        ),
        ({"zero_optimization": {"stage": 4}}, {}, "stage"),
        ({"zero_optimization": 3}, {}, "zero_optimization"),
    ],
)
def test_what_the_run_does_otherwise_is_refused(asked, changes, train, where) -> None:
    with pytest.raises(ConfigError) as caught:
        asked({**USUAL, **changes}, **train)
    assert where in (caught.value.where or "")


def test_equal_numbers_pass(asked) -> None:
    settings = {
        **USUAL,
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "optimizer": {"type": "Adam", "params": {"lr": 2e-4, "betas": [0.9, 0.999], "eps": 1e-8}},
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {"warmup_num_steps": 20, "warmup_min_lr": 0, "total_num_steps": AUTO},
        },
    }
    train = {"batch_size": 4, "gradient_accumulation": 2, "lr": 2e-4, "precision": "bf16"}
    train |= {"schedule": "linear", "warmup_steps": 20}
    assert asked(settings, **train).sharding == Sharding()


@pytest.mark.parametrize("text", ["{", "[3]", "3"])
def test_a_file_that_is_not_settings_is_refused(asked, text) -> None:
    with pytest.raises(ConfigError, match=r"deepspeed\.json"):
        asked(text)


def test_settings_without_a_file_come_from_accelerate(tmp_path, monkeypatch) -> None:
    config = TrainConfig.from_dict(tiny_runs.values(tmp_path))
    said = {
        "USE_DEEPSPEED": "true",
        "DEEPSPEED_ZERO_STAGE": "3",
        "DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu",
        "GRADIENT_ACCUMULATION_STEPS": str(config.train.gradient_accumulation),
        "GRADIENT_CLIPPING": "1.0",
    }
    for name, value in said.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    found = deepspeed_asked(config, TWO)
    assert found is not None
    assert found.sharding == Sharding(offload=True)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "7")
    with pytest.raises(ConfigError, match="gradient_accumulation"):
        deepspeed_asked(config, TWO)
