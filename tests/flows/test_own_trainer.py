"""A model that carries something learned in transformers' Trainer, saved, resumed, loaded."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

import lorakit as lk
import tiny_models
from learned import bits, shake
from lorakit.adapters.attach import attach
from lorakit.errors import AdapterFileError, LorakitWarning, StateError
from lorakit.methods.base import Method
from lorakit.methods.registry import build_method
from lorakit.methods.saved import load_saved
from lorakit.models.load import load_base_model

SPEC = {"r": 3, "alpha": 7.5, "targets": "all-linear"}
# What has no form in the base's own tensors; all of them are saved as what was learned.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {**SPEC, "also_train": ["ln_f"], "dropout": 0.1}),
    "pissa": ("lora", {"r": 3, "targets": ("c_attn.q", "c_attn.v"), "init": "pissa"}),
    "dora": ("lora", {"r": 3, "targets": "qv", "update": "dora"}),
    "bitfit-added": ("bitfit", {"add": True}),
    "prefix": ("prefix_embedding", {"prefix": 2, "infix": 1}),
    "houlsby": ("houlsby", {"bottleneck": 3}),
}
IN_PLACE = ("full", "last_layers", "bitfit")
each_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny_models.build("gpt2").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def carrying(base: Path, case: str) -> tuple[PreTrainedModel, Method]:
    torch.manual_seed(5)
    name, options = CASES.get(case, (case, {}))
    if options.get("add"):
        # GPT-2 has biases everywhere.
        base = base.parent / "llama"
        tiny_models.build("llama").save_pretrained(base)
    model = load_base_model(base)
    method = build_method(name, options)
    method.attach(model)
    return model, method


def rows() -> list[dict[str, Any]]:
    ids = torch.randint(3, 128, (16, 9), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer(model: PreTrainedModel, directory: Path, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=2e-2,
        save_steps=3,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    return Trainer(model=model, args=arguments, train_dataset=rows(), eval_dataset=rows()[:4])


@each_case
def test_trainer_saves_what_was_learned_and_resumes_bit_for_bit(
    base: Path, case: str, tmp_path: Path
) -> None:
    model, method = carrying(base, case)
    trainer(model, tmp_path / "run").train()
    whole = {name: value.detach().clone() for name, value in method.state(model).items()}
    checkpoint = tmp_path / "run" / "checkpoint-3"
    names = {path.name for path in checkpoint.iterdir()}
    own = {"adapter_config.json", "adapter_model.safetensors"}
    assert own <= names if CASES[case][0] == "lora" else "method.safetensors" in names
    assert "lorakit.json" in names
    assert "config.json" not in names
    learned = sum(p.numel() for p in whole.values())
    assert sum(t.numel() for t in load_file(checkpoint / "model.safetensors").values()) == learned

    again, method = carrying(base, case)
    trainer(again, tmp_path / "again").train(resume_from_checkpoint=str(checkpoint))
    for name, value in method.state(again).items():
        assert torch.equal(value, whole[name]), name


@each_case
def test_the_best_model_comes_back_at_the_end(base: Path, case: str, tmp_path: Path) -> None:
    model, method = carrying(base, case)
    best = {}

    class Worse(Trainer):
        def evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
            step = self.state.global_step
            if step == 3:
                best.update({n: v.detach().clone() for n, v in method.state(model).items()})
            found = {"eval_loss": float(step)}
            self.control = self.callback_handler.on_evaluate(
                self.args, self.state, self.control, found
            )
            return found

    one = trainer(
        model,
        tmp_path / "run",
        eval_strategy="steps",
        eval_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
    )
    Worse(model=model, args=one.args, train_dataset=rows(), eval_dataset=rows()[:4]).train()
    assert best
    for name, value in method.state(model).items():
        assert torch.equal(value, best[name]), name


def test_resuming_with_another_adapter_or_none_is_refused(base: Path, tmp_path: Path) -> None:
    model, _ = carrying(base, "lora")
    trainer(model, tmp_path / "run").train()
    checkpoint = str(tmp_path / "run" / "checkpoint-3")
    other = load_base_model(base)
    lk.attach(other, lk.LoraSpec(r=2, targets="qv"))
    before = bits(other)
    with pytest.raises(AdapterFileError, match=r"(?s)do not fit|learned tensors") as caught:
        trainer(other, tmp_path / "other").train(resume_from_checkpoint=checkpoint)
    assert "misshapen" in str(caught.value) or "extra" in str(caught.value)
    assert all(value.equal(before[name]) for name, value in bits(other).items())
    bare = load_base_model(base)
    with pytest.raises(ValueError, match="parameter group"):
        trainer(bare, tmp_path / "bare").train(resume_from_checkpoint=checkpoint)


def test_save_pretrained_writes_peft_s_layout_beside_what_is_there(
    base: Path, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    model, _ = carrying(base, "dora")
    shake(model)
    given = tiny_models.inputs(model)
    live = tiny_models.outputs(model, given)
    out = tmp_path / "out"
    out.mkdir()
    (out / "tokenizer.json").write_text("{}")
    model.save_pretrained(out)
    model.save_pretrained(out)
    assert sorted(p.name for p in out.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "lorakit.json",
        "tokenizer.json",
    ]
    fresh = load_base_model(base)
    lk.load_adapter(fresh, out)
    assert tiny_models.outputs(fresh, given).equal(live)
    theirs = peft.PeftModel.from_pretrained(load_base_model(base), str(out)).eval()
    torch.testing.assert_close(tiny_models.outputs(theirs, given), live, rtol=1e-4, atol=1e-4)


def test_transformers_finds_the_base_of_a_checkpoint(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model = load_base_model(base)
    lk.attach(model, lk.LoraSpec(r=3, targets="all-linear"))
    shake(model)
    given = tiny_models.inputs(model)
    # By the base's name in the adapter's configuration, also with Trainer's own file beside.
    model.save_pretrained(tmp_path / "checkpoint-7")
    auto = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-7").eval()
    live = tiny_models.outputs(model, given)
    torch.testing.assert_close(tiny_models.outputs(auto, given), live, rtol=1e-4, atol=1e-4)


def test_several_adapters_are_saved_each_in_a_directory_of_its_own(
    base: Path, tmp_path: Path
) -> None:
    model = load_base_model(base)
    for name in ("a", "b"):
        attach(model, lk.LoraSpec(r=2, targets="qv"), name)
        shake(model, seed=ord(name))
    model.save_pretrained(tmp_path / "out")
    given = tiny_models.inputs(model)
    fresh = load_base_model(base)
    for name in ("a", "b"):
        lk.load_adapter(fresh, tmp_path / "out" / name, name=name)
        with lk.use(model, name):
            assert tiny_models.outputs(fresh, given).equal(tiny_models.outputs(model, given))


@pytest.mark.parametrize("architecture", ["gpt2", "llama-tied"])
def test_a_merged_model_is_saved_whole_and_clean(architecture: str, tmp_path: Path) -> None:
    model = tiny_models.build(architecture)
    lk.attach(model, lk.LoraSpec(r=3, targets="all-linear", also_train=(), bias="none"), "on")
    shake(model)
    wrapped = [name for name, _ in model.named_modules()]
    given = tiny_models.inputs(model)
    lk.merge(model, "on")
    live = tiny_models.outputs(model, given)
    model.save_pretrained(tmp_path / "merged")
    assert not list((tmp_path / "merged").glob("*adapter*"))
    read = load_base_model(tmp_path / "merged")
    assert tiny_models.outputs(read, given).equal(live)
    assert [name for name, _ in model.named_modules()] == wrapped
    lk.unmerge(model)
    lk.attach(model, lk.LoraSpec(r=2, targets="qv"), "off")
    lk.merge(model, "on")
    with pytest.warns(LorakitWarning, match="do not hold off"):
        model.save_pretrained(tmp_path / "again")


def test_detach_gives_save_pretrained_back(base: Path, tmp_path: Path) -> None:
    model = load_base_model(base)
    before = bits(model)
    lk.attach(model, lk.LoraSpec(r=2), "x")
    twin = copy.deepcopy(model)
    lk.detach(model)
    assert "save_pretrained" not in vars(model)
    model.save_pretrained(tmp_path / "plain")
    plain = bits(load_base_model(tmp_path / "plain"))
    assert all(value.equal(plain[name]) for name, value in before.items())
    model.load_state_dict(model.state_dict())
    # A copy saves itself.
    shake(twin)
    twin.save_pretrained(tmp_path / "twin")
    assert any(
        t.abs().max() > 0
        for n, t in load_file(tmp_path / "twin" / "adapter_model.safetensors").items()
        if "lora_B" in n
    )


@pytest.mark.parametrize("case", IN_PLACE)
def test_what_learns_in_place_is_saved_and_resumed_as_a_plain_model(
    base: Path, case: str, tmp_path: Path
) -> None:
    model, _ = carrying(base, case)
    trainer(model, tmp_path / "run").train()
    given = tiny_models.inputs(model)
    live = tiny_models.outputs(model.eval(), given)
    read = load_base_model(tmp_path / "run" / "checkpoint-6")
    assert tiny_models.outputs(read, given).equal(live)
    again, _ = carrying(base, case)
    checkpoint = str(tmp_path / "run" / "checkpoint-3")
    trainer(again, tmp_path / "again").train(resume_from_checkpoint=checkpoint)
    assert tiny_models.outputs(again.eval(), given).equal(live)


def test_a_method_s_checkpoint_loads_like_its_directory(base: Path, tmp_path: Path) -> None:
    model, _ = carrying(base, "prefix")
    shake(model)
    model.save_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "lorakit.json").read_text())["method"] == (
        "prefix_embedding"
    )
    fresh = load_base_model(base)
    load_saved(fresh, tmp_path / "out")
    given = tiny_models.inputs(model)
    assert tiny_models.outputs(fresh, given).equal(tiny_models.outputs(model, given))


def test_what_save_pretrained_refuses(base: Path, tmp_path: Path) -> None:
    model, _ = carrying(base, "lora")
    with pytest.raises(StateError, match="not pushed") as caught:
        model.save_pretrained(tmp_path / "out", push_to_hub=True)
    assert "upload_folder" in str(caught.value)
    model.save_pretrained(tmp_path / "out", is_main_process=False)
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(lk.LorakitError, match="cannot write"):
        model.save_pretrained(tmp_path / "file")
