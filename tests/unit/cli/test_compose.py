"""`lorakit compose`: what it prints, measures, chooses and refuses."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import lorakit as lk
from learned import attach_learned
from lorakit.cli.main import main


@pytest.fixture(scope="session")
def second(base, tmp_path_factory):
    """Another adapter of the same base, on other sites and at another rank."""
    path = tmp_path_factory.mktemp("second") / "other"
    model, _ = lk.load_model(base)
    attach_learned(model, lk.LoraSpec(r=3, alpha=5.0, targets="qv"), size=0.05)
    lk.save_adapter(model, path)
    return path


def test_the_record_says_what_was_predicted_and_composed(run_directory, second, tmp_path, answer):
    first = run_directory / "adapter"
    code, record = answer(
        "compose", f"{first}=0.7", f"{second}=0.3", "-o", tmp_path / "made", "--how", "svd", "-r", 2
    )
    assert code == 0
    assert [(p["name"], p["weight"]) for p in record["parts"]] == [("run", 0.7), ("other", 0.3)]
    assert 0 < record["relative_error"] < 1
    (pair,) = record["predicted"]
    assert pair["shared_sites"] == 4
    assert pair["all_sites"] == 14
    assert -1 <= pair["mean"]["cosine"] <= 1
    assert 0 < pair["mean"]["sign_conflict"] < 1
    made = lk.Adapter.load(tmp_path / "made")
    assert {f.r for f in made.factors.values()} == {2}
    assert made.passport["composition"]["parts"] == record["parts"]
    # How rows are read is kept where the parts agree; it binds to their base.
    model, _ = lk.load_model(record["parts"][0]["model"])
    lk.load_adapter(model, tmp_path / "made")


@pytest.mark.parametrize(
    "how", [("linear", "-r", 4), ("linear",), ("ties", "-r", 2, "--density", 0.1)], ids=str
)
def test_weights_are_tuned_and_tasks_measured(how, run_directory, second, data, tmp_path, answer):
    first = run_directory / "adapter"
    code, record = answer(
        *("compose", first, second, "-o", tmp_path / "made", "--how", *how),
        *("--tune", data, "--max-trials", 8, "--measure", data, data, "--limit", 6),
    )
    assert code == 0
    tuned = record["tuned"]
    assert len(tuned["trials"]) <= 8
    assert tuned["perplexity"] == min(t["perplexity"] for t in tuned["trials"])
    if how[0] == "linear":  # what TIES makes of a part at weight 1 is not that part
        assert tuned["perplexity"] <= min(tuned["base"], *tuned["alone"].values())
    assert [p["weight"] for p in record["parts"]] == list(tuned["weights"].values())
    assert [task["part"] for task in record["measured"]] == ["run", "other"]
    for task in record["measured"]:
        scores = task["metrics"]["perplexity"]
        change = scores["composed"]["value"] - scores["part"]["value"]
        assert scores["difference"]["value"] == pytest.approx(change, rel=1e-6)
    own = record["measured"][0]["metrics"]["perplexity"]
    assert own["part"]["value"] == pytest.approx(tuned["alone"]["run"], rel=1e-5)
    assert own["base"]["value"] == pytest.approx(tuned["base"], rel=1e-5)


def test_the_tables(run_directory, second, data, tmp_path, capsys):
    first = run_directory / "adapter"
    words = ["compose", f"{first}=1", f"{second}=-0.5", "-o", str(tmp_path / "made")]
    more = ["--how", "ties", "--density", "0.4", "-r", "3", "--measure", str(data), str(data)]
    assert main([*words, *more]) == 0
    shown = capsys.readouterr().out
    for text in ("interference, predicted", "largest errors", "composed - part", "ties, density"):
        assert text in shown
    assert main([*words[:-1], str(tmp_path / "exact")]) == 0
    assert "nothing: it is exact" in capsys.readouterr().out


def _another(base, path):
    """A base of the same layout that was trained to something else, without a tokenizer."""
    model, _ = lk.load_model(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model.save_pretrained(path)
    for file in base.glob("*token*"):
        shutil.copy(file, path)
    return path


REFUSED = {
    "weight": (["{first}=much", "{second}"], "a weight must be a number"),
    "way": (["{first}", "{second}", "--how", "tie"], "did you mean 'ties'"),
    "files": (["{first}", "{second}", "--measure", "{data}"], "one data file per part"),
    "trials": (["{first}", "{second}", "--tune", "{data}", "--max-trials", "3"], "at least 4"),
    "slerp": (
        ["{first}=.5", "{second}=.5", "--how", "slerp", "--tune", "{data}"],
        "slerp has one number",
    ),
    "batch": (["{first}", "{second}", "--tune", "{data}", "--batch-size", "0"], "at least 1"),
    "base": (["{first}", "{second}", "--tune", "{data}", "--base", "{other}"], "another base"),
    "nothing": (["{first}=0", "{second}=0"], "nothing is left to compose"),
    "missing": (["{first}", "{nowhere}"], "there is no adapter here"),
    "prefix": (["{first}", "{prefix}"], "only low-rank adapters can be composed"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_write_nothing(case, base, run_directory, second, data, tmp_path, capsys):
    words, reason = REFUSED[case]
    prefix = tmp_path / "prefix"
    prefix.mkdir()
    document = {"format": 1, "method": "prefix_layer", "options": {}}
    (prefix / "lorakit.json").write_text(json.dumps(document))
    known = {
        "first": run_directory / "adapter",
        "second": second,
        "data": data,
        "nowhere": tmp_path / "nowhere",
        "other": _another(base, tmp_path / "other") if "{other}" in words else None,
        "prefix": prefix,
    }
    filled = [word.format(**known) for word in words]
    assert main(["compose", *filled, "-o", str(tmp_path / "made")]) == 2
    assert reason in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "made").exists()


def _forget_base(adapter):
    file = adapter / "adapter_config.json"
    config = {**json.loads(file.read_text()), "base_model_name_or_path": str(adapter / "gone")}
    file.write_text(json.dumps(config))


def test_what_needs_no_base_does_not_ask_for_it(base, tmp_path, answer):
    """A DoRA adapter alone, and heads whose weights sum to 1: the base that they name is gone."""
    model, _ = lk.load_model(base)
    attach_learned(model, lk.LoraSpec(r=3, alpha=5.0, targets="qv", update="dora"), size=0.05)
    lk.save_adapter(model, tmp_path / "dora")
    _forget_base(tmp_path / "dora")
    code, record = answer("compose", tmp_path / "dora", "-o", tmp_path / "same")
    assert code == 0
    assert record["predicted"] == []
    parts = []
    for seed in (1, 2):
        model, _ = lk.load_model(base)
        spec = lk.LoraSpec(r=3, alpha=5.0, targets="qv", also_train=("norm",))
        attach_learned(model, spec, seed=seed, size=0.05)
        lk.save_adapter(model, tmp_path / f"part{seed}")
        _forget_base(tmp_path / f"part{seed}")
        parts.append(lk.Adapter.load(tmp_path / f"part{seed}"))
    words = [f"{tmp_path / 'part1'}=0.25", f"{tmp_path / 'part2'}=0.75"]
    code, record = answer("compose", *words, "-o", tmp_path / "made")
    assert code == 0
    for name, value in lk.Adapter.load(tmp_path / "made").overrides.items():
        wanted = 0.25 * parts[0].overrides[name] + 0.75 * parts[1].overrides[name]
        torch.testing.assert_close(value, wanted)
    code, record = answer("compose", words[0], "-o", tmp_path / "half")
    assert code == 2, "its difference from the base counts, and the base is not there"


def test_the_output_must_be_free(run_directory, second, capsys):
    assert main(["compose", str(second), "-o", str(run_directory)]) == 2
    assert "not empty" in capsys.readouterr().err
