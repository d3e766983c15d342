"""The verbs on what `task: classify` leaves."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

import tiny_classifiers
from lorakit.cli.main import main
from lorakit.models.load import load_tokenizer

LORA = {"lora": {"r": 4, "alpha": 12, "targets": "all-linear"}}
RUNS = {
    "bert-lora": ("bert", "pair", LORA),
    "llama-lora": ("llama", "pair", LORA),
    "bert-full": ("bert", "pair", {"method": "full"}),
    "bert-named": ("bert", "named", LORA),
    "bert-score": ("bert", "score", {"method": "full"}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Bases, data, and one run of each kind."""
    root = tmp_path_factory.mktemp("classifiers")
    for name in ("bert", "llama"):
        tiny_classifiers.write_base(root / name, name)
    for kind in ("pair", "named", "score"):
        tiny_classifiers.write_rows(
            root / f"{kind}.jsonl", tiny_classifiers.rows(160, kind=kind, seed=0)
        )
        held = tiny_classifiers.rows(18, kind=kind, seed=1)
        tiny_classifiers.write_rows(root / f"{kind}-held.jsonl", held)
    for name, (base, kind, method) in RUNS.items():
        config = {
            "model": str(root / base),
            "task": "classify",
            "data": {"train": str(root / f"{kind}.jsonl")},
            **method,
            "train": {"epochs": 6, "batch_size": 8, "lr": 0.01, "precision": "fp32"},
            "output": str(root / name),
        }
        (root / f"{name}.yaml").write_text(json.dumps(config))
        assert main(["train", str(root / f"{name}.yaml")]) == 0
    return root


def held_of(folder, name):
    return folder / f"{RUNS[name][1]}-held.jsonl"


def adapter_of(folder, name):
    return folder / name / "adapter"


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", ["bert-lora", "llama-lora", "bert-full", "bert-named"])
def test_eval_scores_classes_beside_the_majority_class(folder, answer, tmp_path, name):
    predictions, output = tmp_path / "predictions.jsonl", tmp_path / "eval.json"
    words = ("--adapter", adapter_of(folder, name), "--batch-size", "5")
    files = ("--predictions", predictions, "-o", output)
    code, found = answer("eval", held_of(folder, name), *words, *files)
    assert code == 0
    assert found == json.loads(output.read_text())
    assert set(found["metrics"]) == {"accuracy", "f1", "accuracy_f1", "matthews"}
    lines, rows = lines_of(predictions), lines_of(held_of(folder, name))
    assert [line["label"] for line in lines] == [str(row["label"]) for row in rows]
    right = [line["label"] == line["predicted"] for line in lines]
    assert right == [line["right"] for line in lines]
    scores = found["systems"]["adapter"]["scores"]
    assert scores["accuracy"]["value"] == sum(right) / len(rows)
    assert scores["accuracy"]["value"] > 0.7
    assert scores["accuracy"]["interval"][0] < scores["accuracy"]["value"]
    assert found["systems"]["majority class"]["scores"]["accuracy"]["value"] == 0.5
    assert found["systems"]["majority class"]["scores"]["matthews"]["value"] == 0
    assert 0 < found["differences"]["adapter"]["accuracy"]["p_value"] <= 1
    for line in lines:
        assert max(line["probabilities"], key=line["probabilities"].get) == line["predicted"]
        assert sum(line["probabilities"].values()) == pytest.approx(1)


def test_the_table_of_classes_counts_rows_and_predictions(folder, answer, tmp_path):
    name, predictions = "bert-named", tmp_path / "p.jsonl"
    words = ("--adapter", adapter_of(folder, name), "--limit", "11", "--predictions", predictions)
    code, found = answer("eval", held_of(folder, name), *words)
    assert code == 0
    lines = lines_of(predictions)
    assert len(lines) == found["num_rows"] == 11
    assert found["constant"] == "bad"
    for entry in found["classes"]:
        labelled = [n for n in lines if n["label"] == entry["name"]]
        said = [n for n in lines if n["predicted"] == entry["name"]]
        hits = sum(n["right"] for n in said)
        assert (entry["count"], entry["predicted"]) == (len(labelled), len(said))
        assert entry["recall"] == hits / len(labelled)
        assert entry["precision"] == (hits / len(said) if said else None)


def test_predictions_are_those_of_the_merged_model_row_by_row(folder, answer, tmp_path):
    adapter, merged = adapter_of(folder, "bert-lora"), tmp_path / "merged"
    code, certificate = answer("merge", adapter, "-o", merged)
    assert code == 0
    assert certificate["max_abs_logit_error"] <= 1e-5 < certificate["max_abs_logit_change"]
    held, predictions = folder / "pair-held.jsonl", tmp_path / "p.jsonl"
    code, _ = answer("eval", held, "--adapter", adapter, "--predictions", predictions)
    assert code == 0
    theirs = AutoModelForSequenceClassification.from_pretrained(merged).eval()
    tokenizer = load_tokenizer(merged)
    assert theirs.config.id2label == {0: "0", 1: "1"}
    for line, row in zip(lines_of(predictions), lines_of(held), strict=True):
        tokens = tokenizer(row["sentence1"], row["sentence2"], return_tensors="pt")
        with torch.no_grad():
            expected = theirs(**tokens).logits.softmax(-1)[0]
        assert list(line["probabilities"].values()) == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize("name", ["llama-lora", "bert-full", "bert-score"])
def test_every_classifier_merges_into_a_plain_directory(folder, answer, tmp_path, name):
    code, certificate = answer("merge", adapter_of(folder, name), "-o", tmp_path / "merged")
    assert code == 0
    assert certificate["num_continuations"] == 0
    model, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "merged", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.config.num_labels == (1 if name == "bert-score" else 2)
    state = load_file(tmp_path / "merged" / "model.safetensors")
    assert not any("lora" in key for key in state)


