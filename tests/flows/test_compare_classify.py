"""A comparison of classifiers: heads, metrics and their intervals, and what is refused."""

from __future__ import annotations

import pytest

import tiny_classifiers
from lorakit.compare.config import CompareConfig
from lorakit.compare.run import compare
from lorakit.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    root = tmp_path_factory.mktemp("compare-classify")
    tiny_classifiers.write_base(root / "bert", "bert")
    for kind in ("pair", "score"):
        for name, count, seed in (("train", 40, 0), ("held", 16, 1), ("dev", 24, 2)):
            rows = tiny_classifiers.rows(count, seed=seed, kind=kind)
            tiny_classifiers.write_rows(root / f"{kind}-{name}.jsonl", rows)
    return root


def run(shared, output, *, kind="pair", **changes):
    values = {
        "output": str(output),
        "data": str(shared),
        "base": {
            "model": str(shared / "bert"),
            "task": "classify",
            "data": {"train": f"{kind}-train.jsonl", "validation": f"{kind}-held.jsonl"},
            "train": {"batch_size": 8, "precision": "fp32"},
        },
        "methods": [
            {"name": "LoRA", "method": "lora", "lora": {"r": 4, "alpha": 12}, "lr": [1e-2, 3e-2]},
            {"name": "BitFit", "method": "bitfit", "lr": 1e-2},
        ],
        "seeds": [0],
        "budget": {"steps": 8},
        "lr_search": {"share": 0.5},
        "eval": {"data": f"{kind}-dev.jsonl", "metrics": [], "batch_size": 5},
        "latency": {"trials": 2, "length": 64},
        **changes,
    }
    return compare(CompareConfig.from_dict(values), say=lambda line: None).document


def test_classifiers_are_scored_by_their_task_with_intervals(shared, tmp_path):
    metrics = ["matthews", "accuracy", "f1", "loss"]
    options = {"data": "pair-held.jsonl", "metrics": metrics, "batch_size": 5}
    found = run(shared, tmp_path / "out", eval=options)
    assert found["complete"]
    assert found["metric"] == {"name": "matthews", "higher_is_better": True}
    finals = [cell for cell in found["cells"] if cell["kind"] == "final"]
    assert [cell["arm"] for cell in finals] == ["LoRA", "BitFit"]
    for cell in finals:
        assert list(cell["scores"]) == metrics
        # The same rows as in the run's own validation, read back with the head: the same numbers.
        for name in metrics:
            value = cell["scores"][name]["value"]
            assert value == pytest.approx(cell["final"][f"eval_{name}"], rel=1e-4)
            assert cell["scores"][name]["n"] == 16
        low, high = cell["scores"]["accuracy"]["interval"]
        assert 0 < low < cell["scores"]["accuracy"]["value"] <= high <= 1
        assert cell["scores"]["loss"]["interval"] is None
        assert cell["latency"]["length"] == 48
        assert cell["latency"]["unmerged"]["ratio"] > 0
        assert cell["latency"]["merged"]["ratio"] > 0
    lora = found["methods"][0]
    searched = {r["lr"]: (r["value"], -r["eval_loss"]) for r in lora["lr"]["searched"]}
    assert lora["lr"]["chosen"] == max(searched, key=searched.__getitem__)
    assert {rate["by"] for rate in lora["lr"]["searched"]} == {"validation accuracy"}


@pytest.mark.slow
def test_numbers_are_scored_by_pearson_and_the_limit_holds(shared, tmp_path):
    options = {"data": "score-dev.jsonl", "limit": 10}
    found = run(shared, tmp_path / "out", kind="score", eval=options)
    for method in found["methods"]:
        assert list(method["scores"]) == ["pearson"]
    final = next(cell for cell in found["cells"] if cell["kind"] == "final")
    assert final["scores"]["pearson"]["n"] == 10
    low, high = final["scores"]["pearson"]["interval"]
    assert -1 <= low < final["scores"]["pearson"]["value"] < high <= 1


def test_what_cannot_be_scored_is_refused_before_the_first_run(shared, tmp_path):
    with pytest.raises(ConfigError, match="pearson is not defined for these labels"):
        run(shared, tmp_path / "a", eval={"data": "pair-dev.jsonl", "metrics": ["pearson"]})
    with pytest.raises(ConfigError, match="unknown metric 'mathews'") as caught:
        run(shared, tmp_path / "b", eval={"data": "pair-dev.jsonl", "metrics": ["mathews"]})
    assert "'matthews'" in (caught.value.remedy or "")
    hidden = tiny_classifiers.rows(6, seed=3, kind="pair")
    hidden[4]["label"] = -1
    tiny_classifiers.write_rows(tmp_path / "hidden.jsonl", hidden)
    with pytest.raises(DataError, match="none of the classes"):
        run(shared, tmp_path / "c", eval={"data": str(tmp_path / "hidden.jsonl")})
    assert not list(tmp_path.rglob("cell.json"))
