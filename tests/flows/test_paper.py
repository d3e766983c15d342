"""Experiments of the paper through the command line, on tiny models and a few rows."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import tiny_classifiers
import tiny_runs
from lorakit.cli.main import main


def write_gz(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Tiny models, and data sets where the experiments look for them."""
    directory = tmp_path_factory.mktemp("paper")
    tiny_classifiers.write_base(directory / "encoder")
    for name, count in (("train", 60), ("dev", 20)):
        rows = tiny_classifiers.rows(count, seed=count, kind="score")
        write_gz(directory / "data" / "glue" / "stsb" / f"{name}.jsonl.gz", rows)
    tiny_runs.write_model(directory / "decoder")
    tokenizer = AutoTokenizer.from_pretrained(directory / "decoder")
    tokenizer.chat_template = tiny_runs.TEMPLATE
    tokenizer.save_pretrained(directory / "decoder")
    rng = random.Random(0)
    for name, count in (("train", 40), ("dev", 12), ("test", 6)):
        texts = [" ".join(rng.choices(tiny_runs.WORDS, k=6)) for _ in range(count)]
        rows = [{"context": text, "ref": text} for text in texts]
        write_gz(directory / "data" / "e2e" / f"{name}.jsonl.gz", rows)
    return directory


def run(place: Path, output: str, *words: str) -> int:
    base = ["paper", "run", "--data", str(place / "data"), "-o", str(place / output), "--json"]
    return main([*base, *words])


RANKS = (
    "table6",
    "--only",
    "q r=1",
    "--only",
    "q r=64",
    "budget.steps=3",
    "seeds=[0]",
    "lr_search.values=[1e-2]",
    "base.train.precision=fp32",
    "base.data.max_length=32",
)


@pytest.mark.slow
def test_a_table_of_scores(place, capsys) -> None:
    words = (*RANKS, f"base.model={place / 'encoder'}")
    assert run(place, "out", *words) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["seeds"] == [0]
    assert result["hardware"]["cpu"]
    assert "torch" in result["versions"]
    rows = {row["name"]: row for row in result["scores"]["rows"]}
    assert set(rows) == {"q r=1", "q r=64"}
    assert rows["q r=1"]["cells"]["STS-B"]["paper"]["value"] == 90.7
    ours = rows["q r=1"]["cells"]["STS-B"]["ours"]
    cells = result["comparisons"]["ranks_stsb"]["cells"]
    (score,) = [c["scores"]["pearson"]["value"] for c in cells if c["arm"] == "q r=1"]
    assert ours["value"] == pytest.approx(100 * score)
    (finding,) = result["findings"]
    assert finding["claim"].startswith("q r=1 against q r=64, STS-B")
    assert finding["verdict"] in ("agrees", "disagrees", "cannot tell")

    # The same call finds its runs finished; the page and the list know the result.
    finished = {file: file.stat().st_mtime_ns for file in (place / "out").rglob("cell.json")}
    assert len(finished) == 2
    assert run(place, "out", *words) == 0
    assert {f: f.stat().st_mtime_ns for f in (place / "out").rglob("cell.json")} == finished
    page = (place / "out" / "report.html").read_text()
    assert "Table 6" in page
    assert "W_q r=64" in page
    capsys.readouterr()
    assert main(["paper", "list", "-o", str(place / "out"), "--json"]) == 0
    listed = {entry["name"]: entry["finished"] for entry in json.loads(capsys.readouterr().out)}
    assert listed["table6"]["scale"] == "laptop"
    assert listed["table2"] is None


@pytest.mark.slow
def test_where_adapters_point(place, capsys) -> None:
    words = (
        f"base.model.ref={place / 'decoder'}",
        "rows.train=24",
        "rows.validation=6",
        "budget.steps=3",
        "base.train.precision=fp32",
    )
    assert run(place, "directions", "figure4", *words) == 0
    figure = json.loads(capsys.readouterr().out)
    sites = figure["subspaces"]["sites"]
    assert len(sites) == 4
    assert all(0 <= site["first"] <= 1 for site in sites.values())
    assert {f["verdict"] for f in figure["findings"]} <= {"agrees", "disagrees", "cannot tell"}
    assert len(figure["findings"]) == 3

    assert run(place, "directions", "table7", *words) == 0
    table = json.loads(capsys.readouterr().out)
    # Two runs of r=64 were there.
    assert table["comparisons"]["subspaces"]["num_cells"]["finished"] == 4
    assert set(table["amplification"]) == {"4", "64"}
    assert len(table["amplification"]["4"]) == 2
    assert len(table["findings"]) == 5
    page = (place / "directions" / "report.html").read_text()
    assert "Figure 4" in page
    assert "Table 7" in page
    assert "<svg" in page


# The tiny shape is narrower than the ranks that have 11M parameters' share.
@pytest.mark.filterwarnings("ignore:the rank exceeds")
def test_latency_is_measured_once(place, capsys) -> None:
    words = ("table1", "model=tiny", "divisor=32", "rounds=3")
    assert run(place, "time", *words) == 0
    first = json.loads(capsys.readouterr().out)
    assert len(first["latency"]["cells"]) == 3
    assert len(first["findings"]) == 11
    assert first["table"]["rows"][0][0] == "the same again (noise)"
    assert run(place, "time", *words) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["latency"] == first["latency"]
