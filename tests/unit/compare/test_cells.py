"""Which cells there are, in which order, and how the numbers of a method are made of them."""

from __future__ import annotations

import json
import math
import statistics
import time
from pathlib import Path

import pytest

from lorakit.compare.cells import chosen_rates, plan_cells, read_record
from lorakit.compare.config import CompareConfig
from lorakit.compare.estimate import forecast
from lorakit.compare.files import DataFiles, find_data
from lorakit.compare.intervals import over_seeds, t_quantile
from lorakit.compare.latency import compare_times
from lorakit.errors import ConfigError, DataError

DATA = DataFiles(
    train="t.jsonl",
    validation="v.jsonl",
    evaluation=None,
    evaluation_split=None,
    sha256={"train": "aa", "validation": "bb"},
    num_rows={"train": 9, "validation": 3},
)


def config(**changes) -> CompareConfig:
    return CompareConfig.from_dict(
        {
            "output": "out",
            "base": {"model": "m", "data": {"train": "t.jsonl", "validation": "v.jsonl"}},
            "methods": [
                {"name": "A", "method": "lora", "lr": [1e-3, 1e-2]},
                {"name": "B", "method": "lora", "lora": {"r": 2}, "lr": 5e-4},
            ],
            "seeds": [4, 6],
            "budget": {"steps": 30},
            **changes,
        }
    )


def names(cells):
    return [cell.name for cell in cells]


def finished(lr: float, eval_loss: float | None, **more):
    final = {"eval_loss": eval_loss}
    return {"lr": lr, "final": final, "by": "loss", "failed": None, "seconds": 2.0, **more}


def classified(lr: float, matthews: float, eval_loss: float):
    final = {"eval_matthews": matthews, "eval_loss": eval_loss}
    return finished(lr, eval_loss, by="matthews", final=final)


def test_searches_come_first_and_seeds_go_round_the_methods():
    cells = plan_cells(config(), DATA, {})
    assert names(cells) == [
        "a/lr-0.001",
        "a/lr-0.01",
        "a/lr-unknown-seed-4",
        "b/lr-0.0005-seed-4",
        "a/lr-unknown-seed-6",
        "b/lr-0.0005-seed-6",
    ]
    steps = [None if c.config is None else c.config.train.max_steps for c in cells]
    assert steps == [10, 10, None, 30, None, 30]
    assert [c.name for c in cells if "latency" in c.measures] == [
        "a/lr-unknown-seed-4",
        "b/lr-0.0005-seed-4",
    ]


def test_the_winner_of_the_search_runs_all_seeds():
    records = {"a/lr-0.001": finished(1e-3, 2.0), "a/lr-0.01": finished(1e-2, 1.5)}
    found = plan_cells(config(), DATA, records)
    assert names(found)[2:] == [
        "a/lr-0.01-seed-4",
        "b/lr-0.0005-seed-4",
        "a/lr-unknown-seed-6",
        "b/lr-0.0005-seed-6",
    ]
    assert chosen_rates(config(), DATA, records) == {"B": 5e-4}
    records["a/lr-0.01-seed-4"] = finished(1e-2, 1.5)
    assert "a/lr-0.01-seed-6" in names(plan_cells(config(), DATA, records))
    assert chosen_rates(config(), DATA, records) == {"A": 1e-2, "B": 5e-4}


@pytest.mark.parametrize("loss", [1.6, None, math.inf])
def test_a_rate_that_does_not_hold_over_the_whole_length_gives_way_to_the_next(loss):
    records = {"a/lr-0.001": finished(1e-3, 2.0), "a/lr-0.01": finished(1e-2, 1.5)}
    records["a/lr-0.01-seed-4"] = finished(1e-2, loss)
    found = names(plan_cells(config(), DATA, records))
    assert found[2:5] == ["a/lr-0.01-seed-4", "a/lr-0.001-seed-4", "b/lr-0.0005-seed-4"]
    assert "a/lr-unknown-seed-6" in found
    better = {**records, "a/lr-0.001-seed-4": finished(1e-3, 1.4)}
    assert "a/lr-0.001-seed-6" in names(plan_cells(config(), DATA, better))
    # Where none holds, the lowest loss of the whole runs counts; where none has one, the search's.
    worse = {**records, "a/lr-0.001-seed-4": finished(1e-3, 2.1)}
    expected = 1e-2 if loss == 1.6 else 1e-3
    assert chosen_rates(config(), DATA, worse)["A"] == expected
    none = {**records, "a/lr-0.01-seed-4": finished(1e-2, None)}
    none["a/lr-0.001-seed-4"] = finished(1e-3, None)
    assert chosen_rates(config(), DATA, none)["A"] == 1e-2


