"""Composing on SmolLM2 itself, from the command line: two tasks, one adapter made of both."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

import lorakit as lk
from lorakit.cli.main import main
from lorakit.demo.tasks import sql_task

_NAMES = ("The Mill", "Blue Spice", "Aromi", "Clowns", "The Punter", "Zizzi", "Strada", "Wildwood")
_FOODS = ("Italian", "French", "Chinese", "English", "Indian", "Japanese")
_AREAS = ("riverside", "city centre")


def _restaurants(num: int, *, seed: int) -> list[dict[str, str]]:
    """Rows like E2E's: slots of a restaurant, and a text that says them."""
    rng, rows = random.Random(seed), []
    for _ in range(num):
        name, food, area = rng.choice(_NAMES), rng.choice(_FOODS), rng.choice(_AREAS)
        said = f"{name} is a pub in the {area} area that serves {food} food."
        given = f"name : {name} | Type : pub | food : {food} | area : {area}"
        rows.append({"prompt": given, "completion": said})
    return rows


def _write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """Two runs of some steps each, and the rows that neither has seen."""
    directory = tmp_path_factory.mktemp("tasks")
    sql = sql_task(3)
    short = sorted(sql.train, key=lambda row: len(json.dumps(row)))
    learned = {"sql": short[:24], "pubs": _restaurants(48, seed=1)}
    unseen = {"sql": sql.held_out[:8], "pubs": _restaurants(8, seed=2)}
    files: dict[str, Path] = {}
    for name, rows in learned.items():
        files[name] = _write(directory / f"{name}_test.jsonl", unseen[name])
        config = directory / f"{name}.yaml"
        data = _write(directory / f"{name}_train.jsonl", rows)
        config.write_text(
            f"model: smollm2-135m-instruct\ndata: {{train: {data}}}\n"
            f"output: {directory / name}\nlora: {{r: {4 if name == 'sql' else 6}, alpha: 16}}\n"
            # At a rate where neither part drowns the other: TIES does not damp the sum.
            "train: {epochs: 2, batch_size: 4, lr: 1.0e-3, schedule: constant}\n",
            encoding="utf-8",
        )
        assert main(["train", str(config)]) == 0
    both = [json.loads(line) for name in files for line in files[name].read_text().splitlines()]
    turns = [
        row
        if "messages" in row
        else {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"]},
            ]
        }
        for row in both
    ]
    files["both"] = _write(directory / "both.jsonl", [{"messages": r["messages"]} for r in turns])
    return directory, files


def _compose(tasks, capsys, output: Path, *words: str, weights: tuple[str, str] = ("=0.5", "=0.5")):
    directory, files = tasks
    parts = [
        f"{directory / name / 'adapter'}{w}"
        for name, w in zip(("sql", "pubs"), weights, strict=True)
    ]
    capsys.readouterr()
    measured = ["--measure", str(files["sql"]), str(files["pubs"])]
    code = main(["compose", *parts, "-o", str(output), *words, *measured, "--json"])
    assert code == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        ("cat",),
        ("svd", "-r", "4"),
        ("ties", "-r", "8", "--density", "0.5"),
        ("dare", "-r", "8", "--density", "0.7", "--seed", "3"),
        ("slerp",),
    ],
    ids=lambda how: how[0],
)
def test_two_tasks_in_one_adapter(how, tasks, tmp_path, capsys):
    record = _compose(tasks, capsys, tmp_path / "made", "--how", *how)
    (pair,) = record["predicted"]
    assert pair["shared_sites"] == pair["all_sites"] == 60
    assert 0 < pair["mean"]["overlap_in"] < 1
    assert 0 < pair["mean"]["sign_conflict"] < 1
    assert (record["relative_error"] < 1e-6) == (how[0] in ("cat", "slerp"))
    for task in record["measured"]:
        scores = task["metrics"]["perplexity"]
        # What was learned is there, and composing leaves some of it.
        assert scores["part"]["value"] < scores["base"]["value"]
        assert scores["composed"]["value"] < scores["base"]["value"]
        low, high = scores["difference"]["interval"]
        assert low <= scores["difference"]["value"] <= high
    model, tokenizer = lk.load_model("smollm2-135m-instruct")
    lk.load_adapter(model, tmp_path / "made")
    ids = tokenizer(["name : Zizzi | Type : pub"], return_tensors="pt")
    assert torch.isfinite(model(**ids).logits).all()


@pytest.mark.real
@pytest.mark.slow
def test_weights_are_chosen_on_rows_of_both_tasks(tasks, tmp_path, capsys):
    files = tasks[1]
    more = ("--how", "linear", "--tune", str(files["both"]), "--max-trials", "8")
    record = _compose(tasks, capsys, tmp_path / "made", *more, weights=("", ""))
    tuned = record["tuned"]
    assert tuned["perplexity"] <= min(tuned["base"], *tuned["alone"].values())
    assert all(weight > 0 for weight in tuned["weights"].values()), "rows of both tasks need both"
    assert [part["weight"] for part in record["parts"]] == list(tuned["weights"].values())
