"""What single options of the verbs do, on the tiny model of the conftest."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from lorakit.cli.main import build_parser, main
from lorakit.errors import RequestError
from lorakit.train.share import trained_share


def test_build_parser_reads_a_command_line_of_the_verb():
    args = build_parser("eval").parse_intermixed_args(["rows.jsonl", "--limit", "3", "--json"])
    assert (args.data, args.limit, args.json) == ("rows.jsonl", 3, True)
    with pytest.raises(RequestError, match="there is no verb 'evl'"):
        build_parser("evl")


@pytest.mark.parametrize(
    "words",
    [["inspect", "x", "--top", "-1"], ["doctor", "--examples", "-1"], ["doctor", "--max-tokens=a"]],
)
def test_a_count_is_a_whole_number_from_zero_on(words, capsys):
    assert main(words) == 2
    assert "whole number from 0 on" in capsys.readouterr().err


def test_plan_takes_patterns_and_counts_every_site_with_its_own_rank(answer, base, capsys):
    words = ["plan", base, "--length", 24, "--r", 4, "--targets", "q_proj,down_proj", "--alpha", 12]
    plain = answer(*words)[1]
    words += ["--rank-pattern", "down_proj=2", "--alpha-pattern", "down_proj=10"]
    code, result = answer(*words, "--init", "kaiming")
    assert code == 0
    assert result["spec"]["init"] == "kaiming"
    ranks = {site["site"].rpartition(".")[2]: site["r"] for site in result["sites"]}
    assert ranks == {"q_proj": 4, "down_proj": 2}
    scaling = {site["site"].rpartition(".")[2]: site["scaling"] for site in result["sites"]}
    assert scaling == {"q_proj": 3.0, "down_proj": 5.0}
    # down_proj is (out 32, in 48) in both layers: the rank falls by 2.
    assert plain["trainable_params"] - result["trainable_params"] == 2 * 2 * (32 + 48)
    assert main(["plan", *map(str, words[1:])]) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if "down_proj" in x)
    assert line.split()[-1] == str(2 * 2 * (32 + 48))


@pytest.mark.parametrize("text", ["down_proj", "=4", "down_proj=big"])
def test_plan_refuses_a_pattern_that_is_not_name_and_number(answer, base, text):
    code, result = answer("plan", base, "--rank-pattern", text)
    assert (code, result["error"]["type"]) == (2, "RequestError")
    assert "NAME=NUMBER" in result["error"]["expected"]


def test_plan_takes_modules_trained_whole_and_an_expression_with_a_comma(answer, base, capsys):
    words = [
        "plan",
        base,
        "--length",
        24,
        "--targets",
        r"layers\.\d{1,2}\.self_attn\.q_proj,v_proj",
    ]
    words += ["--targets", "down_proj", "--also-train", "lm_head"]
    code, result = answer(*words)
    assert code == 0
    kinds = {site["site"].rpartition(".")[2] for site in result["sites"]}
    assert kinds == {"q_proj", "v_proj", "down_proj"}
    assert result["trained_beside"] == ["lm_head"]
    assert main([*map(str, words)]) == 0
    assert "lm_head, trained whole" in capsys.readouterr().out


def test_the_trained_share_is_of_the_model_with_its_adapter_everywhere(
    answer, base, data, run_directory, capsys
):
    plan = answer("plan", base, "--r", 4, "--targets", "all-linear")[1]
    share = plan["trainable_params"] / (plan["base_params"] + plan["trainable_params"])
    assert (
        plan["trainable_share"]
        == share
        == trained_share(plan["trainable_params"], plan["base_params"])
    )
    record = json.loads((run_directory / "run.json").read_text())
    assert record["adapter"]["trainable_share"] == pytest.approx(share)
    words = ["--model", base, "--data", data, "r=4", "targets=all-linear"]
    assert answer("doctor", *words)[1]["adapter"]["trainable_share"] == share
    written = f"{100 * share:.1f} %"
    assert main(["plan", str(base), "--r", "4", "--targets", "all-linear"]) == 0
    assert main(["doctor", *map(str, words)]) == 0
    assert capsys.readouterr().out.count(f"({written} of all)") == 2


def test_inspect_shows_a_short_passport_and_all_of_it_as_json(answer, run_directory, data, capsys):
    adapter = run_directory / "adapter"
    whole = answer("inspect", adapter)[1]["passport"]
    assert whole["config"]["train"]["lr"] == 0.01
    assert main(["inspect", str(adapter), "--top", "0"]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) < 35
    assert re.search(rf"base +\S.*sha256 {whole['base']['sha256'][:12]}\.\.\.", out)
    assert "LlamaForCausalLM" in out
    assert "16 rows" in out
    assert whole["data"]["train"]["sha256"][:12] in out.replace("\n", "")
    assert f"torch {whole['versions']['torch']}" in out
    assert re.search(r"seed +42", out)
    assert re.search(r"metrics +step 4, train loss \d", out)
    assert "adam_betas" not in out


@pytest.fixture
def other_columns(tmp_path):
    path = tmp_path / "other.jsonl"
    rows = [{"question": f"{a}+1", "answer": str(a + 1)} for a in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def trained_otherwise(run_directory, tmp_path):
    """An adapter whose passport says it was trained with other columns and a system turn."""
    path = tmp_path / "adapter"
    shutil.copytree(run_directory / "adapter", path)
    file = path / "lorakit.json"
    passport = json.loads(file.read_text())
    passport["config"]["data"] |= {
        "columns": {"prompt": "question", "completion": "answer"},
        "system": "Add.",
        "template": "chat",
    }
    file.write_text(json.dumps(passport))
    return path


def test_eval_reads_rows_as_the_adapter_was_trained(
    answer, trained_otherwise, other_columns, capsys
):
    words = ["eval", other_columns, "--adapter", trained_otherwise, "--metrics", "exact_match"]
    words += ["--max-new-tokens", 3]
    code, result = answer(*words)
    assert code == 0
    assert result["settings"]["system"] == "Add."
    assert all(output["prompt"].startswith("Add.") for output in result["outputs"])
    code, result = answer(*words, "--system", "", "--template", "none")
    assert code == 0
    assert result["settings"]["columns"]["prompt"] == "question"
    assert [output["prompt"] for output in result["outputs"]] == ["0+1", "1+1", "2+1", "3+1"]
    assert main([*map(str, words)]) == 0
    said = capsys.readouterr().err.replace("\n", " ")
    assert "as the adapter was trained" in said
    assert "system 'Add.'" in said


def test_eval_groups_and_normalises(answer, base, tmp_path):
    rows = [
        {"prompt": "a", "completion": "b", "choices": ["b", "ccc"]},
        {"prompt": "a", "completion": "ccc", "choices": ["b", "ccc"]},
    ]
    path = tmp_path / "choices.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["eval", path, "--model", base, "--max-new-tokens", 2, "--metrics"]
    assert len(answer(*words, "exact_match")[1]["outputs"]) == 2
    grouped = answer(*words, "exact_match", "--group-by-prompt")[1]["outputs"]
    assert [output["references"] for output in grouped] == [["b", "ccc"]]
    code, result = answer(*words, "choice", "--choice-normalisation", "tokens")
    assert code == 0
    assert result["systems"]["base"]["scores"]["choice"]["value"] == 0.5
    code, result = answer(*words, "choice", "--choice-normalisation", "words")
    assert (code, result["error"]["type"]) == (2, "RequestError")


def test_generate_reads_the_columns_of_a_file(answer, base, other_columns, tmp_path):
    words = ["generate", "--model", base, "--max-new-tokens", 2, "--file"]
    code, result = answer(*words, other_columns, "--column", "prompt=question")
    assert code == 0
    assert len(result["answers"]) == 4
    assert answer(*words, other_columns)[0] == 2
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(other_columns, folder / "train.jsonl")
    (folder / "test.jsonl").write_text('{"prompt": "x", "completion": "y"}\n')
    assert len(answer(*words, folder, "--split", "test")[1]["answers"]) == 1
    code, result = answer("generate", "hi", "--model", base, "--compare")
    assert (code, result["error"]["type"]) == (2, "RequestError")
    code, result = answer("generate", "hi", "--model", base, "--split", "test")
    assert (code, result["error"]["type"]) == (2, "RequestError")


def test_generate_asks_as_the_adapter_was_trained(answer, trained_otherwise, other_columns, capsys):
    words = ["generate", "--file", str(other_columns), "--adapter", str(trained_otherwise)]
    words += ["--max-new-tokens", "2"]
    code, result = answer(*words)
    assert code == 0
    assert [each["question"] for each in result["answers"]] == ["0+1", "1+1", "2+1", "3+1"]
    assert all(each["prompt"].startswith("Add.") for each in result["answers"])
    assert main([*words, "--compare"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("0+1")
    for system in ("base", "adapter"):
        assert f"answering, {system}:" in err