def test_the_metric_that_chooses_checkpoints_chooses_the_rate_too():
    records = {"a/lr-0.001": classified(1e-3, 0.1, 0.5), "a/lr-0.01": classified(1e-2, 0.3, 0.7)}
    assert "a/lr-0.01-seed-4" in names(plan_cells(config(), DATA, records))
    # Longer training raises the loss of a classifier that is right more often: the rate holds.
    records["a/lr-0.01-seed-4"] = classified(1e-2, 0.4, 1.1)
    assert chosen_rates(config(), DATA, records)["A"] == 1e-2
    # Worse in both: it does not.
    records["a/lr-0.01-seed-4"] = classified(1e-2, 0.2, 1.1)
    assert "a/lr-0.001-seed-4" in names(plan_cells(config(), DATA, records))
    records["a/lr-0.001-seed-4"] = classified(1e-3, 0.25, 1.3)
    assert chosen_rates(config(), DATA, records)["A"] == 1e-3


def test_equal_metrics_are_told_apart_by_the_loss():
    records = {"a/lr-0.001": classified(1e-3, 0.3, 0.5), "a/lr-0.01": classified(1e-2, 0.3, 0.7)}
    assert "a/lr-0.001-seed-4" in names(plan_cells(config(), DATA, records))


def test_a_rate_that_failed_or_overflowed_never_wins():
    failed, overflowed = finished(1e-3, None), finished(1e-2, math.inf)
    records = {"a/lr-0.001": failed, "a/lr-0.01": finished(1e-2, 9.0)}
    assert "a/lr-0.01-seed-4" in names(plan_cells(config(), DATA, records))
    records = {"a/lr-0.001": failed, "a/lr-0.01": overflowed}
    assert names(plan_cells(config(), DATA, records))[2:] == [
        "b/lr-0.0005-seed-4",
        "b/lr-0.0005-seed-6",
    ]


def test_a_budget_in_seconds_becomes_steps_through_a_probe():
    timed = config(budget={"seconds": 60, "probe_steps": 5}, lr_search={"share": 0.25})
    cells = plan_cells(timed, DATA, {})
    assert names(cells)[:3] == ["a/probe", "a/lr-0.001", "a/lr-0.01"]
    assert [c.config is None for c in cells[:3]] == [False, True, True]
    records = {"a/probe": finished(1e-3, None, seconds_per_step=0.5)}
    search = plan_cells(timed, DATA, records)[1]
    assert search.config is not None
    assert search.config.train.max_steps == 30


def test_a_finished_cell_is_known_by_content_not_by_place(tmp_path):
    cell = plan_cells(config(), DATA, {})[0]
    record = {"sha256": cell.sha256, "identity": cell.identity(), "seconds": 1.0}
    (tmp_path / "cell.json").write_text(json.dumps(record))
    assert read_record(tmp_path / "nowhere", cell) is None
    assert read_record(tmp_path, cell) == record
    moved = plan_cells(config(output="elsewhere"), DATA, {})[0]
    assert read_record(tmp_path, moved) == record
    changed = plan_cells(config(lr_search={"share": 0.5}), DATA, {})[0]
    with pytest.raises(ConfigError, match="another config") as caught:
        read_record(tmp_path, changed)
    assert caught.value.found == "changed: train.train.max_steps"
    assert str(tmp_path) in (caught.value.remedy or "")