def test_eval_scores_numbers_beside_their_mean(folder, answer, tmp_path, capsys):
    adapter, held = adapter_of(folder, "bert-score"), folder / "score-held.jsonl"
    predictions = tmp_path / "p.jsonl"
    code, found = answer("eval", held, "--adapter", adapter, "--predictions", predictions)
    assert code == 0
    pairs = [[line["label"], line["predicted"]] for line in lines_of(predictions)]
    values = torch.tensor(pairs, dtype=torch.float64)
    scores = found["systems"]["adapter"]["scores"]
    assert scores["pearson"]["value"] == pytest.approx(float(torch.corrcoef(values.T)[0, 1]))
    assert scores["pearson"]["value"] > 0.5
    assert found["systems"]["mean"]["scores"]["spearman"]["value"] == 0
    assert found["constant"] == pytest.approx(float(values[:, 0].mean()))
    assert (found["differences"], found["classes"]) == ({}, [])
    assert main(["eval", str(held), "--adapter", str(adapter)]) == 0
    told = capsys.readouterr()
    assert "pearson_spearman" in told.out
    assert "mean label" in " ".join(told.err.split())


def test_the_table_says_what_stands_for_the_base(folder, capsys):
    words = ["--adapter", str(adapter_of(folder, "bert-named"))]
    assert main(["eval", str(folder / "named-held.jsonl"), *words, "--metrics", "matthews"]) == 0
    told = capsys.readouterr()
    assert "majority class" in told.out
    assert "recall" in told.out
    assert "accuracy" not in told.out
    assert "no trained head" in " ".join(told.err.split())


def test_columns_can_be_named(folder, answer, tmp_path):
    rows = [{"a": r["text"], "b": r["label"]} for r in tiny_classifiers.rows(6, kind="named")]
    data = tiny_classifiers.write_rows(tmp_path / "data.jsonl", rows)
    words = ("--adapter", adapter_of(folder, "bert-named"), "--column", "text=a")
    code, found = answer("eval", data, *words, "--column", "label=b")
    assert (code, found["num_rows"]) == (0, 6)
    assert found["settings"]["columns"] == {"text": "a", "label": "b"}


@pytest.mark.parametrize("name", ["bert-lora", "bert-full"])
def test_inspect_shows_the_task(folder, capsys, name):
    assert main(["inspect", str(adapter_of(folder, name))]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "classify, 2 classes: 0, 1" in told
    assert "text_pair sentence2" in told


def test_inspect_measures_changes_of_the_body_and_leaves_the_head_new(folder, answer):
    code, found = answer("inspect", adapter_of(folder, "bert-full"))
    assert (code, found["note"]) == (0, None)
    new = {site["site"] for site in found["sites"] if not site["is_change"]}
    assert new == {"classifier.weight", "classifier.bias"}


REFUSED = {
    "generate": (["generate", "hello"], "task: classify"),
    "generate a file": (["generate", "--file", "{held}"], "task: classify"),
    "chat": (["chat"], "task: classify"),
    "sft metric": (["eval", "{held}", "--metrics", "perplexity"], "not one of 2 classes"),
    "template": (["eval", "{held}", "--template", "chat"], "--template means nothing"),
    "tokens": (["eval", "{held}", "--max-new-tokens", "4"], "--max-new-tokens means nothing"),
    "limit": (["eval", "{held}", "--limit", "0"], "limit is out of range"),
    "column": (["eval", "{held}", "--column", "label=nowhere"], "without the column 'nowhere'"),
    "role": (["eval", "{held}", "--column", "prompt=sentence1"], "unknown role 'prompt'"),
    "other columns": (["eval", "{other}"], "without the column"),
    "other labels": (["eval", "{wrong}"], "none of the classes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_and_nothing_is_written(folder, answer, tmp_path, case):
    rows = [{**row, "label": 7} for row in tiny_classifiers.rows(4)]
    places = {
        "held": folder / "pair-held.jsonl",
        "other": folder / "named-held.jsonl",
        "wrong": tiny_classifiers.write_rows(tmp_path / "wrong.jsonl", rows),
    }
    words, says = REFUSED[case]
    words = [word.format(**places) for word in words]
    if words[0] == "eval":
        words += ["--predictions", str(tmp_path / "predictions.jsonl")]
    code, found = answer(*words, "--adapter", adapter_of(folder, "bert-lora"))
    assert code == 2
    assert says in found["error"]["what"]
    if "task: classify" in says:
        assert "lorakit eval" in found["error"]["remedy"]
    assert not (tmp_path / "predictions.jsonl").exists()


def test_options_of_classifiers_are_refused_for_text(run_directory, data, answer, tmp_path):
    adapter = run_directory / "adapter"
    output = tmp_path / "predictions.jsonl"
    code, found = answer("eval", data, "--adapter", adapter, "--predictions", output)
    assert code == 2
    assert "--predictions is for classifiers" in found["error"]["what"]
    code, found = answer("eval", data, "--adapter", adapter, "--metrics", "matthews")
    assert code == 2
    assert "unknown metric 'matthews'" in found["error"]["what"]


def test_a_passport_without_its_classes_is_refused(folder, answer, tmp_path):
    source, copy = adapter_of(folder, "bert-lora"), tmp_path / "adapter"
    copy.mkdir()
    for file in source.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    passport = json.loads((copy / "lorakit.json").read_text())
    passport["task"]["targets"] = {"kind": "classes", "names": []}
    (copy / "lorakit.json").write_text(json.dumps(passport))
    code, found = answer("eval", folder / "pair-held.jsonl", "--adapter", copy)
    assert code == 2
    assert "does not describe its classes" in found["error"]["what"]
