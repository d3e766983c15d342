"""PEFT's own package reads what we write and writes what we read, tensor for tensor."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import BertForSequenceClassification

import tiny_models
from law_cases import CASES, Case, grid
from learned import attach_learned, shake
from lorakit.adapters.adapter import Adapter
from lorakit.adapters.attach import detach, use
from lorakit.adapters.spec import LoraSpec
from lorakit.formats.peft import load_adapter, save_adapter

TENSORS = "adapter_model.safetensors"


@contextmanager
def _peft_may_warn() -> Iterator[None]:
    # PEFT warns of configurations that are missing beside models made in memory.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _in_peft(base: torch.nn.Module, path: Path) -> torch.nn.Module:
    with _peft_may_warn():
        return peft.PeftModel.from_pretrained(base, str(path)).eval()


def _save_in_peft(model: Any, path: Path) -> dict[str, torch.Tensor]:
    with _peft_may_warn():
        model.save_pretrained(str(path))
    return load_file(path / TENSORS)


def _assert_tensors_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    # By default PEFT adds the whole frozen embedding to the file.
    copies = {k for k in theirs if k.endswith(".base_layer.weight")}
    # With bias="all" it also writes the biases of whole modules under two names of its own.
    copies |= {k for k in theirs if ".original_module." in k or ".modules_to_save." in k}
    assert set(ours) == set(theirs) - copies
    assert [k for k in ours if not ours[k].equal(theirs[k])] == []


@grid()
def test_peft_computes_the_same_with_our_files_and_writes_them_again(
    case: Case, tmp_path: Path
) -> None:
    model = tiny_models.build(case.architecture)
    given = tiny_models.inputs(model)
    attach_learned(model, case.make(), warns=case.warns)
    live = tiny_models.outputs(model, given)
    save_adapter(model, tmp_path / "ours")
    ours = load_file(tmp_path / "ours" / TENSORS)
    theirs = _in_peft(tiny_models.build(case.architecture), tmp_path / "ours")
    torch.testing.assert_close(tiny_models.outputs(theirs, given), live, rtol=1e-5, atol=1e-5)
    again = _save_in_peft(theirs, tmp_path / "theirs")
    _assert_tensors_equal(ours, again)
    # And back: what PEFT wrote means the same here.
    back = tiny_models.build(case.architecture)
    load_adapter(back, tmp_path / "theirs")
    torch.testing.assert_close(tiny_models.outputs(back, given), live, rtol=1e-5, atol=1e-5)
    with use(back, None):
        assert tiny_models.outputs(back, given).equal(
            tiny_models.outputs(tiny_models.build(case.architecture), given)
        )


# PEFT's own configurations -> lorakit.
_THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "all-linear": ("llama", {"target_modules": "all-linear"}),
    "all-linear-gpt2": ("gpt2", {"target_modules": "all-linear", "fan_in_fan_out": True}),
    "all-linear-falcon": ("falcon", {"target_modules": "all-linear"}),
    "all-linear-t5": ("t5", {"target_modules": "all-linear"}),
    "all-linear-bert": ("bert", {"target_modules": "all-linear"}),
    "regex": ("llama", {"target_modules": r".*layers\.1\..*(q|down)_proj"}),
    "exclude": ("llama", {"target_modules": "all-linear", "exclude_modules": ["down_proj"]}),
    "layers": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding-scaled": ("gemma3_text", {"target_modules": ["embed_tokens"]}),
    "embedding-only": ("bert", {"target_modules": ["word_embeddings"]}),
    "conv2d": ("vit", {"target_modules": ["projection", "v_proj"]}),
    "rslora": ("llama", {"target_modules": ["q_proj", "up_proj"], "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj", "o_proj"],
            "rank_pattern": {"v_proj": 6, "layers.0.self_attn.o_proj": 2},
            "alpha_pattern": {"q_proj": 1.5, "^model.layers.1.self_attn.o_proj": 9},
        },
    ),
    "patterns-rslora": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj"],
            "use_rslora": True,
            "rank_pattern": {"v_proj": 6},
            "alpha_pattern": {"v_proj": 2.0},
        },
    ),
    "bias-lora-only": ("bert", {"target_modules": ["query", "dense"], "bias": "lora_only"}),
    "bias-all": ("opt", {"target_modules": ["q_proj", "fc1"], "bias": "all"}),
    "bias-all-gpt2": (
        "gpt2",
        {"target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True},
    ),
    "modules-to-save": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    ),
    "modules-to-save-bert": (
        "bert",
        {"target_modules": ["query"], "modules_to_save": ["pooler"]},
    ),
    "bias-all-modules-to-save": (
        "bert",
        {"target_modules": ["query"], "bias": "all", "modules_to_save": ["pooler"]},
    ),
    "dropout": ("llama", {"target_modules": ["q_proj"], "lora_dropout": 0.3}),
    "gaussian": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"}),
    "causal": ("llama", {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}),
    "fused-whole": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"]}),
}


@pytest.mark.parametrize("key", list(_THEIRS))
def test_what_peft_made_computes_the_same_here(key: str, tmp_path: Path) -> None:
    architecture, settings = _THEIRS[key]
    base = tiny_models.build(architecture)
    given = tiny_models.inputs(base)
    with _peft_may_warn():
        config = peft.LoraConfig(r=4, lora_alpha=7, **settings)
        theirs = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    live = tiny_models.outputs(theirs, given)
    written = _save_in_peft(theirs, tmp_path / "theirs")
    model = tiny_models.build(architecture)
    before = tiny_models.outputs(model, given)
    assert (live - before).abs().max() > 1e-4
    load_adapter(model, tmp_path / "theirs", "theirs")
    torch.testing.assert_close(tiny_models.outputs(model, given), live, rtol=1e-5, atol=1e-5)
    save_adapter(model, tmp_path / "ours", "theirs")
    ours = load_file(tmp_path / "ours" / TENSORS)
    _assert_tensors_equal(ours, written)
    # Once more into PEFT: the configuration that we wrote means the same.
    again = _in_peft(tiny_models.build(architecture), tmp_path / "ours")
    torch.testing.assert_close(tiny_models.outputs(again, given), live, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("with_head", [False, True])
def test_a_classifier_whose_head_is_not_part_of_the_adapter(
    with_head: bool, tmp_path: Path
) -> None:
    """PEFT looks for the head in a file whose task is SEQ_CLS."""

    def base() -> BertForSequenceClassification:
        torch.manual_seed(0)
        config = tiny_models.build("bert").config
        return BertForSequenceClassification(config).eval()

    model = base()
    also = ("classifier",) if with_head else ()
    attach_learned(model, LoraSpec(targets="qv", r=3, alpha=7.0, also_train=also))
    given = tiny_models.inputs(model)
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base(), str(tmp_path)).eval()
    assert theirs.peft_config["default"].task_type == ("SEQ_CLS" if with_head else None)
    torch.testing.assert_close(theirs(**given).logits, tiny_models.outputs(model, given))


@pytest.mark.parametrize(
    ("architecture", "beside"),
    [
        ("llama", ["embed_tokens", "lm_head"]),
        ("llama", ["lm_head"]),
        ("llama-tied", ["embed_tokens", "lm_head"]),
        ("gpt2", ["wte"]),
    ],
)
def test_a_vocabulary_that_grew_and_was_trained_beside(
    architecture: str, beside: list[str], tmp_path: Path
) -> None:
    """PEFT writes these embeddings twice, under their names and under its wrapper's."""

    def grown(where: str | Path | None = None) -> Any:
        torch.manual_seed(0)
        model = tiny_models.build(architecture)
        if where is None:
            return model
        model = type(model).from_pretrained(where)
        torch.manual_seed(0)
        model.resize_token_embeddings(tiny_models.VOCAB + 5)
        return model.eval()

    grown().save_pretrained(tmp_path / "base")
    targets = ["c_attn"] if architecture == "gpt2" else ["q_proj"]
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=targets, modules_to_save=beside)
    with _peft_may_warn():
        theirs = peft.get_peft_model(grown(tmp_path / "base"), config)
    shake(theirs)
    given = tiny_models.inputs(theirs)
    given["input_ids"][:, 2] = tiny_models.VOCAB + 3
    wanted = tiny_models.outputs(theirs.eval(), given)
    written = _save_in_peft(theirs, tmp_path / "theirs")
    assert any(key.endswith(".modules_to_save.weight") for key in written)
    model = grown(tmp_path / "base")
    load_adapter(model, tmp_path / "theirs")
    torch.testing.assert_close(tiny_models.outputs(model, given), wanted, rtol=1e-5, atol=1e-5)
    save_adapter(model, tmp_path / "ours")
    again = _in_peft(grown(tmp_path / "base"), tmp_path / "ours")
    torch.testing.assert_close(tiny_models.outputs(again, given), wanted, rtol=1e-5, atol=1e-5)


