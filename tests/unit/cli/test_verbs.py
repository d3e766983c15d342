"""The verbs on a tiny model that is saved, trained and read back for real."""

from __future__ import annotations

import io
import json
import shutil

import pytest
from transformers import AutoTokenizer

from lorakit.cli.main import main
from lorakit.data.render import Renderer


def test_train_leaves_an_adapter_and_a_record(run_directory):
    record = json.loads((run_directory / "run.json").read_text())
    assert record["adapter"]["trainable_params"] > 0
    assert (run_directory / "adapter" / "adapter_model.safetensors").is_file()


def test_train_without_a_config_or_with_an_unknown_key_is_refused(answer, run_directory):
    code, result = answer("train")
    assert (code, result["error"]["type"]) == (2, "RequestError")
    code, result = answer("train", run_directory / "config.yaml", "train.lrr=1")
    assert (code, result["error"]["type"]) == (2, "ConfigError")


def test_train_lists_its_fields(answer):
    code, fields = answer("train", "--fields")
    assert code == 0
    named = {field["name"]: field for field in fields}
    assert named["model.ref"]["required"] is True
    assert named["lora.r"]["default"] == 8
    assert all(field["help"] for field in fields)


def test_plan_counts_what_training_counted(capsys, answer, base, run_directory):
    words = ["--r", "4", "--targets", "all-linear"]
    code, result = answer("plan", base, *words)
    assert code == 0
    record = json.loads((run_directory / "run.json").read_text())
    assert result["trainable_params"] == record["adapter"]["trainable_params"]
    assert result["trainable_params"] == sum(site["num_params"] for site in result["sites"])
    assert main(["plan", str(base), *words]) == 0
    out = capsys.readouterr().out
    assert "self_attn.q_proj" in out
    assert f"{result['trainable_params']:,}" in out


def test_plan_refuses_a_target_that_matches_nothing(answer, base):
    code, result = answer("plan", base, "--targets", "q_proj,no_such_layer")
    assert (code, result["error"]["type"]) == (2, "TargetError")
    assert "no_such_layer" in json.dumps(result)


def test_inspect_shows_spec_spectra_and_passport(capsys, answer, run_directory):
    adapter = run_directory / "adapter"
    code, result = answer("inspect", adapter)
    assert code == 0
    assert result["spec"]["r"] == 4
    assert len(result["sites"]) == 14
    for site in result["sites"]:
        assert len(site["singular_values"]) == 4
        assert 0 < site["effective_rank"] <= 4
        squares = sum(value**2 for value in site["singular_values"])
        assert site["norm"] == pytest.approx(squares**0.5)
    assert result["passport"]["seed"] == 42
    assert main(["inspect", str(adapter), "--sort", "norm", "--top", "2"]) == 0
    out = capsys.readouterr().out
    strongest = max(result["sites"], key=lambda site: site["norm"])
    assert strongest["site"] in out


def test_inspect_refuses_what_is_no_adapter(answer, base):
    code, result = answer("inspect", base)
    assert (code, result["error"]["type"]) == (2, "AdapterFileError")


def test_generate_answers_with_the_adapter_and_with_both(answer, base, run_directory):
    adapter = ["--adapter", run_directory / "adapter"]
    code, result = answer("generate", "1+2", *adapter, "--compare", "--max-new-tokens", 5)
    assert code == 0
    assert result["model"] == str(base)
    assert set(result["answers"][0]) == {"origin", "question", "prompt", "base", "adapter"}
    code, only = answer("generate", "1+2", *adapter, "--max-new-tokens", 5)
    assert set(only["answers"][0]) == {"origin", "question", "prompt", "adapter"}
    assert only["answers"][0]["adapter"] == result["answers"][0]["adapter"]


def test_generate_answers_a_file(answer, base, data):
    words = ["--model", base, "--file", data, "--limit", "3", "--max-new-tokens", "4"]
    code, result = answer("generate", *words)
    assert code == 0
    assert [found["origin"].rsplit(" ", 1)[1] for found in result["answers"]] == ["1", "2", "3"]


