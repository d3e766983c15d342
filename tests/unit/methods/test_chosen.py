"""Full fine-tuning, last layers and BitFit: what they choose, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

import tiny_models
from learned import shake, trainable
from lorakit.errors import (
    AdapterFileError,
    BaseMismatchError,
    LorakitError,
    SpecError,
    StateError,
    TargetError,
)
from lorakit.methods.registry import METHODS, build_method
from lorakit.methods.saved import load_saved
from lorakit.models.load import load_base_model


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("full", {"keep_bse": True}, "keep_base"),
        ("full", {"keep_base": "yes"}, "keep_base"),
        ("last_layers", {"num_layers": 0}, "num_layers"),
        ("last_layers", {"num_layers": True}, "num_layers"),
        ("last_layers", {"head": "yes"}, "head"),
        ("last_layers", {"also_train": [""]}, "also_train"),
        ("bitfit", {"add": 1}, "add"),
        ("bitfit", {"also_train": "classifier"}, "also_train"),
    ],
)
def test_options_that_cannot_be_are_refused(name: str, options: Any, match: str) -> None:
    assert name in METHODS
    with pytest.raises(SpecError, match=match):
        build_method(name, options)


@pytest.mark.parametrize(
    ("name", "options", "architecture", "error", "match"),
    [
        ("bitfit", {}, "llama", SpecError, "no bias vectors"),
        ("bitfit", {"also_train": ["clasifier"]}, "gpt2", TargetError, "matches nothing"),
        ("last_layers", {"num_layers": 3}, "llama", SpecError, "fewer blocks"),
        ("last_layers", {"head": "only"}, "bert", SpecError, "no head"),
        # GPT-2's head is its embedding: trained alone it would change both.
        ("last_layers", {"head": "only"}, "gpt2", TargetError, "shared"),
        ("last_layers", {}, "t5", TargetError, "T5"),
        ("full", {"also_train": ["nothing"]}, "gpt2", TargetError, "matches nothing"),
    ],
)
def test_what_a_model_does_not_allow_is_refused_before_it_is_changed(
    name: str, options: Any, architecture: str, error: type[LorakitError], match: str
) -> None:
    model = tiny_models.build(architecture)
    before = set(trainable(model))
    for step in ("plan", "attach"):
        method = build_method(name, options)
        with pytest.raises(error, match=match):
            method.plan(model) if step == "plan" else method.attach(model)
        assert set(trainable(model)) == before


def test_what_each_method_chooses() -> None:
    chosen: dict[str, set[str]] = {}
    for name, options in (
        ("last_layers", {"num_layers": 1}),
        ("last_layers", {"head": "only"}),
        ("bitfit", {}),
    ):
        model = tiny_models.build("opt" if name == "bitfit" else "llama")
        build_method(name, options).attach(model)
        chosen[json.dumps([name, options])] = set(trainable(model))
    last, head, biases = chosen.values()
    assert all(name.startswith("model.layers.1.") for name in last)
    assert {name.split(".", 3)[3] for name in last} >= {"input_layernorm.weight"}
    assert head == {"lm_head.weight"}
    everything = dict(tiny_models.build("opt").named_parameters())
    assert biases == {name for name in everything if name.endswith(".bias")}


def test_a_new_head_is_trained_beside_and_is_not_part_of_the_base(tmp_path: Path) -> None:
    def build(seed: int) -> BertForSequenceClassification:
        torch.manual_seed(3)
        model = BertForSequenceClassification(
            BertConfig(
                vocab_size=60,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_labels=3,
            )
        ).eval()
        torch.manual_seed(seed)
        with torch.no_grad():
            model.classifier.weight.normal_()
        return model

    ids = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]])
    for name in ("bitfit", "last_layers", "full"):
        model = build(1)
        method = build_method(name, {"also_train": ["classifier"]})
        method.attach(model)
        assert "classifier.weight" in trainable(model)
        shake(model)
        method.save(model, tmp_path / name, {})
        fresh = build(2)
        load_saved(fresh, tmp_path / name)
        assert fresh(input_ids=ids).logits.equal(model(input_ids=ids).logits)
        strict = build_method(name, {})
        again = build(1)
        strict.attach(again)
        strict.save(again, tmp_path / f"{name}-strict", {})
        with pytest.raises(BaseMismatchError):
            load_saved(build(2), tmp_path / f"{name}-strict")


def test_full_without_the_base_says_so_and_is_an_ordinary_model(tmp_path: Path) -> None:
    model = tiny_models.build("gpt2")
    given = tiny_models.inputs(model)
    method = build_method("full", {})
    assert method.attach(model).kept_bytes == 0
    with pytest.raises(StateError, match="keep_base"), method.disabled(model):
        pass
    with pytest.raises(StateError, match="full cannot be attached beside full"):
        method.attach(model)
    shake(model)
    live = tiny_models.outputs(model, given)
    method.save(model, tmp_path / "out", {})
    assert tiny_models.outputs(load_base_model(tmp_path / "out"), given).equal(live)
    (tmp_path / "out" / "model.safetensors").write_bytes(b"\0" * 40)
    with pytest.raises(AdapterFileError, match="cannot be read"):
        load_saved(tiny_models.build("gpt2"), tmp_path / "out")


@pytest.mark.parametrize("damage", ["tensors", "cut", "passport", "format", "method", "options"])
def test_a_damaged_directory_is_one_clear_error(tmp_path: Path, damage: str) -> None:
    model = tiny_models.build("opt")
    method = build_method("bitfit", {})
    method.attach(model)
    path = tmp_path / "out"
    method.save(model, path, {})
    passport = path / "lorakit.json"
    document = json.loads(passport.read_text())
    if damage == "tensors":
        (path / "method.safetensors").unlink()
    elif damage == "cut":
        file = path / "method.safetensors"
        file.write_bytes(file.read_bytes()[:-8])
    elif damage == "passport":
        passport.write_text("{")
    else:
        wrong = {"format": 99, "method": "bitfti", "options": {"ad": True}}
        passport.write_text(json.dumps({**document, damage: wrong[damage]}))
    with pytest.raises(AdapterFileError):
        load_saved(tiny_models.build("opt"), path)
    with pytest.raises(AdapterFileError, match="there are adapters in"):
        load_saved(tiny_models.build("opt"), tmp_path)