def test_targets_that_peft_read_as_an_expression(tmp_path: Path) -> None:
    model = tiny_models.build("llama")
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=r".*layers\.[01].*\.(q|o)_proj")
    theirs = peft.get_peft_model(model, config)
    shake(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    wanted = tiny_models.outputs(theirs.eval(), tiny_models.inputs(model))
    Adapter.load(tmp_path / "theirs").save(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(tiny_models.build("llama"), str(tmp_path / "ours"))
    torch.testing.assert_close(tiny_models.outputs(again.eval(), tiny_models.inputs(model)), wanted)


def test_a_model_free_copy_keeps_every_tensor(tmp_path: Path) -> None:
    for name in ("gpt2-parts-ranks", "vit-everything", "llama-patterns-rslora"):
        case = CASES[name]
        model = tiny_models.build(case.architecture)
        given = tiny_models.inputs(model)
        attach_learned(model, case.make())
        live = tiny_models.outputs(model, given)
        save_adapter(model, tmp_path / name / "one")
        Adapter.load(tmp_path / name / "one").save(tmp_path / name / "two")
        one = load_file(tmp_path / name / "one" / TENSORS)
        two = load_file(tmp_path / name / "two" / TENSORS)
        assert one.keys() == two.keys()
        assert all(one[k].equal(two[k]) for k in one)
        fresh = tiny_models.build(case.architecture)
        load_adapter(fresh, tmp_path / name / "two")
        # Parts with scalings of their own are folded into one when they are first written.
        atol = 1e-6 if name == "gpt2-parts-ranks" else 0
        torch.testing.assert_close(tiny_models.outputs(fresh, given), live, rtol=atol, atol=atol)


@pytest.mark.real
def test_smollm2_both_ways(smollm2: tuple, smollm2_path: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, tokenizer = smollm2
    given = dict(tokenizer(["The capital of France is"], return_tensors="pt"))
    spec = LoraSpec(r=4, alpha=10, targets="attention", rank_pattern={"v_proj": 6})
    attach_learned(model, spec, size=0.02)
    try:
        live = tiny_models.outputs(model, given)
        with use(model, None):
            assert (tiny_models.outputs(model, given) - live).abs().max() > 0.1
        save_adapter(model, tmp_path / "ours")
    finally:
        detach(model)
    base = AutoModelForCausalLM.from_pretrained(smollm2_path, dtype=torch.float32)
    theirs = _in_peft(base, tmp_path / "ours")
    error = (tiny_models.outputs(theirs, given) - live).abs().max()
    assert error <= 1e-5 * live.abs().max()
    written = _save_in_peft(theirs, tmp_path / "theirs")
    _assert_tensors_equal(load_file(tmp_path / "ours" / TENSORS), written)
    load_adapter(model, tmp_path / "theirs")
    try:
        assert (tiny_models.outputs(model, given) - live).abs().max() <= 1e-5 * live.abs().max()
    finally:
        detach(model)


@pytest.mark.real
def test_minilm_both_ways(minilm_path: Path, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm_path)
    given = dict(tokenizer(["a fine film", "a dull one, sadly"], padding=True, return_tensors="pt"))
    model = AutoModel.from_pretrained(minilm_path, dtype=torch.float32).eval()
    spec = LoraSpec(r=3, alpha=5, targets="all-linear", scaling="alpha/sqrt(r)", bias="lora_only")
    attach_learned(model, spec, size=0.02)
    live = tiny_models.outputs(model, given)
    save_adapter(model, tmp_path / "ours")
    base = AutoModel.from_pretrained(minilm_path, dtype=torch.float32)
    theirs = _in_peft(base, tmp_path / "ours")
    torch.testing.assert_close(tiny_models.outputs(theirs, given), live, rtol=1e-4, atol=1e-5)
    written = _save_in_peft(theirs, tmp_path / "theirs")
    _assert_tensors_equal(load_file(tmp_path / "ours" / TENSORS), written)
    detach(model)
    load_adapter(model, tmp_path / "theirs")
    torch.testing.assert_close(tiny_models.outputs(model, given), live, rtol=1e-4, atol=1e-5)
