"""The merge on disk: plain transformers loads from the output what the live adapter says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

import tiny_models
from learned import attach_learned, expected_warning
from lorakit.adapters.adapter import Adapter
from lorakit.adapters.attach import attach
from lorakit.adapters.spec import LoraSpec
from lorakit.errors import (
    AdapterFileError,
    BaseMismatchError,
    LorakitError,
    LorakitWarning,
    MergeError,
    ModelError,
    OutputError,
)
from lorakit.formats.peft import load_adapter, save_adapter
from lorakit.merging.certificate import TOLERANCE
from lorakit.merging.run import MergeRequest, merge_to_disk

_AUTO = {"bert": AutoModel, "vit": AutoModel, "t5": AutoModelForSeq2SeqLM, "deberta-v2": AutoModel}
_TIED = "shares its weight"

# name -> architecture, spec, warning
_MERGES: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "llama": ("llama", {"targets": "all-linear", "r": 3, "alpha": 5}, None),
    "llama-rslora-patterns": (
        "llama",
        {"scaling": "alpha/sqrt(r)", "rank_pattern": {"v_proj": 6}, "alpha_pattern": {"q_proj": 3}},
        None,
    ),
    "llama-head-beside": ("llama", {"also_train": ("lm_head", "norm")}, None),
    "llama-tied-embedding": ("llama-tied", {"targets": ("embed_tokens", "q_proj")}, _TIED),
    "llama-tied-head-beside": ("llama-tied", {"also_train": ("lm_head",)}, _TIED),
    "llama-tied-qv": ("llama-tied", {}, None),
    "gemma3-embedding": ("gemma3_text", {"targets": ("embed_tokens", "q_proj")}, _TIED),
    "gpt2": ("gpt2", {"targets": "all-linear"}, None),
    "gpt2-parts": ("gpt2", {"rank_pattern": {"c_attn.v": 5}}, None),
    "gpt2-bias": ("gpt2", {"targets": ("c_attn",), "bias": "all"}, None),
    "gpt2-tokens": ("gpt2", {"targets": ("wte", "wpe")}, _TIED),
    "phi3-parts": ("phi3", {"targets": ("qkv_proj.v", "gate_up_proj.up")}, None),
    "bloom": ("bloom", {}, None),
    "falcon-grouped": ("falcon-grouped", {}, None),
    "neox": ("gpt_neox", {"bias": "lora_only", "targets": ("query_key_value",)}, None),
    "opt": ("opt", {"targets": "all-linear", "bias": "all"}, None),
    "t5": ("t5", {"targets": "all-linear"}, None),
    "t5-embeddings": ("t5", {"targets": ("embed_tokens", "q")}, _TIED),
    "bert": ("bert", {"targets": "all-linear", "bias": "lora_only"}, None),
    "deberta": ("deberta-v2", {}, None),
    "vit": ("vit", {"targets": "all-linear"}, None),
    "vit-conv": ("vit", {"targets": ("projection", "q_proj"), "also_train": ("pooler",)}, None),
}


def _saved_base(model: PreTrainedModel, path: Path, **options: Any) -> Path:
    model.save_pretrained(path, **options)
    return path


def _reload(architecture: str, path: Path, **options: Any) -> PreTrainedModel:
    auto = _AUTO.get(architecture, AutoModelForCausalLM)
    return auto.from_pretrained(path, **options).eval()


def _adapter(
    architecture: str, base: Path, out: Path, spec: LoraSpec, warns: str | None = None
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Train-like an adapter on the saved base; returns live logits and the inputs."""
    model = _reload(architecture, base)
    given = tiny_models.inputs(model)
    attach_learned(model, spec, warns=warns)
    save_adapter(model, out)
    return tiny_models.outputs(model, given), given


def _assert_clean(output: Path) -> None:
    names = {p.name for p in output.iterdir()}
    assert not [n for n in names if "adapter" in n or n.startswith(".") or n == "lorakit.json"]
    assert {"config.json", "merge.json"} <= names
    assert [n for n in names if n.endswith(".safetensors")]


def _assert_nothing_left(tmp_path: Path, *kept: str) -> None:
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(kept)


