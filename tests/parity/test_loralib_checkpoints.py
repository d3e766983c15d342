"""Checkpoints as microsoft/LoRA's examples save them: with a classifier's head, with biases."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    RobertaForMaskedLM,
)

import tiny_models
from lorakit.converting import ConvertOptions, convert
from lorakit.errors import AdapterFileError, LorakitWarning, RequestError

loralib = pytest.importorskip("loralib")
ALPHA, CLASSES = 10, 3


def classifier() -> Any:
    config = tiny_models.build("roberta").config
    config.num_labels = CLASSES
    config.architectures = None
    return tiny_models.seeded(lambda: AutoModelForSequenceClassification.from_config(config))


def learned(bias: str = "none") -> Any:
    """RoBERTa with loralib's layers on query and value, its head and some biases trained."""
    model = classifier()
    for layer in model.roberta.encoder.layer:
        for leaf in ("query", "value"):
            old = getattr(layer.attention.self, leaf)
            new = loralib.Linear(32, 32, r=4, lora_alpha=ALPHA, merge_weights=False)
            new.weight.data, new.bias.data = old.weight.data.clone(), old.bias.data.clone()
            setattr(layer.attention.self, leaf, new)
    loralib.mark_only_lora_as_trainable(model, bias=bias)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or name.startswith("classifier."):
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def saved(model: Any, bias: str, *, head: bool) -> dict[str, Tensor]:
    state = model.state_dict()
    heads = {k: t for k, t in state.items() if head and k.startswith("classifier.")}
    return {**loralib.lora_state_dict(model, bias=bias), **heads}


def answers(model: nn.Module) -> Tensor:
    return tiny_models.outputs(model, tiny_models.inputs(classifier()))  # type: ignore[arg-type]


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
@pytest.mark.parametrize("base", ["classifier", "masked"])
def test_head_and_biases_come_along(base: str, bias: str, tmp_path: Path) -> None:
    theirs = learned(bias)
    torch.save(saved(theirs, bias, head=True), tmp_path / "lora.bin")
    # The base as it is published has a head for masked tokens, and none for classes.
    body = classifier()
    if base == "masked":
        body = RobertaForMaskedLM(body.config)
    body.save_pretrained(tmp_path / "base")
    options = ConvertOptions(alpha=ALPHA)
    given: dict[str, Any] = {"base": str(tmp_path / "base"), "options": options}
    with warnings.catch_warnings():
        warnings.simplefilter("error", LorakitWarning)
        convert(tmp_path / "lora.bin", tmp_path / "made", "peft", **given)
    wanted = answers(theirs)
    ours = peft.PeftModel.from_pretrained(classifier(), tmp_path / "made").eval()
    torch.testing.assert_close(answers(ours), wanted, rtol=1e-4, atol=1e-5)
    # And back: loralib's model takes every tensor.
    made = convert(tmp_path / "made", tmp_path / "back", "loralib", **given)
    again = learned()
    state = torch.load(made["output"], weights_only=True)
    for name, tensor in classifier().state_dict().items():
        if name in again.state_dict() and "lora_" not in name:
            again.state_dict()[name].copy_(tensor)
    assert not again.load_state_dict(state, strict=False).unexpected_keys
    torch.testing.assert_close(answers(again), wanted, rtol=1e-4, atol=1e-5)


def test_a_whole_checkpoint_gives_its_head(tmp_path: Path) -> None:
    theirs = learned()
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    classifier().save_pretrained(tmp_path / "base")
    with pytest.warns(LorakitWarning, match="may have the update merged in"):
        convert(
            tmp_path / "pytorch_model.bin",
            tmp_path / "made",
            "peft",
            base=str(tmp_path / "base"),
            options=ConvertOptions(alpha=ALPHA),
        )
    ours = peft.PeftModel.from_pretrained(classifier(), tmp_path / "made").eval()
    torch.testing.assert_close(answers(ours), answers(theirs), rtol=1e-4, atol=1e-5)


def test_what_has_no_place_in_the_base_is_said(tmp_path: Path) -> None:
    state = {**saved(learned(), "none", head=False), "qa_outputs.weight": torch.ones(2, 32)}
    torch.save(state, tmp_path / "lora.bin")
    classifier().save_pretrained(tmp_path / "base")
    with pytest.warns(LorakitWarning, match=r"no place in the base.*qa_outputs\.weight"):
        convert(
            tmp_path / "lora.bin",
            tmp_path / "made",
            "peft",
            base=str(tmp_path / "base"),
            options=ConvertOptions(alpha=ALPHA),
        )


def test_other_targets_still_refuse_the_head(tmp_path: Path) -> None:
    torch.save(saved(learned(), "none", head=True), tmp_path / "lora.bin")
    classifier().save_pretrained(tmp_path / "base")
    with pytest.raises(RequestError, match="trained parameters beside"):
        convert(
            tmp_path / "lora.bin",
            tmp_path / "made",
            "kohya",
            base=str(tmp_path / "base"),
            options=ConvertOptions(alpha=ALPHA),
        )


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
def test_classifiers_that_peft_saved(task: str, tmp_path: Path) -> None:
    """A head for sequences comes with its task; one for tokens needs the base that has it."""
    kinds: dict[str, Any] = {
        "SEQ_CLS": AutoModelForSequenceClassification,
        "TOKEN_CLS": AutoModelForTokenClassification,
    }
    config = classifier().config

    def build() -> Any:
        return tiny_models.seeded(lambda: kinds[task].from_config(config))

    wanted = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["query"], task_type=task)
    theirs: Any = peft.get_peft_model(build(), wanted).eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    theirs.save_pretrained(tmp_path / "adapter")
    RobertaForMaskedLM(config).save_pretrained(tmp_path / "masked")
    build().save_pretrained(tmp_path / "same")
    if task == "TOKEN_CLS":
        with pytest.raises(AdapterFileError, match="RobertaForMaskedLM"):
            convert(tmp_path / "adapter", tmp_path / "no", "loralib", base=str(tmp_path / "masked"))
    base = str(tmp_path / ("masked" if task == "SEQ_CLS" else "same"))
    made = convert(tmp_path / "adapter", tmp_path / "made", "loralib", base=base)
    options = ConvertOptions(alpha=made["alpha"])
    convert(made["output"], tmp_path / "back", "peft", base=base, options=options)
    again = peft.PeftModel.from_pretrained(build(), tmp_path / "back").eval()
    torch.testing.assert_close(answers(again), answers(theirs))
