from pathlib import Path

import pytest

from lorakit.errors import ConfigError, LorakitWarning, RequestError, SpecError
from lorakit.methods.registry import METHODS, build_method
from lorakit.train.config import TrainConfig
from lorakit.train.schema import changed_keys
from lorakit.train.yaml import read_mapping

MINIMAL = """
model: some-model
data:
  train: rows.jsonl
output: runs/x
"""


@pytest.fixture
def write(tmp_path: Path):
    def write_config(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path

    return write_config


def test_a_minimal_file_takes_the_defaults(write):
    config = TrainConfig.from_yaml(write(MINIMAL))
    assert config.model.ref == "some-model"
    assert config.data.train == "rows.jsonl"
    assert config.lora.r == 8
    assert config.train.length_grouping
    assert config.train.keep_best
    assert config.data.completion_only


def test_values_are_read_in_their_types(write):
    text = (
        MINIMAL
        + """
lora: {r: 4, alpha: 32, targets: [q_proj, v_proj], rank_pattern: {q_proj: 2}}
train: {lr: 1e-4, epochs: 2, adam_betas: [0.9, 0.95], eval_every: epoch, max_grad_norm: null}
seed: 7
"""
    )
    config = TrainConfig.from_yaml(write(text))
    assert config.train.lr == 1e-4
    assert isinstance(config.train.epochs, float)
    assert config.train.adam_betas == (0.9, 0.95)
    assert config.train.max_grad_norm is None
    assert config.lora.targets == ("q_proj", "v_proj")
    assert dict(config.lora.rank_pattern) == {"q_proj": 2}
    assert isinstance(config.lora.alpha, float)


@pytest.mark.parametrize("number", ["1e-4", "1E-4", "+1e-4", "1.e-4", ".1e-3", "0.0001", "1e-04"])
def test_every_way_to_write_a_number_is_a_number(write, number):
    config = TrainConfig.from_yaml(write(MINIMAL), [f"lr={number}"])
    assert config.train.lr == 1e-4


def test_plain_values_round_trip(write, tmp_path):
    config = TrainConfig.from_yaml(
        write(MINIMAL), ["lora.targets=[q_proj, mlp]", "max_steps=12", "columns={prompt: question}"]
    )
    assert TrainConfig.from_dict(config.to_dict()) == config
    again = tmp_path / "again.yaml"
    again.write_text(config.to_yaml())
    assert TrainConfig.from_yaml(again) == config


def test_overrides_win_by_full_name_or_unique_leaf(write):
    config = TrainConfig.from_yaml(
        write(MINIMAL),
        ["train.lr=3e-5", "r=2", "model=other", "model.dtype=bfloat16", "data=b.csv"],
    )
    assert (config.train.lr, config.lora.r) == (3e-5, 2)
    assert (config.model.ref, config.model.dtype) == ("other", "bfloat16")
    assert config.data.train == "b.csv"


def test_an_override_keeps_the_shorthand_of_the_file(write):
    config = TrainConfig.from_yaml(write(MINIMAL), ["dtype=bfloat16"])
    assert (config.model.ref, config.model.dtype) == ("some-model", "bfloat16")


def test_an_override_does_not_change_the_values_it_was_given():
    values = {"model": "m", "data": {"train": "a"}, "output": "o"}
    from_file = TrainConfig.from_dict(values)
    assert from_file.train.lr == 2e-4
    assert values == {"model": "m", "data": {"train": "a"}, "output": "o"}


WRONG = {
    "unknown top key": (["trian.lr=1"], ConfigError, "train.lr"),
    "leaf of a section": (["train.lrr=1"], ConfigError, "train.lr'"),
    "a section": (["lora=8"], ConfigError, "lora.r, "),
    "leaf alone": (["lrr=1"], ConfigError, "train.lr'"),
    "nothing near": (["qqqqqqqq=1"], ConfigError, "lorakit train --fields"),
    "unknown leaf": (["batchsize=1"], ConfigError, "batch_size"),
    "no equals sign": (["lr"], ConfigError, "key=value"),
    "not YAML": (["lr=[1"], ConfigError, "YAML"),
    "text for a number": (["lr=fast"], ConfigError, "a number"),
    "number for a text": (["output=5"], ConfigError, "text"),
    "a flag for a whole number": (["batch_size=true"], ConfigError, "whole number"),
    "a fraction for a whole number": (["batch_size=1.5"], ConfigError, "whole number"),
    "a word for a flag": (["keep_best=maybe"], ConfigError, "true or false"),
    "infinite lr": (["lr=.inf"], ConfigError, "a number"),
    "nan lr": (["lr=.nan"], ConfigError, "a number"),
    "lr zero": (["lr=0"], ConfigError, "lr > 0"),
    "lr negative": (["lr=-1e-4"], ConfigError, "lr > 0"),
    "epochs zero": (["epochs=0"], ConfigError, "> 0"),
    "max_steps zero": (["max_steps=0"], ConfigError, ">= 1"),
    "batch zero": (["batch_size=0"], ConfigError, ">= 1"),
    "accumulation zero": (["gradient_accumulation=0"], ConfigError, ">= 1"),
    "schedule": (["schedule=triangle"], ConfigError, "cosine"),
    "precision": (["precision=fp16"], ConfigError, "bf16"),
    "dtype": (["dtype=float16"], ConfigError, "bfloat16"),
    "warmup ratio one": (["warmup_ratio=1"], ConfigError, "0 to 1"),
    "warmup below zero": (["warmup_steps=-1"], ConfigError, ">= 0"),
    "weight decay below zero": (["weight_decay=-0.1"], ConfigError, ">= 0"),
    "clip at zero": (["max_grad_norm=0"], ConfigError, "> 0"),
    "smoothing one": (["label_smoothing=1"], ConfigError, "share < 1"),
    "beta one": (["adam_betas=[0.9, 1]"], ConfigError, "beta < 1"),
    "three betas": (["adam_betas=[0.9, 0.9, 0.9]"], ConfigError, "2 numbers"),
    "eps zero": (["adam_eps=0"], ConfigError, "> 0"),
    "save every zero": (["save_every=0"], ConfigError, ">= 1"),
    "save every word": (["save_every=day"], ConfigError, "epoch"),
    "keep no checkpoint": (["keep_checkpoints=0"], ConfigError, ">= 1"),
    "patience zero": (["patience=0"], ConfigError, "patience"),
    "share one": (["validation_share=1"], ConfigError, "share < 1"),
    "seed below zero": (["seed=-1"], ConfigError, "seed"),
    "empty output": (["output=''"], ConfigError, "a directory"),
    "unknown task": (["task=dream"], ConfigError, "sft"),
    "unknown method": (["method=prefxi"], ConfigError, "lora"),
    "rank zero": (["r=0"], SpecError, "lora.r"),
    "alpha zero": (["alpha=0"], SpecError, "lora.alpha"),
    "rank text": (["r=big"], ConfigError, "lora.r"),
    "max_length one": (["max_length=1"], ConfigError, "data.max_length"),
    "unknown role": (["columns={promt: q}"], ConfigError, "prompt"),
    "epochs and steps": (["epochs=1", "max_steps=5"], ConfigError, "given twice"),
    "two warmups": (["warmup_steps=1", "warmup_ratio=0.1"], ConfigError, "given twice"),
    "two validations": (["validation=a", "validation_share=0.1"], ConfigError, "given twice"),
    "patience without validation": (
        ["early_stopping_patience=2"],
        ConfigError,
        "needs validation rows",
    ),
    "eval_every without validation": (["eval_every=5"], ConfigError, "needs validation rows"),
    "fp32 on bfloat16": (["precision=fp32", "dtype=bfloat16"], ConfigError, "neither"),
}


@pytest.mark.parametrize(("overrides", "kind", "says"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_value_is_one_clear_error(write, overrides, kind, says):
    with pytest.raises(kind) as caught:
        TrainConfig.from_yaml(write(MINIMAL), overrides)
    assert says in str(caught.value)
    assert caught.value.exit_code == 2
    assert caught.value.where


def test_an_ambiguous_leaf_lists_the_full_names():
    from dataclasses import dataclass

    from lorakit.train.overrides import apply_overrides

    @dataclass(frozen=True)
    class Left:
        size: int = 1

    @dataclass(frozen=True)
    class Both:
        left: Left
        size: int = 3

    assert apply_overrides(Both, {}, ["size=4"]) == {"size": 4}

    @dataclass(frozen=True)
    class Two:
        one: Left
        other: Left

    with pytest.raises(ConfigError, match="fits several keys") as caught:
        apply_overrides(Two, {}, ["size=4"])
    assert "one.size" in str(caught.value)
    assert "other.size" in str(caught.value)


def test_a_train_override_that_could_be_two_things_is_the_data(write):
    # `train` alone is the leaf data.train; the section is only reached by its keys.
    config = TrainConfig.from_yaml(write(MINIMAL), ["train=b.jsonl", "train.lr=1"])
    assert (config.data.train, config.train.lr) == ("b.jsonl", 1.0)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "an empty file"),
        ("- a\n- b\n", "list"),
        ("model: [", "line"),
        ("model: a\nmodel: b\n", "given twice"),
        ("model: m\noutput: o\ndata: 5\n", "must be a mapping"),
        ("model: m\noutput: o\n", "'data' is missing"),
        ("model: {}\noutput: o\ndata: {train: a}\n", "'model.ref' is missing"),
        ("model: m\noutput: o\ndata: {train: a}\ntrain: {lerning_rate: 1}\n", "lerning_rate"),
        ("model: m\noutput: o\ndata: {train: a}\nlora: {rank: 4}\n", "rank"),
        ("model: m\noutput: o\ndata: {train: a}\n5: x\n", "unknown key 5"),
    ],
)
def test_a_wrong_file_is_one_clear_error(write, text, says):
    with pytest.raises(ConfigError) as caught:
        TrainConfig.from_yaml(write(text))
    assert says in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_missing_file_names_the_nearest(write, tmp_path):
    with pytest.raises(ConfigError) as caught:
        TrainConfig.from_yaml(tmp_path / "config.yaml")
    assert caught.value.remedy == f"there is no YAML file in {tmp_path}"
    write(MINIMAL)
    with pytest.raises(ConfigError) as caught:
        TrainConfig.from_yaml(tmp_path / "confg.yml")
    assert caught.value.remedy == f"did you mean {tmp_path / 'config.yaml'}?"
    with pytest.raises(ConfigError) as caught:
        TrainConfig.from_yaml(tmp_path / "qqqqqqqqqq")
    assert caught.value.remedy == "the YAML files there: config.yaml"
    with pytest.raises(ConfigError) as caught:
        TrainConfig.from_yaml(tmp_path / "no" / "config.yaml")
    assert caught.value.remedy == f"there is no directory {tmp_path / 'no'}"


