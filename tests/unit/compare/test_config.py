"""What a comparison's config may say, and what it refuses."""

from __future__ import annotations

import pytest

from lorakit.compare.arms import merged
from lorakit.compare.config import CompareConfig
from lorakit.errors import ConfigError, SpecError


def values(**changes):
    return {
        "output": "out",
        "base": {
            "model": "m",
            "data": {"train": "t.jsonl", "validation": "v.jsonl"},
            "train": {"batch_size": 6},
        },
        "methods": [
            {"name": "LoRA r=4", "method": "lora", "lora": {"r": 4}, "lr": [2e-3, 1e-3]},
            {"name": "LoRA r=8", "method": "lora", "lora": {"r": 8, "alpha": 32}},
        ],
        "budget": {"steps": 30},
        "lr_search": {"values": [1e-4, 3e-4, 1e-3]},
        **changes,
    }


def refused(error=ConfigError, **changes) -> ConfigError:
    with pytest.raises(error) as caught:
        CompareConfig.from_dict(values(**changes))
    return caught.value


def arm(**changes):
    return [{"name": "A", "method": "lora", **changes}]


def test_each_method_is_laid_over_the_base_with_its_own_rates():
    first, second = CompareConfig.from_dict(values()).arms
    assert first.rates == (1e-3, 2e-3)
    assert second.rates == (1e-4, 3e-4, 1e-3)
    config = second.train_config(lr=5e-4, seed=7, length={"max_steps": 9}, output="somewhere")
    assert (config.lora.r, config.lora.alpha, config.train.batch_size) == (8, 32, 6)
    assert (config.train.lr, config.seed, config.train.max_steps) == (5e-4, 7, 9)
    assert config.output == "somewhere"


def test_a_config_survives_its_own_yaml(tmp_path):
    config = CompareConfig.from_dict(values(seeds=[3, 5]))
    file = tmp_path / "compare.yaml"
    file.write_text(config.to_yaml())
    assert CompareConfig.from_yaml(file) == config


def test_overrides_reach_the_comparison_and_its_base(tmp_path):
    file = tmp_path / "compare.yaml"
    file.write_text(CompareConfig.from_dict(values()).to_yaml())
    config = CompareConfig.from_yaml(
        file, ["budget.epochs=1.5", "data=elsewhere", "base.model.ref=other", "batch_size=3"]
    )
    assert (config.budget.epochs, config.budget.steps) == (1.5, None)
    assert config.data == "elsewhere"
    made = config.arms[0].train_config(lr=1e-3, seed=0, length={"max_steps": 1})
    assert (made.model.ref, made.train.batch_size) == ("other", 3)


def test_merged_keeps_what_the_method_does_not_name():
    base = {"model": "m", "train": {"a": 1, "b": 2}}
    over = {"model": {"quantize": "nf4"}, "train": {"b": 3}}
    assert merged(base, over) == {
        "model": {"ref": "m", "quantize": "nf4"},
        "train": {"a": 1, "b": 3},
    }
    assert base == {"model": "m", "train": {"a": 1, "b": 2}}


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"budget": {}}, "budget"),
        ({"budget": {"steps": 3, "epochs": 1}}, "budget"),
        ({"budget": {"seconds": 0}}, "budget.seconds"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [1, 1]}, "seeds"),
        ({"lr_search": {"values": [1e-3, 0]}}, "lr_search.values"),
        ({"lr_search": {"values": [1e-3], "share": 0.5, "steps": 5}}, "lr_search"),
        ({"lr_search": {"share": 1.5}}, "lr_search.share"),
        ({"eval": {"metrics": ["bleu"]}}, "eval.data"),
        ({"latency": {"trials": -1}}, "latency.trials"),
        ({"rows": {"train": 0}}, "rows.train"),
        ({"methods": []}, "methods"),
        ({"methods": arm(name=" - ")}, "methods[0].name"),
        ({"methods": [{"name": "A"}]}, "methods[0] (A)"),
        ({"methods": arm(lr=[])}, "methods[0] (A), lr"),
        ({"methods": arm(lr="fast")}, "methods[0] (A), lr"),
        ({"methods": arm(lr=[1e-3, 1e-3])}, "methods[0] (A), lr"),
        ({"methods": [*arm(), {"name": "a", "method": "lora"}]}, "methods[0] (A) and methods[1]"),
        ({"methods": arm(data={"train": "x"})}, "methods[0] (A), data"),
        ({"methods": arm(model="other")}, "methods[0] (A)"),
        ({"methods": arm(train={"lr": 1e-3})}, "methods[0] (A), train.lr"),
        ({"methods": arm(train={"max_steps": 3})}, "methods[0] (A), train.max_steps"),
        ({"methods": arm(train={"batch_size": 4})}, "methods[0] (A), train.batch_size"),
        ({"methods": arm(train={"warmup": 4})}, "methods[0] (A), train"),
        ({"base": {"model": "m", "data": {"train": "t"}, "output": "x"}}, "base, output"),
        ({"base": {"model": "m", "data": {"train": "t"}}}, "base.data"),
        ({"base": {"model": "m", "data": {"train": "t"}, "task": "dpo"}}, "base.task"),
    ],
)
def test_what_does_not_make_a_fair_comparison_is_refused(changes, where):
    assert where in (refused(**changes).where or "")


def test_options_of_a_method_are_its_own_error_and_say_whose():
    found = refused(SpecError, methods=arm(lora={"r": 0}))
    assert "methods[0] (A)" in (found.where or "")


def test_another_batch_size_is_fair_where_the_budget_counts_rows():
    config = CompareConfig.from_dict(
        values(budget={"epochs": 2}, methods=arm(train={"batch_size": 4}))
    )
    assert len(config.arms) == 1


def test_the_same_rows_per_step_are_fair_in_other_batches():
    train = {"batch_size": 3, "gradient_accumulation": 2}
    assert CompareConfig.from_dict(values(methods=arm(train=train))).arms
