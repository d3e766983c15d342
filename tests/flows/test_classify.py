"""Classification runs: what they learn, leave and refuse, and that a killed one goes on."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

import tiny_classifiers
from lorakit.errors import ConfigError, DataError
from lorakit.methods.saved import load_saved
from lorakit.models.load import load_base_model, load_tokenizer
from lorakit.models.task_head import ClassificationHead
from lorakit.train.config import TrainConfig
from lorakit.train.run import train
from lorakit.train.trainer import AdapterTrainer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    root = tmp_path_factory.mktemp("classify")
    for name in (*tiny_classifiers.ENCODERS, *tiny_classifiers.DECODERS):
        tiny_classifiers.write_base(root / name, name)
    for kind in ("pair", "score", "named"):
        rows = tiny_classifiers.rows(40, kind=kind)
        held = tiny_classifiers.rows(16, seed=1, kind=kind)
        tiny_classifiers.write_rows(root / f"{kind}.jsonl", rows)
        tiny_classifiers.write_rows(root / f"{kind}-held.jsonl", held)
    return root


def values(shared, output, *, base="bert", kind="pair", data=None, method=None, **options):
    return {
        "model": str(shared / base),
        "task": "classify",
        "data": {
            "train": str(shared / f"{kind}.jsonl"),
            "validation": str(shared / f"{kind}-held.jsonl"),
            **(data or {}),
        },
        **(method or {"lora": {"r": 4, "alpha": 12, "targets": "all-linear"}}),
        "train": {"epochs": 6, "batch_size": 8, "lr": 0.01, "precision": "fp32", **options},
        "output": str(output),
    }


def run(shared, output, **given):
    said = []
    config = TrainConfig.from_dict(values(shared, output, **given))
    return train(config, say=said.append), said


def peft_logits(result, base, tokens):
    passport = json.loads((result.adapter / "lorakit.json").read_text())
    targets = passport["task"]["targets"]
    count = len(targets["names"]) or 1
    theirs = AutoModelForSequenceClassification.from_pretrained(base, num_labels=count)
    theirs.config.pad_token_id = passport["task"]["pad_token_id"]
    model = PeftModel.from_pretrained(theirs, result.adapter).eval()
    with torch.no_grad():
        return model(**tokens).logits


def test_a_run_learns_and_says_what_it_does(shared, tmp_path):
    result, said = run(shared, tmp_path / "run")
    metrics = result.record["metrics"]
    assert metrics["last_loss"] < metrics["first_loss"]
    assert set(metrics["final"]) >= {
        "eval_accuracy",
        "eval_f1",
        "eval_accuracy_f1",
        "eval_matthews",
    }
    assert metrics["final"]["eval_accuracy"] > 0.6
    assert any(line.startswith("note: the new head is trained beside") for line in said)
    assert "2 classes: 0 20, 1 20" in said[0]


@pytest.mark.parametrize("base", [*tiny_classifiers.ENCODERS, "llama", "gpt2"])
def test_peft_computes_the_same_from_the_saved_adapter(shared, tmp_path, base):
    result, _ = run(shared, tmp_path / "run", base=base, epochs=1)
    tokenizer = load_tokenizer(shared / base)
    row = tiny_classifiers.rows(3, seed=9)[2]
    text = (row["sentence1"], row["sentence2"])
    if base in tiny_classifiers.DECODERS:
        text = ("\n".join(text), None)
    tokens = tokenizer(*text, return_tensors="pt")
    state = load_file(result.adapter / "adapter_model.safetensors")
    assert any("classifier" in key or "score" in key for key in state)
    assert not any("lora_" in key and ("classifier" in key or "score" in key) for key in state)
    theirs = peft_logits(result, shared / base, tokens)
    torch.testing.assert_close(our_logits(result, tokens), theirs, rtol=1e-5, atol=1e-6)


def test_a_base_without_a_pooler_is_saved_with_the_one_that_was_learned(shared, tmp_path):
    base = "bert-masked"
    tiny_classifiers.write_base(shared / base, base)
    result, said = run(shared, tmp_path / "run", base=base, epochs=1)
    assert "note: the new head is trained beside: classifier, bert.pooler" in said
    text = ("w6 w20 w21", "w13")
    tokens = load_tokenizer(shared / base)(*text, return_tensors="pt")
    theirs = peft_logits(result, shared / base, tokens)
    torch.testing.assert_close(our_logits(result, tokens), theirs, rtol=1e-5, atol=1e-6)
    state = load_file(result.adapter / "adapter_model.safetensors")
    assert "base_model.model.bert.pooler.dense.weight" in state


@pytest.mark.filterwarnings("ignore:the base has a trained head")
def test_a_trained_base_keeps_the_order_of_its_classes(shared, tmp_path):
    head = ClassificationHead(names=("good", "bad"), pad_token_id=0, seed=3)
    base = tmp_path / "trained"
    load_base_model(shared / "roberta", head=head).save_pretrained(base)
    load_tokenizer(shared / "roberta").save_pretrained(base)
    result, said = run(shared, tmp_path / "run", base=base, kind="named", epochs=1)
    passport = json.loads((result.adapter / "lorakit.json").read_text())
    assert passport["task"]["targets"]["names"] == ["good", "bad"]
    assert "the classes are those of the base's own head" in said[0]


def our_logits(result, tokens):
    passport = json.loads((result.adapter / "lorakit.json").read_text())
    task = passport["task"]
    names = tuple(task["targets"]["names"])
    head = ClassificationHead(names=names, pad_token_id=task["pad_token_id"], seed=99)
    model = load_base_model(passport["model"], head=head)
    load_saved(model, result.adapter)
    with torch.no_grad():
        return model(**tokens).logits


def test_a_regression_learns_and_is_said(shared, tmp_path):
    result, said = run(shared, tmp_path / "run", kind="score", epochs=10)
    assert "regression, mean" in said[0]
    assert "numbers with a fraction" in said[0]
    final = result.record["metrics"]["final"]
    metrics = result.record["metrics"]
    # The head starts at the labels' mean: the first loss is their variance, and what is learned
    # from there is more than the offset.
    assert metrics["first_loss"] < 2.0
    assert final["eval_pearson"] > 0.5
    assert set(final) >= {"eval_pearson", "eval_spearman", "eval_pearson_spearman"}
    passport = json.loads((result.adapter / "lorakit.json").read_text())
    assert passport["task"]["targets"] == {"kind": "regression", "names": []}


def test_class_names_are_kept(shared, tmp_path):
    result, _ = run(shared, tmp_path / "run", kind="named", epochs=1)
    passport = json.loads((result.adapter / "lorakit.json").read_text())
    assert passport["task"]["targets"] == {"kind": "classes", "names": ["bad", "good"]}
    assert passport["task"]["columns"] == {"text": "text", "label": "label"}


def test_the_best_checkpoint_is_chosen_by_the_metric(shared, tmp_path):
    result, _ = run(shared, tmp_path / "run", best_metric="matthews", lr=0.03)
    lines = [json.loads(n) for n in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    scores = {n["step"]: (n["eval_matthews"], -n["eval_loss"]) for n in lines if "eval_loss" in n}
    best = max(scores, key=lambda step: scores[step])
    assert result.record["metrics"]["best_step"] == best
    assert result.record["metrics"]["best_score"] == scores[best][0]


@pytest.mark.parametrize(
    "method",
    [
        {"method": "full"},
        {"method": "bitfit"},
        {"method": "last_layers", "last_layers": {"num_layers": 1}},
    ],
    ids=lambda m: m["method"],
)
def test_every_method_trains_the_head(shared, tmp_path, method):
    result, _ = run(shared, tmp_path / "run", method=method, epochs=2)
    metrics = result.record["metrics"]
    assert metrics["final"]["eval_accuracy"] >= 0.25
    assert metrics["last_loss"] != metrics["first_loss"]


def test_a_broken_run_goes_on_bit_for_bit(shared, tmp_path, monkeypatch):
    class BrokenOffError(Exception):
        pass

    whole, _ = run(shared, tmp_path / "whole", epochs=3)
    step_of = AdapterTrainer.training_step

    def breaks(self, *args):
        if self.state.global_step == 7:
            raise BrokenOffError
        return step_of(self, *args)

    config = TrainConfig.from_dict(values(shared, tmp_path / "broken", epochs=3))
    with monkeypatch.context() as patch:
        patch.setattr(AdapterTrainer, "training_step", breaks)
        with pytest.raises(BrokenOffError):
            train(config, say=lambda line: None)
    resumed = train(config, resume=True, say=lambda line: None)
    file = "adapter_model.safetensors"
    assert (whole.adapter / file).read_bytes() == (resumed.adapter / file).read_bytes()
    assert whole.record["metrics"] == resumed.record["metrics"]


WRONG = [
    ({"label": 7}, "none of the classes", {}),
    ({"sentence1": ""}, "without text", {}),
    ({"label": None}, "without a label", {}),
    ({"label": "high"}, "not a number", {"labels": "regression"}),
]


@pytest.mark.parametrize(("change", "says", "data"), WRONG, ids=lambda v: str(v)[:30])
def test_a_wrong_row_is_named_and_nothing_is_written(shared, tmp_path, change, says, data):
    rows = tiny_classifiers.rows(16, seed=1)
    rows[4] = {**rows[4], **change}
    held = tiny_classifiers.write_rows(tmp_path / "held.jsonl", rows)
    with pytest.raises(DataError, match=says) as caught:
        run(shared, tmp_path / "run", data={"validation": str(held), **data})
    assert "held.jsonl line 5" in caught.value.where
    assert caught.value.exit_code == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "where"),
    [
        ({"data": {"template": "chat"}}, "data.template"),
        ({"data": {"columns": {"prompt": "a"}}}, "data.columns"),
        ({"best_metric": "pearson"}, "train.best_metric"),
        ({"kind": "score", "label_smoothing": 0.1}, "train.label_smoothing"),
        ({"data": {"max_length": 500}}, "data.max_length"),
    ],
)
def test_options_of_another_task_are_refused(shared, tmp_path, given, where):
    with pytest.raises(ConfigError) as caught:
        run(shared, tmp_path / "run", **given)
    assert where in caught.value.where
    assert not (tmp_path / "run").exists()


def test_classes_mean_nothing_for_sft(shared, tmp_path):
    given = {**values(shared, tmp_path), "task": "sft"}
    given["data"]["classes"] = ["a", "b"]
    with pytest.raises(ConfigError, match="classes means nothing for task sft"):
        TrainConfig.from_dict(given)


@pytest.mark.real
def test_minilm_learns_in_seconds(shared, minilm_path, tmp_path):
    rows = [
        {
            "sentence1": f"The {who} said on {day} that the {what} would be sold .",
            "sentence2": f"On {day} the {who} announced the sale of the {what} ."
            if same
            else f"The {who} had dinner with friends on {day} .",
            "label": int(same),
        }
        for who in ("company", "mayor", "director", "bank", "museum")
        for day in ("Monday", "Friday")
        for what in ("house", "painting")
        for same in (True, False)
    ]
    held = rows[-8:]
    tiny_classifiers.write_rows(tmp_path / "train.jsonl", rows[:-8])
    tiny_classifiers.write_rows(tmp_path / "held.jsonl", held)
    config = {
        "model": str(minilm_path),
        "task": "classify",
        "data": {
            "train": str(tmp_path / "train.jsonl"),
            "validation": str(tmp_path / "held.jsonl"),
        },
        "lora": {"r": 8, "targets": "qv"},
        "train": {"epochs": 4, "batch_size": 8, "lr": 2e-3, "precision": "fp32"},
        "output": str(tmp_path / "run"),
    }
    result = train(TrainConfig.from_dict(config), say=lambda line: None)
    assert result.record["metrics"]["final"]["eval_accuracy"] >= 0.75
