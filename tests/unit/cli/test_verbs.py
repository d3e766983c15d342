"""The verbs on a tiny model that is saved, trained and read back for real."""

from __future__ import annotations

import io
import json
import string

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lorakit.cli.main import main

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A tiny Llama with one token per character and a chat template."""
    path = tmp_path_factory.mktemp("models") / "tiny-base"
    specials = ["<pad>", "<s>", "</s>", "<user>", "<assistant>", "<system>"]
    letters = string.ascii_letters + string.digits + string.punctuation + " \n"
    vocab = {token: index for index, token in enumerate([*specials, *letters])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=specials[3:],
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    config = LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [{"prompt": f"{a}+{b}", "completion": str(a + b)} for a in range(4) for b in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def run_directory(base, data, tmp_path_factory):
    """What `lorakit train` leaves."""
    folder = tmp_path_factory.mktemp("runs")
    config = folder / "config.yaml"
    config.write_text(
        f"model: {{ref: {base}}}\ndata: {{train: {data}}}\noutput: {folder / 'run'}\n"
    )
    words = ["lora.r=4", "lora.targets=all-linear", "train.epochs=1", "train.batch_size=4"]
    assert main(["train", str(config), *words, "train.lr=0.01"]) == 0
    return folder / "run"


def answer(capsys, *words):
    """Run a verb with --json; returns its exit code and its result."""
    code = main([*map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_train_leaves_an_adapter_and_a_record(run_directory):
    record = json.loads((run_directory / "run.json").read_text())
    assert record["adapter"]["trainable_params"] > 0
    assert (run_directory / "adapter" / "adapter_model.safetensors").is_file()


def test_train_without_a_config_or_with_an_unknown_key_is_refused(capsys, run_directory):
    code, result = answer(capsys, "train")
    assert (code, result["error"]["type"]) == (2, "RequestError")
    code, result = answer(capsys, "train", run_directory / "config.yaml", "train.lrr=1")
    assert (code, result["error"]["type"]) == (2, "ConfigError")


def test_train_lists_its_fields(capsys):
    code, fields = answer(capsys, "train", "--fields")
    assert code == 0
    named = {field["name"]: field for field in fields}
    assert named["model.ref"]["required"] is True
    assert named["lora.r"]["default"] == 8
    assert all(field["help"] for field in fields)


def test_plan_counts_what_training_counted(capsys, base, run_directory):
    words = ["--r", "4", "--targets", "all-linear"]
    code, result = answer(capsys, "plan", base, *words)
    assert code == 0
    record = json.loads((run_directory / "run.json").read_text())
    assert result["trainable_params"] == record["adapter"]["trainable_params"]
    assert result["trainable_params"] == sum(site["num_params"] for site in result["sites"])
    assert main(["plan", str(base), *words]) == 0
    out = capsys.readouterr().out
    assert "self_attn.q_proj" in out
    assert f"{result['trainable_params']:,}" in out


def test_plan_refuses_a_target_that_matches_nothing(capsys, base):
    code, result = answer(capsys, "plan", base, "--targets", "q_proj,no_such_layer")
    assert (code, result["error"]["type"]) == (2, "TargetError")
    assert "no_such_layer" in json.dumps(result)


def test_inspect_shows_spec_spectra_and_passport(capsys, run_directory):
    adapter = run_directory / "adapter"
    code, result = answer(capsys, "inspect", adapter)
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


def test_inspect_refuses_what_is_no_adapter(capsys, base):
    code, result = answer(capsys, "inspect", base)
    assert (code, result["error"]["type"]) == (2, "AdapterFileError")


def test_generate_answers_with_the_adapter_and_with_both(capsys, base, run_directory):
    adapter = ["--adapter", run_directory / "adapter"]
    code, result = answer(capsys, "generate", "1+2", *adapter, "--compare", "--max-new-tokens", 5)
    assert code == 0
    assert result["model"] == str(base)
    assert set(result["answers"][0]) == {"origin", "base", "adapter"}
    code, only = answer(capsys, "generate", "1+2", *adapter, "--max-new-tokens", 5)
    assert set(only["answers"][0]) == {"origin", "adapter"}
    assert only["answers"][0]["adapter"] == result["answers"][0]["adapter"]


def test_generate_answers_a_file(capsys, base, data):
    words = ["--model", base, "--file", data, "--limit", "3", "--max-new-tokens", "4"]
    code, result = answer(capsys, "generate", *words)
    assert code == 0
    assert [found["origin"].rsplit(" ", 1)[1] for found in result["answers"]] == ["1", "2", "3"]


@pytest.mark.parametrize(
    "words", [["generate"], ["generate", "hi"], ["generate", "hi", "--file", "x.jsonl"]]
)
def test_generate_needs_one_prompt_and_a_model(capsys, words):
    code, result = answer(capsys, *words)
    assert (code, result["error"]["type"]) == (2, "RequestError")


def test_eval_compares_base_and_adapter(capsys, data, run_directory, tmp_path):
    record_file = tmp_path / "eval.json"
    words = ["--adapter", run_directory / "adapter", "--metrics", "perplexity,exact_match"]
    words += ["--max-new-tokens", 4, "-o", record_file]
    code, result = answer(capsys, "eval", data, *words)
    assert code == 0
    scores = {name: system["scores"] for name, system in result["systems"].items()}
    # One epoch on this very data: the adapter must find it more likely than a random base does.
    assert scores["adapter"]["perplexity"]["value"] < scores["base"]["perplexity"]["value"]
    assert result["differences"]["adapter"]["perplexity"]["p_value"] < 0.05
    assert len(json.loads(record_file.read_text())["outputs"]) == 16
    assert main(["eval", str(data), *map(str, words[:4]), "--max-new-tokens", "4"]) == 0
    assert "perplexity" in capsys.readouterr().out


@pytest.mark.parametrize("column", ["prompt", "=x", "nobody=prompt"])
def test_eval_refuses_a_wrong_column(capsys, base, data, column):
    code, result = answer(capsys, "eval", data, "--model", base, "--column", column)
    assert code == 2
    assert result["error"]["type"] in ("RequestError", "ConfigError")


def test_report_of_a_training_run_and_of_an_evaluation(capsys, run_directory, data, tmp_path):
    adapter = ["--adapter", run_directory / "adapter"]
    words = ["--max-new-tokens", 4, "-o", run_directory / "eval.json"]
    assert answer(capsys, "eval", data, *adapter, *words)[0] == 0
    code, result = answer(capsys, "report", run_directory, "-o", tmp_path / "report.html")
    assert code == 0
    assert {"tiles", "curve", "comparison", "samples", "details"} <= set(result["sections"])
    html = (tmp_path / "report.html").read_text()
    assert "Before and after" in html
    assert "trained parameters" in html


def test_merge_writes_a_model_that_answers_as_the_adapter_did(capsys, run_directory, tmp_path):
    adapter, output = run_directory / "adapter", tmp_path / "merged"
    code, result = answer(capsys, "merge", adapter, "-o", output)
    assert code == 0
    assert result["max_abs_logit_error"] <= result["tolerance"]
    asked = ["generate", "1+2", "--max-new-tokens", 5]
    live = answer(capsys, *asked, "--adapter", adapter)[1]["answers"][0]["adapter"]
    merged = answer(capsys, *asked, "--model", output)[1]["answers"][0]["base"]
    assert merged == live
    code, result = answer(capsys, "merge", adapter, "-o", output)
    assert (code, result["error"]["type"]) == (2, "OutputError")


def test_chat_answers_each_line_and_switches(capsys, monkeypatch, run_directory):
    lines = "hello\n/base\nagain\n/both\nmore\n/reset\n/quit\nnever read\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    words = ["--adapter", run_directory / "adapter", "--max-new-tokens", 4]
    code, result = answer(capsys, "chat", *words)
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
