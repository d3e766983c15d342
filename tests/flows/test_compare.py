"""A comparison from its config to its report: cells, resume, skip, a kill in the middle."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

import tiny_runs
from lorakit.cli.main import main
from lorakit.compare.config import CompareConfig
from lorakit.compare.run import Choice, CompareResult, compare, plan_compare
from lorakit.errors import ConfigError, OutputError, RequestError, TargetError


def values(directory: Path, **changes):
    return {
        "title": "tiny",
        "output": str(directory / "out"),
        "data": str(directory),
        "base": {
            "model": str(directory / "model"),
            "data": {"train": "train.jsonl", "validation": "validation.jsonl"},
            "train": {"batch_size": 4, "precision": "fp32", "eval_every": 4, "save_every": 2},
        },
        "methods": [
            {"name": "LoRA qv", "method": "lora", "lora": {"r": 4, "alpha": 12, "targets": "qv"}},
            {
                "name": "LoRA all",
                "method": "lora",
                "lora": {"r": 4, "alpha": 12, "targets": "all-linear"},
                "lr": [1e-4, 1e-3],
            },
        ],
        "seeds": [0, 1],
        "budget": {"steps": 8},
        "lr_search": {"values": [1e-3, 3e-2], "share": 0.5},
        "eval": {"data": "validation.jsonl", "metrics": ["token_f1", "loss"], "max_new_tokens": 6},
        "latency": {"trials": 4, "length": 12},
        **changes,
    }


def made(directory: Path, **changes) -> CompareConfig:
    return CompareConfig.from_dict(values(directory, **changes))


def run(config: CompareConfig, **choice) -> tuple[CompareResult, list[str]]:
    said: list[str] = []
    return compare(config, choice=Choice(**choice), say=said.append), said


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    directory = tiny_runs.write_all(tmp_path_factory.mktemp("compare"))
    run(made(directory))
    return directory


@pytest.fixture
def done(shared, tmp_path) -> Path:
    """A finished comparison of this test's own."""
    shutil.copytree(shared, tmp_path / "copy")
    return tmp_path / "copy"


def record_of(directory: Path, cell: str) -> dict:
    return json.loads((directory / "out" / "cells" / cell / "cell.json").read_text())


def test_every_number_of_the_table_is_there(shared):
    document = json.loads((shared / "out" / "compare.json").read_text())
    assert document["complete"]
    assert document["num_cells"] == {"finished": 8, "planned": 8}
    assert document["metric"] == {"name": "token_f1", "higher_is_better": True}
    lora, wide = document["methods"]
    for method in (lora, wide):
        searched = {found["lr"]: found["eval_loss"] for found in method["lr"]["searched"]}
        assert method["lr"]["chosen"] == min(searched, key=searched.__getitem__)
        assert method["lr"]["edge"] in ("lowest", "highest")
        score = method["scores"]["loss"]
        assert score["n"] == 2
        assert score["interval"][0] <= score["median"] <= score["interval"][1]
        assert method["memory"]["peak_bytes"] > method["memory"]["above_base_bytes"] > 0
        assert method["speed"]["tokens_per_s"] > method["speed"]["examples_per_s"] > 0
        assert method["latency"]["unmerged"]["ratio"] > 0
        assert method["latency"]["merged"]["ratio"] > 0
        assert method["steps"] == 8
    assert sorted(found["lr"] for found in wide["lr"]["searched"]) == [1e-4, 1e-3]
    # q: 32 x 32, v: 16 x 32, two layers, rank 4.
    assert lora["trainable_params"] == 2 * 4 * ((32 + 32) + (32 + 16))
    assert lora["trainable_params"] < wide["trainable_params"]
    assert lora["trainable_share"] < wide["trainable_share"]
    assert lora["checkpoint_bytes"] < wide["checkpoint_bytes"]


def test_the_score_of_a_run_is_its_validation_loss_where_the_rows_are_the_same(shared):
    for cell in ("lora-qv", "lora-all"):
        for directory in (shared / "out" / "cells" / cell).glob("lr-*-seed-*/"):
            record = json.loads((directory / "cell.json").read_text())
            assert record["scores"]["loss"]["value"] == pytest.approx(record["eval_loss"], rel=1e-4)


