"""`lorakit doctor`, on a tiny model written to disk with a real tokenizer."""

import json
import warnings

import pytest
from tokenizers_for_tests import CHATML, NO_END, make_tokenizer

import tiny_models
from lorakit.cli import main
from lorakit.cli.doctor import plan_finding
from lorakit.errors import LorakitWarning
from lorakit.methods.registry import build_method

ROWS = [
    {"prompt": f"What is the capital of France {i}?", "completion": f"Paris {i}."} for i in range(6)
]


@pytest.fixture
def base(tmp_path, tiny):
    directory = tmp_path / "base"
    write_base(directory, tiny("llama"), CHATML)
    return directory


def write_base(directory, model, template):
    tokenizer = make_tokenizer(template, eos="<|im_end|>", pad="<|im_end|>")
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_one_screen_from_a_model_and_data(base, data, capsys):
    code = main.main(["doctor", "--model", str(base), "--data", str(data), "--examples", "1"])
    out = capsys.readouterr().out
    assert code == 0
    assert "[[Paris 0.<|im_end|>]]" in out
    assert "Paris 1." not in out
    assert "rows.jsonl line 1" in out
    assert "the end of every answer is learned (<|im_end|>)" in out
    assert "pad and EOS are the same token" in out
    assert "lora trains" in out


def test_json_of_a_config_with_overrides(base, data, tmp_path, capsys):
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(json.dumps(ROWS[3]) + "\n" + json.dumps(ROWS[0] | {"prompt": "x"}) + "\n")
    config = tmp_path / "config.yaml"
    config.write_text(
        f"model: {base}\ndata: {{train: {data}, validation: {held_out}}}\n"
        f"output: {tmp_path / 'run'}\nlora: {{r: 2, alpha: 8, targets: qv}}\n"
    )
    words = ["doctor", str(config), "lora.r=3", "data.max_length=30", "--json"]
    assert main.main(words) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["report"]["num_examples"] == 6
    assert record["examples"][0]["learned"] == "Paris 0.<|im_end|>"
    assert record["adapter"]["num_sites"] == len(record["adapter"]["sites"]) > 0
    assert record["adapter"]["num_params"] % 3 == 0
    texts = [finding["text"] for finding in record["findings"]]
    assert any("1 of 2 validation rows are also training rows" in text for text in texts)
    assert not (tmp_path / "run").exists()


def test_a_template_without_end_marker_is_found(base, data, capsys):
    make_tokenizer(NO_END).save_pretrained(base)
    (base / "chat_template.jinja").write_text(NO_END)
    assert main.main(["doctor", "--model", str(base), "--data", str(data), "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert any(f["level"] == "warning" and "no end marker" in f["text"] for f in findings)


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ([], "one config is needed"),
        (["a.yaml", "b.yaml"], "one config is needed"),
        (["--model", "x"], "one config is needed"),
        (["a.yaml", "--model", "x", "--data", "y"], "one config is needed"),
    ],
)
def test_wrong_command_lines(words, what, capsys):
    assert main.main(["doctor", *words]) == 2
    assert what in capsys.readouterr().err


def test_bad_data_is_a_wrong_request(base, data, capsys):
    data.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    assert main.main(["doctor", "--model", str(base), "--data", str(data)]) == 2
    error = capsys.readouterr().err
    assert "malformed JSON line" in error
    assert "line 2" in error


@pytest.mark.parametrize(
    ("limit", "what", "num_examples"),
    [(6, "all labels are masked", 0), (22, "the end of an answer is never learned", 6)],
)
def test_masks_that_teach_nothing_are_an_error_finding(
    base, data, capsys, limit, what, num_examples
):
    words = ["doctor", "--model", str(base), "--data", str(data), f"data.max_length={limit}"]
    assert main.main([*words, "--json"]) == 1
    record = json.loads(capsys.readouterr().out)
    errors = [found for found in record["findings"] if found["level"] == "error"]
    assert len(errors) == 1
    assert what in errors[0]["text"]
    assert "raise max_length" in errors[0]["remedy"]
    assert record["report"]["num_examples"] == num_examples
    assert record["adapter"] is None
    assert main.main(words) == 1
    out = capsys.readouterr().out
    assert what in out.replace("\n", " ")
    assert "cut at max_length" in out
    assert ("line 1: 22 tokens" in out) == (num_examples > 0)


def test_the_adapter_is_one_line_and_its_notes_make_it_a_warning():
    model = tiny_models.build("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LorakitWarning)
        plain, noted = (build_method("lora", {"r": r}).plan(model) for r in (2, 33))
    found = plan_finding("lora", plain, plain.notes)
    assert found.level == "ok"
    assert f"lora trains {plain.num_trainable:,} of {plain.num_total:,} parameters" in found.text
    assert "at 4 places" in found.text
    warned = plan_finding("lora", noted, noted.notes)
    assert warned.level == "warning"
    assert "the rank exceeds" in warned.text