# A merge with its proof takes a second: the long tail runs when asked for.
_SLOW = {"bloom", "neox", "falcon-grouped", "deberta", "gpt2-bias", "llama-rslora-patterns", "vit"}
_SLOW |= {"llama-tied-qv", "llama-tied-head-beside", "gemma3-embedding", "t5"}


@pytest.mark.parametrize(
    "key",
    [pytest.param(k, marks=[pytest.mark.slow] if k in _SLOW else []) for k in _MERGES],
)
def test_plain_transformers_loads_the_live_model(key: str, tmp_path: Path) -> None:
    architecture, settings, warns = _MERGES[key]
    base = _saved_base(tiny_models.build(architecture), tmp_path / "base")
    spec = LoraSpec(**{"r": 3, "alpha": 7.5, **settings})
    live, given = _adapter(architecture, base, tmp_path / "adapter", spec, warns)
    certificate = merge_to_disk(
        MergeRequest(adapter=tmp_path / "adapter", output=tmp_path / "out", base=str(base))
    )
    _assert_clean(tmp_path / "out")
    merged, info = _AUTO.get(architecture, AutoModelForCausalLM).from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(
        tiny_models.outputs(merged.eval(), given), live, rtol=1e-5, atol=2e-5
    )
    assert json.loads((tmp_path / "out" / "merge.json").read_text()) == json.loads(
        json.dumps(certificate)
    )
    assert certificate["max_abs_logit_error"] < 1e-4
    _assert_nothing_left(tmp_path, "base", "adapter", "out")
    # The base and the adapter are as they were.
    Adapter.load(tmp_path / "adapter")
    torch.testing.assert_close(
        tiny_models.outputs(_reload(architecture, base), given),
        tiny_models.outputs(tiny_models.build(architecture), given),
        rtol=0,
        atol=0,
    )