def test_generate_shows_questions_without_the_template(capsys, base, run_directory, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "1+2", "completion": "3"}\n')
    words = ["--adapter", str(run_directory / "adapter"), "--max-new-tokens", "3"]
    words += ["--system", "Add."]
    assert main(["generate", "--file", str(rows), *words]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "1+2"
    assert main(["generate", "1+2", *words, "--compare"]) == 0
    assert capsys.readouterr().out.startswith("base: ")


@pytest.mark.parametrize(
    "words", [["generate"], ["generate", "hi"], ["generate", "hi", "--file", "x.jsonl"]]
)
def test_generate_needs_one_prompt_and_a_model(answer, words):
    code, result = answer(*words)
    assert (code, result["error"]["type"]) == (2, "RequestError")


def test_eval_compares_base_and_adapter(capsys, answer, data, run_directory, tmp_path):
    record_file = tmp_path / "eval.json"
    words = ["--adapter", run_directory / "adapter", "--metrics", "perplexity,exact_match"]
    words += ["--max-new-tokens", 4, "-o", record_file]
    code, result = answer("eval", data, *words)
    assert code == 0
    scores = {name: system["scores"] for name, system in result["systems"].items()}
    # One epoch on this very data: the adapter must find it more likely than a random base does.
    assert scores["adapter"]["perplexity"]["value"] < scores["base"]["perplexity"]["value"]
    assert result["differences"]["adapter"]["perplexity"]["p_value"] < 0.05
    assert len(json.loads(record_file.read_text())["outputs"]) == 16
    assert main(["eval", str(data), *map(str, words[:4]), "--max-new-tokens", "4"]) == 0
    assert "perplexity" in capsys.readouterr().out


@pytest.mark.parametrize("column", ["prompt", "=x", "nobody=prompt"])
def test_eval_refuses_a_wrong_column(answer, base, data, column):
    code, result = answer("eval", data, "--model", base, "--column", column)
    assert code == 2
    assert result["error"]["type"] in ("RequestError", "ConfigError")


def test_report_of_a_training_run_and_of_an_evaluation(answer, run_directory, data, tmp_path):
    adapter = ["--adapter", run_directory / "adapter"]
    words = ["--max-new-tokens", 4, "-o", run_directory / "eval.json"]
    assert answer("eval", data, *adapter, *words)[0] == 0
    code, result = answer("report", run_directory, "-o", tmp_path / "report.html")
    assert code == 0
    assert {"tiles", "curve", "comparison", "samples", "details"} <= set(result["sections"])
    html = (tmp_path / "report.html").read_text()
    assert "Before and after" in html
    assert "trained parameters" in html


def test_merge_writes_a_model_that_answers_as_the_adapter_did(answer, run_directory, tmp_path):
    adapter, output = run_directory / "adapter", tmp_path / "merged"
    code, result = answer("merge", adapter, "-o", output)
    assert code == 0
    assert result["max_abs_logit_error"] <= result["tolerance"]
    asked = ["generate", "1+2", "--max-new-tokens", 5]
    live = answer(*asked, "--adapter", adapter)[1]["answers"][0]["adapter"]
    merged = answer(*asked, "--model", output)[1]["answers"][0]["base"]
    assert merged == live
    code, result = answer("merge", adapter, "-o", output)
    assert (code, result["error"]["type"]) == (2, "OutputError")


def test_chat_answers_each_line_and_switches(answer, monkeypatch, run_directory):
    lines = "hello\n/base\nagain\n/both\nmore\n/reset\n/quit\nnever read\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    words = ["--adapter", run_directory / "adapter", "--max-new-tokens", 4]
    code, result = answer("chat", *words)
    assert code == 0
    spoken = [(turn["role"], turn.get("system")) for turn in result["turns"]]
    assert spoken == [
        ("user", None),
        ("assistant", "adapter"),
        ("user", None),
        ("assistant", "base"),
        ("user", None),
        ("assistant", "base"),
        ("assistant", "adapter"),
    ]


def test_a_chat_is_rendered_as_the_adapter_was_trained(
    answer, monkeypatch, run_directory, tmp_path
):
    adapter = tmp_path / "adapter"
    shutil.copytree(run_directory / "adapter", adapter)
    passport = json.loads((adapter / "lorakit.json").read_text())
    passport["config"]["data"]["system"] = "be brief"
    (adapter / "lorakit.json").write_text(json.dumps(passport))
    seen = []
    render = Renderer.prompt
    monkeypatch.setattr(
        Renderer, "prompt", lambda self, *args: seen.append(render(self, *args)) or seen[-1]
    )
    for words in ([], ["--system", ""]):
        monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
        assert answer("chat", "--adapter", adapter, "--max-new-tokens", 2, *words)[0] == 0
    assert ["be brief" in text for text in seen] == [True, False]


def test_a_template_that_refuses_a_turn_of_the_chat_says_so(answer, monkeypatch, base, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(base, model)
    refusing = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    )
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = refusing + tokenizer.chat_template
    tokenizer.save_pretrained(model)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    code, result = answer("chat", "--model", model, "--system", "be brief")
    assert (code, result["error"]["what"]) == (2, "the chat template refuses this row")


def test_analyze_measures_a_run_and_compares_it_with_its_adapter(
    capsys, answer, run_directory, tmp_path
):
    code, found = answer("analyze", str(run_directory), "-o", str(tmp_path / "out"))
    assert code == 0
    assert found["measures"] == ["spectra", "amplification", "intruders", "norms"]
    assert len(found["sites"]) == 14
    assert found["files"] == [
        "analysis.json",
        "norms.csv",
        "report.html",
        "singular_values.csv",
        "sites.csv",
    ]
    last = [row for row in found["norms"]["run"] if row["step"] == 4]
    assert {row["site"]: row["norm"] for row in last} == {
        site["site"]: site["spectrum"]["norm"] for site in found["sites"]
    }
    words = ["analyze", str(run_directory), str(run_directory / "adapter"), "--sites", "q_proj"]
    assert main([*words, "--without-base", "--top", "1"]) == 0
    shown = capsys.readouterr().out
    assert "layers.0.self_attn.q_proj" in shown
    assert "layers.1" not in shown


def test_analyze_refuses_what_it_cannot_measure(answer, base, run_directory, tmp_path):
    adapter = str(run_directory / "adapter")
    assert answer("analyze", adapter, "--measures", "spectrum")[0] == 2
    assert answer("analyze", adapter, "--without-base", "--measures", "intruders")[0] == 2
    assert answer("analyze", adapter, "--sites", "c_attn")[0] == 2
    assert answer("analyze", str(base))[0] == 2
    assert answer("analyze", adapter, adapter, adapter, "--without-base")[0] == 2
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("")
    code, found = answer("analyze", adapter, "-o", str(tmp_path / "out"))
    assert code == 2
    assert "not empty" in found["error"]["what"]


def test_plan_spends_a_budget(answer, base):
    words = ["plan", str(base), "--targets", "all-linear"]
    _, fixed = answer(*words, "--r", "5")
    code, found = answer(*words, "--r", "auto", "--budget", str(fixed["trainable_params"]))
    assert code == 0
    assert {site["r"] for site in found["sites"]} == {5}
    assert answer(*words, "--r", "auto")[0] == 2
    assert answer(*words, "--r", "5", "--budget", "100k")[0] == 2


def test_prune_writes_a_smaller_adapter_and_measures_it(
    capsys, answer, data, run_directory, tmp_path
):
    words = ["prune", str(run_directory / "adapter"), "--energy", "0.9"]
    code, found = answer(*words, "-o", str(tmp_path / "small"), "--data", str(data))
    assert code == 0
    assert found["num_params"]["after"] < found["num_params"]["before"]
    scores = {name: s["scores"]["perplexity"] for name, s in found["measured"]["systems"].items()}
    assert set(scores) == {"adapter", "pruned", "base"}
    assert scores["pruned"]["value"] != scores["adapter"]["value"]
    _, again = answer(
        "eval", str(data), "--adapter", str(tmp_path / "small"), "--metrics", "perplexity"
    )
    measured = again["systems"]["adapter"]["scores"]["perplexity"]["value"]
    assert measured == pytest.approx(scores["pruned"]["value"], rel=1e-5)
    assert main([*words, "-o", str(tmp_path / "again")]) == 0
    assert "error of the update" in capsys.readouterr().out


def test_prune_refuses_and_writes_nothing(answer, base, run_directory, tmp_path):
    adapter, out = str(run_directory / "adapter"), str(tmp_path / "out")
    assert answer("prune", adapter, "-o", out)[0] == 2
    assert answer("prune", adapter, "-o", out, "--budget", "10")[0] == 2
    assert answer("prune", adapter, "-o", out, "--budget", "1k", "--energy", "0.5")[0] == 2
    assert answer("prune", str(base), "-o", out, "--energy", "0.5")[0] == 2
    assert answer("prune", adapter, "-o", adapter, "--energy", "0.5")[0] == 2
    assert not (tmp_path / "out").exists()


def test_eval_says_what_was_learned_and_what_was_forgotten(
    capsys, answer, base, data, run_directory, tmp_path
):
    text = tmp_path / "general.jsonl"
    rows = [{"text": f"The number {n} is not a sum here."} for n in range(6)]
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tmp_path / "full.yaml"
    config.write_text(
        f"model: {{ref: {base}}}\ndata: {{train: {data}}}\noutput: {tmp_path / 'full'}\n"
    )
    words = ["method=full", "train.epochs=1", "train.batch_size=4", "train.lr=0.01"]
    assert main(["train", str(config), *words]) == 0
    capsys.readouterr()
    adapter = str(run_directory / "adapter")
    words = ["eval", str(data), "--adapter", adapter, "--metrics", "perplexity,exact_match"]
    words += ["--beside", f"full={tmp_path / 'full' / 'adapter'}", "--max-new-tokens", "4"]
    code, found = answer(*words, "--held-out", f"general={text}", "-o", str(tmp_path / "eval.json"))
    assert code == 0
    assert list(found["systems"]) == ["base", "adapter", "full"]
    names = ["task perplexity", "task exact match", "general perplexity"]
    for system in found["systems"].values():
        assert list(system["scores"]) == names
        low, high = system["scores"]["general perplexity"]["interval"]
        assert low < system["scores"]["general perplexity"]["value"] < high
    for label in ("adapter", "full"):
        change = found["differences"][label]["general perplexity"]["value"]
        value, plain = (
            found["systems"][name]["scores"]["general perplexity"]["value"]
            for name in (label, "base")
        )
        assert change == pytest.approx(value - plain)
    # The task alone gives what eval without these flags gives.
    _, alone = answer("eval", str(data), "--adapter", adapter, "--metrics", "perplexity")
    assert found["systems"]["adapter"]["scores"]["task perplexity"]["value"] == pytest.approx(
        alone["systems"]["adapter"]["scores"]["perplexity"]["value"]
    )
    code, report = answer("report", str(tmp_path), "-o", str(tmp_path / "report.html"))
    assert code == 0
    assert "comparison" in report["sections"]


def test_eval_refuses_a_comparison_that_has_no_sense(answer, data, run_directory):
    words = ["eval", str(data), "--adapter", str(run_directory / "adapter")]
    assert answer(*words, "--held-out", str(data))[0] == 2
    assert answer(*words, "--held-out", f"task={data}")[0] == 2
    assert answer(*words, "--beside", f"base={run_directory / 'adapter'}")[0] == 2
    assert answer(*words, "--beside", f"adapter={run_directory / 'adapter'}")[0] == 2
    assert answer("eval", str(data), "--model", "x", "--held-out", f"a={data}")[0] == 2
