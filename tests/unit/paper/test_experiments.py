from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorakit.cli.main import main
from lorakit.errors import OutputError, RequestError
from lorakit.paper.estimate import estimate_seconds
from lorakit.paper.experiments import EXPERIMENTS
from lorakit.paper.output import MARK, claim, read_results

SHARED = {"table7", "figure3", "figure4"}


def test_the_laptop_scale_fits_the_promise() -> None:
    times = {name: estimate_seconds(e, "laptop") for name, e in EXPERIMENTS.items()}
    assert max(times.values()) < 30 * 60
    shared = sum(times[name] for name in SHARED)
    # r=4, r=8 and r=64 once: half of what the three count of r=64 is counted again.
    alone = times["figure4"] + (shared - 3 * times["figure4"])
    assert sum(times.values()) - shared + alone < 3 * 3600


def test_every_experiment_has_both_scales_and_a_file_to_read() -> None:
    for experiment in EXPERIMENTS.values():
        assert set(experiment.scales) == {"laptop", "gpu"}
        assert all(part.file.is_file() for part in experiment.parts)
        assert bool(experiment.needs) == (experiment.kind != "latency")
        assert estimate_seconds(experiment, "gpu") > 0


def test_list_says_what_there_is(tmp_path, capsys) -> None:
    assert main(["paper", "list", "-o", str(tmp_path), "--json"]) == 0
    found = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert list(found) == list(EXPERIMENTS)
    assert found["table3"]["needs"] == [f"e2e/{n}.jsonl.gz" for n in ("train", "dev", "test")]
    assert found["table3"]["finished"] is None
    assert set(found["table3"]["estimate_s"]) == {"laptop", "gpu"}
    assert main(["paper", "list", "-o", str(tmp_path)]) == 0
    assert "figure4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["list", "table1"], "takes no names"),
        (["run"], "one experiment"),
        (["run", "table1", "table2"], "one experiment"),
        (["run", "tabel2"], "did you mean 'table2'"),
        (["run", "table2", "--scale", "desk"], "no scale 'desk'"),
        (["run", "table2"], "table2 needs data"),
        (["run", "table2", "--data", "{tmp}/nowhere"], "does not exist"),
        (["run", "table3", "--data", "{tmp}"], "e2e/train.jsonl.gz"),
        (["run", "all", "seeds=[0]"], "all experiments at once"),
        (["run", "table1", "rounds=1"], "rounds is out of range"),
        (["run", "table1", "round=4"], "unknown key"),
        (["run", "table1", "--only", "LoRA"], "all its methods"),
        (["report"], "one directory"),
        (["report", "{tmp}/nowhere"], "no such directory"),
        (["report", "{tmp}"], "no result of lorakit paper"),
        (["look"], "invalid choice"),
    ],
)
def test_a_wrong_request_is_refused_before_anything_is_written(
    words, says, tmp_path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    assert main(["paper", *(word.format(tmp=tmp_path) for word in words)]) == 2
    assert says in " ".join(capsys.readouterr().err.split())
    assert not list((tmp_path / "work").iterdir())


def test_a_method_that_is_not_there_and_a_scale_that_cannot_be(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for name in EXPERIMENTS["table3"].needs:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    words = ["paper", "run", "table3", "--data", str(tmp_path), "-o", str(tmp_path / "out")]
    assert main([*words, "--only", "LoRA"]) == 2
    assert "no method named 'LoRA'" in capsys.readouterr().err
    assert main([*words, "--scale", "gpu"]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert main([*words, "budget.stepps=3"]) == 2
    assert not (tmp_path / "out").exists()


def test_only_our_own_directory_of_the_same_scale_is_taken(tmp_path: Path) -> None:
    claim(tmp_path / "new", "laptop")
    claim(tmp_path / "new", "laptop")
    with pytest.raises(OutputError, match="another scale"):
        claim(tmp_path / "new", "gpu")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.tex").write_text("")
    with pytest.raises(OutputError, match="not empty"):
        claim(tmp_path / "theirs", "laptop")
    (tmp_path / "theirs" / MARK).write_text('{"kind": "another"}')
    with pytest.raises(OutputError, match="something else"):
        claim(tmp_path / "theirs", "laptop")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        claim(tmp_path / "file", "laptop")


@pytest.mark.parametrize("text", ["{", "[]", '{"kind": "paper", "experiment": "table2"}'])
def test_a_damaged_result_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "table1.json").write_text(text)
    with pytest.raises(RequestError) as caught:
        read_results(tmp_path)
    assert "table1.json" in (caught.value.where or "")