def test_an_override_of_the_length_replaces_the_other_way_to_say_it(write):
    path = write(MINIMAL + "train: {epochs: 3}\n")
    with pytest.warns(LorakitWarning, match=r"train\.max_steps=5 replaces .*train\.epochs: 3"):
        config = TrainConfig.from_yaml(path, ["max_steps=5"])
    assert (config.train.epochs, config.train.max_steps) == (None, 5)
    path = write(MINIMAL + "train: {max_steps: 7, epochs: null}\n")
    with pytest.warns(LorakitWarning, match=r"train\.epochs=2 replaces .*train\.max_steps: 7"):
        config = TrainConfig.from_yaml(path, ["train.epochs=2"])
    assert (config.train.epochs, config.train.max_steps) == (2.0, None)
    # Said twice in one place, nothing wins.
    for text, overrides in (
        ("train: {epochs: 3}\n", ["epochs=2", "max_steps=5"]),
        ("train: {epochs: 3, max_steps: 5}\n", ["max_steps=6"]),
    ):
        with pytest.raises(ConfigError, match="given twice"):
            TrainConfig.from_yaml(write(MINIMAL + text), overrides)


def test_settings_shared_by_a_merge_key_are_read_and_may_be_overridden(write):
    text = (
        "x: {a: &a {lr: 1.0e-4, epochs: 2}, b: &b {<<: *a, epochs: 3}}\n"
        "train:\n  <<: *b\n  lr: 2.0e-4\n"
    )
    path = write(text)
    assert read_mapping(path)["train"] == {"lr": 2e-4, "epochs": 3}
    with pytest.raises(ConfigError, match="given twice"):
        read_mapping(write("a: &a {x: 1}\nb:\n  <<: *a\n  y: 1\n  y: 2\n"))