def test_cells_are_ordinary_runs_and_keep_what_is_needed(shared):
    cells = shared / "out" / "cells"
    final = next((cells / "lora-qv").glob("lr-*-seed-0"))
    search = cells / "lora-qv" / "lr-0.001"
    assert {"run.json", "metrics.jsonl", "config.yaml", "adapter", "cell.json"} <= {
        path.name for path in final.iterdir()
    }
    assert not (final / "checkpoints").exists()
    assert not (search / "adapter").exists()
    assert (cells / "lora-qv" / "lr-0.001.log").read_text()


def test_the_csv_has_a_line_for_each_method(shared):
    head, *lines = (shared / "out" / "compare.csv").read_text().splitlines()
    assert head.startswith("name,method,trainable_params,trainable_share,token_f1,token_f1_low")
    assert [line.split(",")[0] for line in lines] == ["LoRA qv", "LoRA all"]


def test_the_report_has_the_table_the_figure_and_the_curves(shared):
    page = (shared / "out" / "report.html").read_text()
    for text in ("Score against trained parameters", "Validation loss", "LoRA qv", "trained"):
        assert text in page
    assert page.count("<svg") == 2
    assert "http://www.w3.org" in page
    assert "<script" not in page
    assert "src=" not in page


def test_a_finished_comparison_runs_nothing_again(done, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in done.rglob("cell.json")}
    # The model's place is part of the config, the comparison's is not.
    result, said = run(made(done, base=values(done)["base"] | {"model": model_of(done)}))
    assert said == ["8 of 8 cells are finished"]
    assert result.remaining == ()
    assert {path: path.stat().st_mtime_ns for path in done.rglob("cell.json")} == before


def model_of(done: Path) -> str:
    record = json.loads(next(done.rglob("cell.json")).read_text())
    return record["identity"]["train"]["model"]["ref"]


def with_model(done: Path, **changes) -> CompareConfig:
    base = values(done)["base"] | {"model": model_of(done)}
    return made(done, **{"base": base, **changes})


def test_a_removed_cell_is_run_again_alone(done):
    cell = next((done / "out" / "cells" / "lora-qv").glob("lr-*-seed-1"))
    score = json.loads((cell / "cell.json").read_text())["scores"]
    (cell / "cell.json").unlink()
    _, said = run(with_model(done))
    # The run itself was whole: it is scored again, not trained again.
    assert len(said) == 2
    assert json.loads((cell / "cell.json").read_text())["scores"] == score
    shutil.rmtree(cell)
    _, said = run(with_model(done))
    assert said[0] == "7 of 8 cells are finished"
    assert json.loads((cell / "cell.json").read_text())["scores"] == score


def test_a_changed_config_of_finished_cells_is_refused(done):
    with pytest.raises(ConfigError, match="another config") as caught:
        run(with_model(done, budget={"steps": 9}))
    assert "max_steps" in (caught.value.found or "")


def test_more_rates_leave_the_cells_that_are_there(done):
    config = with_model(done, lr_search={"values": [1e-3, 3e-2, 1e-2], "share": 0.5})
    planned = plan_compare(config)
    new = [cell.name for cell in planned.cells if cell.seconds is None]
    assert "lora-qv/lr-0.01" in new
    assert not any(name.startswith("lora-all") for name in new)
    # A rate that loses leaves the winner's runs finished: they are found, not run again.
    _, said = run(with_model(done, lr_search={"values": [1e-6, 1e-3, 3e-2], "share": 0.5}))
    assert [line.split(":")[0] for line in said[1:]] == ["lora-qv/lr-1e-06"]


def test_only_max_cells_and_dry_run(done, capsys):
    config = with_model(done, output=str(done / "other"))
    assert plan_compare(config).num_finished == 0
    assert not (done / "other").exists()
    result, said = run(config, only=["LoRA all"], max_cells=1)
    assert len(said) == 2
    assert said[1].startswith("lora-all/lr-0.0001: ")
    assert result.document["complete"] is False
    assert len(result.remaining) == 3
    with pytest.raises(RequestError, match="no method named"):
        run(config, only=["LoRA al"])


def test_what_a_method_cannot_do_is_refused_before_anything_is_trained(shared, tmp_path):
    methods = [
        *values(shared)["methods"],
        {"name": "typo", "method": "lora", "lora": {"targets": "qqq_proj"}},
    ]
    config = made(shared, output=str(tmp_path / "out"), methods=methods)
    with pytest.raises(TargetError) as caught:
        run(config)
    assert "methods[2] (typo)" in (caught.value.where or "")
    assert not (tmp_path / "out" / "cells").exists()


