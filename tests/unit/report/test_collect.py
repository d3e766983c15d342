from __future__ import annotations

import json

import pytest

from lorakit.errors import RequestError
from lorakit.report.collect import collect, read_curve


def estimate(value, low, high, n=160):
    return {"value": value, "interval": [low, high], "n": n}


@pytest.fixture
def run(tmp_path):
    """A directory as a demo leaves it."""
    (tmp_path / "result.json").write_text(
        json.dumps(
            {
                "base": {"execution_accuracy": estimate(0.03, 0.01, 0.07)},
                "base_2shot": {"execution_accuracy": estimate(0.09, 0.05, 0.14)},
                "adapter": {
                    "execution_accuracy": estimate(0.83, 0.77, 0.88),
                    "perplexity": estimate(0.99, 0.98, 1.11, n=80),
                },
                "trainable_params": 2_442_240,
                "total_params": 134_515_008,
                "adapter_bytes": 9_800_000,
                "seconds": 372.0,
                "lora": {"r": 8, "alpha": 16},
            }
        )
    )
    lines = [{"step": s, "loss": 2.0 / s, "lr": 1e-3} for s in range(1, 5)]
    lines.insert(2, {"step": 2, "eval_loss": 0.7})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "merge.json").write_text(
        json.dumps(
            {
                "max_abs_logit_error": 3e-5,
                "tolerance": 1e-3,
                "layers": [{"layer": 0, "max_abs_error": 1e-6, "max_abs": 2.0}],
            }
        )
    )
    return tmp_path


def test_a_demo_directory_becomes_a_report(run):
    report = collect(run)
    table = report["comparison"]
    assert table["columns"] == ["base", "base, 2 examples shown", "adapter"]
    accuracy, perplexity = table["rows"]
    assert [cell["value"] for cell in accuracy["cells"]] == [0.03, 0.09, 0.83]
    assert (accuracy["share"], accuracy["note"]) == (True, "n = 160")
    assert perplexity["cells"][:2] == [None, None]
    assert perplexity["share"] is False
    assert report["curve"]["train"] == [[1, 2.0], [2, 1.0], [3, 2 / 3], [4, 0.5]]
    assert report["curve"]["validation"] == [[2, 0.7]]
    assert report["certificate"]["facts"] == {
        "max abs logit error": 3e-5,
        "tolerance": 1e-3,
    }
    assert report["certificate"]["passed"] is True
    assert report["certificate"]["layers"] == [("layer 0", 1e-6)]
    tiles = {tile["label"]: tile["value"] for tile in report["tiles"]}
    assert tiles == {
        "trained parameters": "2,442,240",
        "adapter": "9.8 MB",
        "time": "6 min 12 s",
    }
    assert report["details"]["Lora"] == {"r": 8, "alpha": 16}
    assert report["details"]["Run"]["adapter bytes"] == "9.8 MB"


@pytest.mark.parametrize(
    "record", [{"passed": False}, {"max_abs_logit_error": 2e-3, "tolerance": 1e-3}]
)
def test_a_failed_merge_is_not_shown_as_passed(run, record):
    (run / "merged" / "merge.json").write_text(json.dumps(record))
    assert collect(run)["certificate"]["passed"] is False


def test_a_half_last_line_is_a_run_that_goes_on(run):
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 5, "lo')
    assert len(read_curve(run / "metrics.jsonl")["train"]) == 4


def test_a_damaged_line_in_the_middle_is_named(run):
    text = (run / "metrics.jsonl").read_text().splitlines()
    text[1] = "{oops"
    (run / "metrics.jsonl").write_text("\n".join(text))
    with pytest.raises(RequestError, match="damaged") as caught:
        collect(run)
    assert (caught.value.where or "").endswith("metrics.jsonl line 2")


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_damaged_record_is_named(run, content):
    (run / "result.json").write_text(content)
    with pytest.raises(RequestError, match="a record is") as caught:
        collect(run)
    assert caught.value.where == str(run / "result.json")


def test_a_directory_without_records_or_no_directory_is_refused(tmp_path):
    with pytest.raises(RequestError, match="no record"):
        collect(tmp_path)
    with pytest.raises(RequestError, match="no such run directory"):
        collect(tmp_path / "absent")


def test_a_run_without_a_subtitle_says_what_was_trained_on_what(tmp_path):
    record = {
        "config": {"model": {"ref": "tiny"}, "method": "lora", "task": "sft"},
        "data": {"train": {"source": "rows.jsonl", "num_rows": 1200}},
    }
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert collect(tmp_path)["subtitle"] == (
        "method lora on tiny, task sft, 1,200 rows of rows.jsonl"
    )


def test_a_record_of_another_version_is_refused(tmp_path):
    (tmp_path / "sweep.json").write_text('{"title": "t", "arms": [{"name": "a"}], "best": "a"}')
    with pytest.raises(RequestError, match="not as this version") as caught:
        collect(tmp_path)
    assert caught.value.found == "no 'together'"