def test_a_missing_file_and_a_binary_file(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        TrainConfig.from_yaml(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        TrainConfig.from_yaml(tmp_path)
    binary = tmp_path / "b.yaml"
    binary.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ConfigError, match="cannot be read"):
        TrainConfig.from_yaml(binary)


def test_a_misspelt_key_names_the_nearest(write):
    with pytest.raises(RequestError, match="did you mean 'batch_size'"):
        TrainConfig.from_yaml(write(MINIMAL + "train: {batchsize: 4}\n"))


def test_every_field_has_a_help_text_and_a_readable_type():
    fields = TrainConfig.fields()
    assert len(fields) > 40
    assert [f.name for f in fields if not f.help] == []
    by_name = {f.name: f for f in fields}
    assert by_name["train.lr"].type == "a number"
    assert by_name["train.eval_every"].type == "a whole number or epoch"
    assert by_name["model.dtype"].type == "float32, bfloat16 or nothing (null)"
    assert by_name["data.train"].required
    assert "4 bits" in by_name["model.quantize"].help
    assert by_name["lora.r"].default == 8


def test_changed_keys_names_every_difference(write):
    old = TrainConfig.from_yaml(write(MINIMAL))
    new = TrainConfig.from_yaml(write(MINIMAL), ["lr=1e-5", "seed=1", "rank_pattern={q_proj: 2}"])
    assert changed_keys(old.to_dict(), new.to_dict()) == [
        "lora.rank_pattern.q_proj",
        "seed",
        "train.lr",
    ]
    assert changed_keys(old.to_dict(), old.to_dict()) == []


def test_every_method_has_its_section_and_only_the_chosen_one_is_written():
    values = {"model": "m", "data": {"train": "rows.jsonl"}, "output": "out"}
    for method in METHODS:
        config = TrainConfig.from_dict({**values, "method": method})
        assert config.make_method().name == method
        assert set(config.to_dict()) & set(METHODS) == {method}
        assert TrainConfig.from_dict(config.to_dict()) == config
        assert build_method(method, config.options).options() == config.make_method().options()
        [field] = [field for field in TrainConfig.fields() if field.name == "method"]
        assert method in field.type


def test_a_short_name_is_looked_for_in_the_chosen_methods_section_first(write):
    config = TrainConfig.from_yaml(write(MINIMAL), ["method=bitfit", "also_train=[head]"])
    assert (config.bitfit.also_train, config.lora.also_train) == (("head",), ())
    assert TrainConfig.from_yaml(write(MINIMAL), ["also_train=[head]"]).lora.also_train == ("head",)
