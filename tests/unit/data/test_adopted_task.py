"""The task of a classifier that PEFT saved: its classes, and heads that nobody kept."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

import tiny_classifiers
from lorakit.cli.main import main
from lorakit.data.adopted_task import adopted_task
from lorakit.errors import AdapterFileError, ConfigError
from lorakit.models.load import load_tokenizer

TEXTS = [row["text"] for row in tiny_classifiers.rows(4, kind="named")]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return {n: tiny_classifiers.write_base(root / n, n) for n in ("roberta", "llama", "deberta-v2")}


def saved_by_peft(base, directory, *, num_labels=3, targets="all-linear", **options):
    """A PEFT adapter with another head than its first one; the logits of TEXTS row by row."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=num_labels)
    model.config.pad_token_id = 0
    config = LoraConfig(task_type="SEQ_CLS", r=2, lora_alpha=6, target_modules=targets, **options)
    adapted = get_peft_model(model, config).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 5)
        tokenizer = load_tokenizer(base)
        logits = [adapted(**tokenizer(text, return_tensors="pt")).logits[0] for text in TEXTS]
    adapted.save_pretrained(directory)
    return directory, torch.stack(logits)


@pytest.mark.parametrize("name", ["roberta", "llama"])
def test_eval_gives_the_rows_what_peft_gives_them(base, tmp_path, name, capsys):
    adapter, logits = saved_by_peft(base[name], tmp_path / "peft")
    rows = [{"text": text, "label": "abc"[i % 3]} for i, text in enumerate(TEXTS)]
    data = tiny_classifiers.write_rows(tmp_path / "rows.jsonl", rows)
    out = tmp_path / "predictions.jsonl"
    words = ["eval", str(data), "--adapter", str(adapter), "--predictions", str(out)]
    assert main([*words, "--classes", "a,b,c"]) == 0
    found = [json.loads(line)["probabilities"] for line in out.read_text().splitlines()]
    assert [list(one) for one in found] == [["a", "b", "c"]] * 4
    given = torch.tensor([list(one.values()) for one in found])
    torch.testing.assert_close(given, logits.softmax(-1), rtol=1e-5, atol=1e-6)
    # Without names the classes are numbers, and these labels are none of them.
    assert main(words) == 2
    assert "a label is none of the classes" in capsys.readouterr().err


def test_the_merged_model_is_a_classifier(base, tmp_path):
    adapter, logits = saved_by_peft(base["roberta"], tmp_path / "peft")
    assert main(["merge", str(adapter), "-o", str(tmp_path / "merged")]) == 0
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    tokens = load_tokenizer(base["roberta"])(TEXTS[0], return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(merged(**tokens).logits[0], logits[0], rtol=1e-5, atol=1e-6)


def test_the_task_is_that_of_head_and_base(base, tmp_path):
    three, _ = saved_by_peft(base["roberta"], tmp_path / "three")
    one, _ = saved_by_peft(base["roberta"], tmp_path / "one", num_labels=1)
    assert adopted_task(three, {}).targets.names == ("0", "1", "2")
    assert adopted_task(one, {}).targets.regression
    with pytest.raises(ConfigError, match="these cannot be the classes"):
        adopted_task(three, {}, classes=("a", "b"))
    with pytest.raises(ConfigError, match="says itself"):
        adopted_task(one, {}, classes=("a", "b"))


def test_the_names_are_those_of_a_base_with_as_many(base, tmp_path):
    trained = tmp_path / "trained"
    model = AutoModelForSequenceClassification.from_pretrained(base["roberta"], num_labels=2)
    model.config.id2label = {0: "no", 1: "yes"}
    model.save_pretrained(trained)
    load_tokenizer(base["roberta"]).save_pretrained(trained)
    two, _ = saved_by_peft(trained, tmp_path / "two", num_labels=2)
    assert adopted_task(two, {}).targets.names == ("no", "yes")


def test_a_head_that_nobody_saved_is_refused(base, tmp_path):
    # PEFT keeps `classifier` and leaves the pooler behind it at the random start it had.
    adapter, _ = saved_by_peft(base["deberta-v2"], tmp_path / "peft", targets=["query_proj"])
    with pytest.raises(AdapterFileError, match="lacks a part of its head") as error:
        adopted_task(adapter, {})
    assert "pooler.dense.weight" in str(error.value.found)


@pytest.mark.parametrize("verb", ["generate", "eval"])
def test_who_cannot_write_is_not_asked_to(base, tmp_path, capsys, verb):
    adapter, _ = saved_by_peft(base["llama"], tmp_path / "peft")
    words = {
        "generate": ["generate", "w1", "--adapter", str(adapter)],
        "eval": ["eval", "rows.jsonl", "--adapter", str(adapter), "--classes", "a"],
    }
    assert main(words[verb]) == 2
    said = capsys.readouterr().err
    assert ("cannot write" if verb == "generate" else "cannot be the classes") in said