def test_changed_rows_are_noticed(tmp_path):
    cell = plan_cells(config(), DATA, {})[0]
    record = {"sha256": cell.sha256, "identity": cell.identity()}
    (tmp_path / "cell.json").write_text(json.dumps(record))
    other = DataFiles(**{**vars_of(DATA), "sha256": {"train": "cc", "validation": "bb"}})
    with pytest.raises(ConfigError) as caught:
        read_record(tmp_path, plan_cells(config(), other, {})[0])
    assert caught.value.found == "changed: data.train"


def vars_of(data: DataFiles):
    return {name: getattr(data, name) for name in DataFiles.__dataclass_fields__}


def test_a_damaged_record_names_the_file(tmp_path):
    (tmp_path / "cell.json").write_text("{")
    with pytest.raises(ConfigError, match="damaged"):
        read_record(tmp_path, plan_cells(config(), DATA, {})[0])


def test_the_forecast_takes_the_same_method_before_the_same_kind():
    records = {"a/lr-0.001": finished(1e-3, 1.0), "b/lr-0.0005-seed-4": finished(5e-4, 1.0)}
    records["b/lr-0.0005-seed-4"]["seconds"] = 7.0
    found = forecast(plan_cells(config(), DATA, records), records)
    assert found.num_finished == 2
    assert {cell.name: cell.estimate_s for cell in found.cells} == {
        "a/lr-0.001": None,
        "a/lr-0.01": 2.0,
        "a/lr-unknown-seed-4": 7.0,
        "b/lr-0.0005-seed-4": None,
        "a/lr-unknown-seed-6": 7.0,
        "b/lr-0.0005-seed-6": 7.0,
    }
    assert found.remaining_s == 23.0
    assert forecast(plan_cells(config(), DATA, {}), {}).remaining_s is None


def test_slices_are_drawn_written_and_hashed(tmp_path):
    rows = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(20)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "t.jsonl").write_text(text)
    (tmp_path / "v.jsonl").write_text(text)
    sliced = config(output=str(tmp_path / "out"), data=str(tmp_path), rows={"train": 6, "seed": 3})
    dry = find_data(sliced, write=False)
    assert not (tmp_path / "out").exists()
    found = find_data(sliced)
    assert found == dry
    drawn = [json.loads(line) for line in Path(found.train).read_text().splitlines()]
    assert len(drawn) == found.num_rows["train"] == 6
    assert all(row in rows for row in drawn)
    assert found.validation == str(tmp_path / "v.jsonl")
    again = config(output=str(tmp_path / "out"), data=str(tmp_path), rows={"train": 6, "seed": 4})
    assert find_data(again, write=False).sha256["train"] != found.sha256["train"]
    with pytest.raises(DataError, match="fewer rows"):
        find_data(config(output=str(tmp_path), data=str(tmp_path), rows={"train": 21}))


def test_the_interval_over_seeds_is_students():
    found = over_seeds([0.8, 0.9, 0.85])
    half = 4.302653 * statistics.stdev([0.8, 0.9, 0.85]) / math.sqrt(3)
    assert found["value"] == pytest.approx(0.85)
    assert found["interval"] == pytest.approx([0.85 - half, 0.85 + half], abs=1e-5)
    assert (found["median"], found["n"]) == (0.85, 3)
    assert over_seeds([0.7])["interval"] is None


def test_the_t_quantiles_meet_where_the_table_ends():
    assert t_quantile(1) == pytest.approx(12.7062)
    assert t_quantile(30) > t_quantile(31) > t_quantile(60) > t_quantile(10_000) > 1.9599
    assert t_quantile(40) == pytest.approx(2.02108, abs=1e-4)


def test_alternating_times_see_the_slower_call():
    found = compare_times(lambda: time.sleep(0.002), lambda: time.sleep(0.02), 5)
    # A busy machine lengthens both.
    assert 1.5 < found["ratio"] < 12
    assert found["ms"] >= 20
    assert found["quartiles"][0] <= found["ratio"] <= found["quartiles"][1]