def test_a_checkpoint_without_the_transformer_prefix(tmp_path: Path) -> None:
    # The real gpt2 checkpoint is saved from GPT2Model: no "transformer." in its names.
    causal = tiny_models.build("gpt2")
    causal.transformer.save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["architectures"] = ["GPT2LMHeadModel"]
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    assert "h.0.attn.c_attn.weight" in load_file(tmp_path / "base" / "model.safetensors")
    spec = LoraSpec(r=3, alpha=5, targets=("c_attn.q", "c_proj"))
    live, given = _adapter("gpt2", tmp_path / "base", tmp_path / "adapter", spec)
    merge_to_disk(
        MergeRequest(
            adapter=tmp_path / "adapter", output=tmp_path / "out", base=str(tmp_path / "base")
        )
    )
    merged = _reload("gpt2", tmp_path / "out")
    torch.testing.assert_close(tiny_models.outputs(merged, given), live, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("key", ["phi3-parts", "llama-tied-embedding"])
def test_a_sharded_checkpoint(key: str, tmp_path: Path) -> None:
    architecture, settings, warns = _MERGES[key]
    base = _saved_base(tiny_models.build(architecture), tmp_path / "base", max_shard_size="30KB")
    assert len(list(base.glob("*.safetensors"))) >= 3
    spec = LoraSpec(**{"r": 3, "alpha": 7.5, **settings})
    live, given = _adapter(architecture, base, tmp_path / "adapter", spec, warns)
    merge_to_disk(
        MergeRequest(adapter=tmp_path / "adapter", output=tmp_path / "out", base=str(base))
    )
    merged = _reload(architecture, tmp_path / "out")
    torch.testing.assert_close(tiny_models.outputs(merged, given), live, rtol=1e-5, atol=2e-5)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    stored: dict[str, str] = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        stored |= dict.fromkeys(load_file(file), file.name)
    assert index["weight_map"] == stored


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_checkpoint_keeps_its_dtype_and_rounds_once(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    base = _saved_base(tiny_models.build("llama").to(dtype), tmp_path / "base")
    spec = LoraSpec(r=3, alpha=5, targets="all-linear")
    _adapter("llama", base, tmp_path / "adapter", spec)
    merge_to_disk(
        MergeRequest(adapter=tmp_path / "adapter", output=tmp_path / "out", base=str(base))
    )
    before = load_file(base / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    adapter = Adapter.load(tmp_path / "adapter")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert after[name].dtype == weight.dtype
        module = name.removesuffix(".weight")
        if module not in adapter.factors:
            assert after[name].equal(weight)
            continue
        f = adapter.factors[module]
        exact = weight.double() + f.scaling * (f.B.double() @ f.A.double())
        # The float32 sum may fall on the other side of a tie, hardly ever.
        assert (after[name] != exact.to(dtype)).float().mean() < 0.005


def test_only_the_adapted_tensors_change(tmp_path: Path) -> None:
    base = _saved_base(tiny_models.build("llama"), tmp_path / "base")
    _adapter("llama", base, tmp_path / "adapter", LoraSpec(r=2, targets=("layers.1.mlp.up_proj",)))
    merge_to_disk(
        MergeRequest(adapter=tmp_path / "adapter", output=tmp_path / "out", base=str(base))
    )
    before = load_file(base / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    changed = [k for k in before if not before[k].equal(after[k])]
    assert changed == ["model.layers.1.mlp.up_proj.weight"]


def _expect_refusal(
    kind: type[LorakitError], tmp_path: Path, *kept: str, match: str | None = None, **changes: Any
) -> None:
    request = {
        "adapter": tmp_path / "adapter",
        "output": tmp_path / "out",
        "base": str(tmp_path / "base"),
    }
    with pytest.raises(kind, match=match):
        merge_to_disk(MergeRequest(**{**request, **changes}))
    _assert_nothing_left(tmp_path, *kept)


def test_an_adapter_that_changes_nothing_is_refused(tmp_path: Path) -> None:
    model = tiny_models.build("llama")
    _saved_base(model, tmp_path / "base")
    attach(model, LoraSpec())
    save_adapter(model, tmp_path / "adapter")
    with pytest.warns(LorakitWarning, match="changes nothing"):
        _expect_refusal(MergeError, tmp_path, "base", "adapter")


def test_a_merge_that_does_not_answer_as_the_live_adapter_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_models.build("llama")
    _saved_base(model, tmp_path / "base")
    attach_learned(model, LoraSpec(r=2, alpha=3, targets="all-linear"))
    save_adapter(model, tmp_path / "adapter")
    # Adding in another order moves the last bits: less than that is asked for here.
    monkeypatch.setitem(TOLERANCE, "float32", 1e-12)
    _expect_refusal(MergeError, tmp_path, "base", "adapter", match="does not answer as")


@pytest.mark.parametrize("size", [1e-7, 1e-6])
def test_a_delta_that_bfloat16_rounds_away_is_refused(size: float, tmp_path: Path) -> None:
    base = _saved_base(tiny_models.build("llama").to(torch.bfloat16), tmp_path / "base")
    model = _reload("llama", base, dtype=torch.float32)
    attach_learned(model, LoraSpec(r=2, alpha=3), size=0.0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_B" in name:
                parameter.fill_(size)
    save_adapter(model, tmp_path / "adapter")
    _expect_refusal(MergeError, tmp_path, "base", "adapter")


def test_an_output_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    base = _saved_base(tiny_models.build("llama"), tmp_path / "base")
    _adapter("llama", base, tmp_path / "adapter", LoraSpec())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    _expect_refusal(OutputError, tmp_path, "base", "adapter", "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.txt"]
    # Least of all over the base.
    _expect_refusal(OutputError, tmp_path, "base", "adapter", "out", output=base)


def test_another_base_is_refused_unless_asked_for(tmp_path: Path) -> None:
    base = _saved_base(tiny_models.build("llama"), tmp_path / "base")
    _adapter("llama", base, tmp_path / "adapter", LoraSpec())
    other = _saved_base(tiny_models.build("llama", seed=3), tmp_path / "other")
    _expect_refusal(BaseMismatchError, tmp_path, "base", "adapter", "other", base=str(other))
    merge_to_disk(
        MergeRequest(
            adapter=tmp_path / "adapter", output=tmp_path / "out", base=str(other), any_base=True
        )
    )
    fresh = _reload("llama", other)
    load_adapter(fresh, tmp_path / "adapter", any_base=True)
    given = tiny_models.inputs(fresh)
    torch.testing.assert_close(
        tiny_models.outputs(_reload("llama", tmp_path / "out"), given),
        tiny_models.outputs(fresh, given),
        rtol=1e-5,
        atol=2e-5,
    )


def test_an_adapter_of_another_architecture_is_refused(tmp_path: Path) -> None:
    base = _saved_base(tiny_models.build("llama"), tmp_path / "base")
    _adapter("llama", base, tmp_path / "adapter", LoraSpec())
    _saved_base(tiny_models.build("gpt2"), tmp_path / "other")
    _expect_refusal(
        AdapterFileError, tmp_path, "base", "adapter", "other", base=str(tmp_path / "other")
    )


def test_missing_parts_are_said(tmp_path: Path) -> None:
    base = _saved_base(tiny_models.build("llama"), tmp_path / "base")
    _expect_refusal(AdapterFileError, tmp_path, "base")
    _adapter("llama", base, tmp_path / "adapter", LoraSpec())
    _expect_refusal(ModelError, tmp_path, "base", "adapter", base=str(tmp_path / "nowhere"))


@pytest.mark.parametrize("how", ["truncated", "empty", "not-finite"])
def test_a_broken_base_is_refused_and_leaves_nothing(how: str, tmp_path: Path) -> None:
    base = _saved_base(tiny_models.build("llama"), tmp_path / "base")
    _adapter("llama", base, tmp_path / "adapter", LoraSpec())
    file = base / "model.safetensors"
    if how == "not-finite":
        model = tiny_models.build("llama")
        with torch.no_grad():
            model.model.layers[1].self_attn.q_proj.weight[3, 3] = float("nan")
        _saved_base(model, base)
    else:
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2] if how == "truncated" else b"")
    _expect_refusal(LorakitError, tmp_path, "base", "adapter", any_base=True)


def test_the_adapters_own_base_name_is_used_and_can_be_absent(tmp_path: Path) -> None:
    base = _saved_base(tiny_models.build("llama"), tmp_path / "base")
    live, given = _adapter("llama", base, tmp_path / "adapter", LoraSpec())
    merge_to_disk(MergeRequest(adapter=tmp_path / "adapter", output=tmp_path / "out"))
    merged = _reload("llama", tmp_path / "out")
    torch.testing.assert_close(tiny_models.outputs(merged, given), live, rtol=1e-5, atol=2e-5)
    nameless = tiny_models.build("llama")
    attach_learned(nameless, LoraSpec())
    save_adapter(nameless, tmp_path / "nameless")
    with pytest.raises(LorakitError, match="base"):
        merge_to_disk(MergeRequest(adapter=tmp_path / "nameless", output=tmp_path / "out2"))
    _assert_nothing_left(tmp_path, "base", "adapter", "out", "nameless")


def test_the_certificate_says_what_was_proved(tmp_path: Path) -> None:
    base = _saved_base(tiny_models.build("llama"), tmp_path / "base")
    _adapter("llama", base, tmp_path / "adapter", LoraSpec(targets="all-linear"))
    told = merge_to_disk(
        MergeRequest(adapter=tmp_path / "adapter", output=tmp_path / "out", base=str(base))
    )
    text = json.dumps(told)
    for fact in ("max_abs_logit_error", "layers", "dtype", "seconds", "adapter", "base"):
        assert fact in text, f"{fact} is not in {text}"


def test_a_classifier_head_beside_is_merged(tmp_path: Path) -> None:
    config = tiny_models.build("bert").config
    config.num_labels = 3
    torch.manual_seed(1)
    model = transformers.BertForSequenceClassification(config).eval()
    base = _saved_base(model, tmp_path / "base")
    model = transformers.BertForSequenceClassification.from_pretrained(base).eval()
    given = tiny_models.inputs(model)
    with expected_warning(None):
        attach_learned(model, LoraSpec(also_train=("classifier",)))
    live = tiny_models.outputs(model, given)
    save_adapter(model, tmp_path / "adapter")
    merge_to_disk(
        MergeRequest(adapter=tmp_path / "adapter", output=tmp_path / "out", base=str(base))
    )
    merged = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(tiny_models.outputs(merged, given), live, rtol=1e-5, atol=2e-5)