def test_a_metric_that_does_not_exist_is_refused_before_anything_is_trained(shared, tmp_path):
    section = {**values(shared)["eval"], "metrics": ["blue"]}
    with pytest.raises(ConfigError, match="unknown metric"):
        run(made(shared, output=str(tmp_path / "out"), eval=section))
    assert not (tmp_path / "out").exists()


def test_a_rate_that_breaks_the_run_loses_and_is_reported(shared, tmp_path):
    methods = [
        {"name": "LoRA", "method": "lora", "lr": [1e-2, 3e38], "train": {"max_grad_norm": None}}
    ]
    config = made(shared, output=str(tmp_path / "out"), methods=methods, seeds=[0])
    result, _ = run(config)
    (method,) = result.document["methods"]
    assert method["lr"]["chosen"] == 1e-2
    assert [found["lr"] for found in method["lr"]["searched"] if found["failed"]] == [3e38]
    assert method["failures"][0]["cell"] == "lora/lr-3e+38"


def test_the_output_may_not_be_a_file(shared, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(OutputError):
        run(made(shared, output=str(tmp_path / "out")))


def test_the_command_line_prints_the_table_and_json(done, capsys):
    file = done / "compare.yaml"
    file.write_text(with_model(done).to_yaml())
    assert main(["compare", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "LoRA qv" in shown
    assert "above base" in shown
    assert "latency" in shown
    assert main(["compare", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["remaining"] == []
    assert main(["compare", str(file), "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_finished"] == 8
    assert main(["compare", str(file), "budget.steps=9"]) == 2
    assert main(["compare"]) == 2


@pytest.mark.slow
def test_a_killed_comparison_goes_on_where_it_was(shared, tmp_path):
    output = tmp_path / "out"
    file = tmp_path / "compare.yaml"
    changes = {"output": str(output), "seeds": [0], "latency": {"trials": 0}}
    # The rates lie so that the second cell is long enough to be killed in its middle.
    changes |= {"budget": {"steps": 120}, "lr_search": {"values": [1e-3, 3e-2], "share": 1.0}}
    config = made(shared, **changes, methods=values(shared)["methods"][:1])
    file.write_text(config.to_yaml())
    process = subprocess.Popen(
        [sys.executable, "-m", "lorakit.cli.main", "compare", str(file)],
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    second = output / "cells" / "lora-qv" / "lr-0.03"
    wait_for(lambda: any((second / "checkpoints").glob("step-*")), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    first = output / "cells" / "lora-qv" / "lr-0.001" / "cell.json"
    before = first.read_bytes()
    assert not (second / "cell.json").exists()
    result, said = run(config)
    assert said[0] == "1 of 3 cells are finished"
    assert result.document["complete"]
    assert first.read_bytes() == before
    assert json.loads((second / "cell.json").read_text())["sessions"] == 2


def to_be_killed(shared: Path, output: Path) -> CompareConfig:
    """Two rates of one method, trained together, and the better one's run of the same length."""
    changes = {"together": "yes", "seeds": [0], "latency": {"trials": 0}}
    changes |= {"budget": {"steps": 40}, "lr_search": {"values": [1e-3, 3e-2], "share": 1.0}}
    return made(shared, output=str(output), methods=values(shared)["methods"][:1], **changes)


@pytest.fixture(scope="module")
def never_killed(shared, tmp_path_factory) -> dict:
    return run(to_be_killed(shared, tmp_path_factory.mktemp("whole")))[0].document


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["the process of the runs", "all"])
def test_runs_together_that_are_killed_end_as_if_they_had_not_been(
    shared, never_killed, tmp_path, whom
):
    output = tmp_path / "out"
    config = to_be_killed(shared, output)
    file = tmp_path / "compare.yaml"
    file.write_text(config.to_yaml())
    process = subprocess.Popen(
        [sys.executable, "-m", "lorakit.cli.main", "compare", str(file)],
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
    )
    cells = output / "cells"
    searched = ["lora-qv/lr-0.001", "lora-qv/lr-0.03"]
    wait_for(lambda: all(reached(cells / name) >= 10 for name in searched), process)
    victims = processes_below(process.pid)
    assert len(victims) >= 2
    # The last one was started last: it trains. Where all die, the one who would clean up is first.
    for pid in [process.pid, *victims] if whom == "all" else victims[-1:]:
        os.kill(pid, signal.SIGKILL)
    said = process.communicate()[1]
    if whom != "all":
        assert process.returncode == 1
        assert "the same command goes on" in said
    assert not list(cells.rglob("cell.json"))
    begun = {name: reached(cells / name) for name in searched}
    assert all(10 <= steps < 40 for steps in begun.values())
    again, _ = run(config)
    assert again.document["complete"]
    for mine, theirs in zip(again.document["cells"], never_killed["cells"], strict=True):
        assert mine["cell"] == theirs["cell"]
        assert mine["trained"] == theirs["trained"]
        assert theirs["sessions"] == 1
        assert mine["sessions"] == 1 + (mine["kind"] == "search")
        assert mine["eval_loss"] == pytest.approx(theirs["eval_loss"], abs=1e-5)
        for one, other in zip(mine["eval_curve"], theirs["eval_curve"], strict=True):
            assert one == pytest.approx(other, abs=1e-5)
    (mine,), (theirs,) = again.document["methods"], never_killed["methods"]
    assert mine["lr"]["chosen"] == theirs["lr"]["chosen"]


def reached(cell: Path) -> int:
    """The last step of which a cell has a checkpoint."""
    return max((int(p.name[5:]) for p in (cell / "checkpoints").glob("step-*")), default=0)


def processes_below(pid: int) -> list[int]:
    """The children of a process, and theirs, oldest first."""
    found: list[int] = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parent = int(file.read_text().rpartition(")")[2].split()[1])
            found += [int(file.parent.name)] if parent == pid else []
    return [*sorted(found), *[p for child in sorted(found) for p in processes_below(child)]]


def wait_for(condition, process, seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the comparison ended before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.02)


def test_lora_runs_trained_together_are_their_runs_alone_and_say_so(shared, tmp_path):
    directory = tiny_runs.write_all(tmp_path)
    model = {"base": values(directory)["base"] | {"model": str(shared / "model")}}
    config = made(directory, together="yes", seeds=[0], **model)
    result, said = run(config)
    assert result.document["complete"]
    assert any("together with 3 others" in line for line in said)
    for cell in result.document["cells"]:
        alone = record_of(shared, cell["cell"])
        assert alone["trained"] == "alone"
        assert cell["trained"] == "together"
        assert len(cell["together_with"]) == (3 if cell["kind"] == "search" else 1)
        assert cell["cell"] not in cell["together_with"]
        for key in ("speed", "peak_bytes", "base_bytes", "seconds_per_step"):
            assert cell[key] is None
            assert cell["shared"][key] is not None
        assert cell["eval_loss"] == pytest.approx(alone["eval_loss"], abs=1e-5)
        for (step, loss), (own_step, own) in zip(
            cell["eval_curve"], alone["eval_curve"], strict=True
        ):
            assert step == own_step
            assert loss == pytest.approx(own, abs=1e-5)
        assert set(cell) - {"shared", "together_with"} == set(alone) - {
            "identity",
            "versions",
            "hardware",
        }
    for method in result.document["methods"]:
        assert method["together"] == 1
        assert method["memory"]["peak_bytes"] is None
        assert method["speed"]["tokens_per_s"] is None
        assert method["latency"]["merged"]["ratio"] > 0
    assert "trained together" in (directory / "out" / "report.html").read_text()

    # Broken off between training and its record, a cell is not trained again.
    cell = directory / "out" / "cells" / "lora-qv" / "lr-0.001"
    before = json.loads((cell / "cell.json").read_text())
    stamp = (cell / "run.json").stat().st_mtime_ns
    (cell / "cell.json").unlink()
    assert run(made(directory, together="no", seeds=[0], **model))[0].remaining == ()
    again = json.loads((cell / "cell.json").read_text())
    assert (again["trained"], again["together_with"]) == ("together", before["together_with"])
    assert (cell / "run.json").stat().st_mtime_ns == stamp


def test_what_cannot_be_trained_together_is_refused_before_anything_runs(tmp_path):
    directory = tiny_runs.write_all(tmp_path)
    lora = {"r": 4, "alpha": 12, "targets": "qv", "dropout": 0.1}
    methods = [{"name": "dropped", "method": "lora", "lora": lora}]
    with pytest.raises(ConfigError, match="no two runs"):
        run(made(directory, together="yes", methods=methods))
    assert not (directory / "out" / "cells").exists()
    with pytest.raises(ConfigError, match="together"):
        made(directory, together="sometimes")
