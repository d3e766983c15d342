"""PEFT's `target_parameters` and `trainable_token_indices`: its own forward is what we compute."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny_models
from lorakit.adapters.adapter import Adapter
from lorakit.adapters.attach import use
from lorakit.adapters.composition.compose import compose_parts
from lorakit.adapters.composition.recipe import Part, Recipe
from lorakit.adapters.fold import merge, unmerge
from lorakit.adapters.prune import prune_adapter
from lorakit.adapters.spec import LoraSpec
from lorakit.adapters.stack import check_beneath, spec_to_continue
from lorakit.analysis.options import AnalyzeOptions
from lorakit.analysis.run import analyze
from lorakit.analysis.updates import Base
from lorakit.errors import AdapterFileError, RequestError, SpecError
from lorakit.formats.peft import load_adapter
from lorakit.merging.run import MergeRequest, merge_to_disk

pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def built(name: str) -> Any:
    if name in ("qwen3_moe", "gpt_oss"):
        return tiny_models.seeded(getattr(tiny_models, name), seed=5)
    return tiny_models.build(name)


@dataclass(frozen=True)
class Case:
    """An architecture, and how PEFT adapts it beside r = 3 and lora_alpha = 7."""

    architecture: str
    config: dict[str, Any] = field(default_factory=dict)


QV = {"target_modules": ["q_proj", "v_proj"]}
CASES = {
    "tokens": Case("llama", {**QV, "trainable_token_indices": [5, 9, 2]}),
    "tokens-tied": Case("llama-tied", {**QV, "trainable_token_indices": [5, 9]}),
    "tokens-of-both": Case(
        "llama", {**QV, "trainable_token_indices": {"embed_tokens": [5, 9], "lm_head": [3]}}
    ),
    "tokens-of-both-tied": Case(
        "llama-tied", {**QV, "trainable_token_indices": {"embed_tokens": [5], "lm_head": [3, 5]}}
    ),
    "tokens-alike-tied": Case(
        "llama-tied", {**QV, "trainable_token_indices": {"embed_tokens": [5], "lm_head": [5]}}
    ),
    "tokens-dora": Case("llama-tied", {**QV, "use_dora": True, "trainable_token_indices": [7]}),
    "tokens-scaled": Case("gemma3_text", {**QV, "trainable_token_indices": [5, 9]}),
    "tokens-gpt2": Case(
        "gpt2",
        {"target_modules": ["c_attn"], "fan_in_fan_out": True, "trainable_token_indices": [5]},
    ),
    "tokens-t5": Case("t5", {"target_modules": ["q"], "trainable_token_indices": [5, 9]}),
    "tokens-bert": Case("bert", {"target_modules": ["query"], "trainable_token_indices": [5, 9]}),
    "tokens-and-tied-head": Case(
        "llama-tied", {"target_modules": ["lm_head"], "trainable_token_indices": [4, 9]}
    ),
    "tying": Case(
        "llama-tied", {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}
    ),
    "tying-whole": Case(
        "llama-tied", {**QV, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    ),
    "tying-nothing": Case("llama", {**QV, "ensure_weight_tying": True}),
    "experts-by-module-names": Case(
        "qwen3_moe", {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]}
    ),
    "experts-all-linear": Case("qwen3_moe", {"target_modules": "all-linear"}),
    "experts": Case("qwen3_moe", {"target_modules": [], "target_parameters": EXPERTS}),
    "one-expert-weight": Case("qwen3_moe", {**QV, "target_parameters": EXPERTS[1:]}),
    "experts-patterns": Case(
        "qwen3_moe",
        {
            **QV,
            "target_parameters": EXPERTS,
            "use_rslora": True,
            "rank_pattern": {r".*\.gate_up_proj": 5, "q_proj": 2},
            "alpha_pattern": {r"layers\.0\.mlp\.experts\.down_proj": 4},
        },
    ),
    "experts-transposed": Case("gpt_oss", {**QV, "target_parameters": EXPERTS}),
    "router": Case("qwen3_moe", {**QV, "target_parameters": ["mlp.gate.weight", *EXPERTS]}),
    "weight-as-parameter": Case(
        "llama", {"target_modules": [], "target_parameters": ["q_proj.weight", "o_proj.weight"]}
    ),
    "experts-and-tokens": Case(
        "qwen3_moe", {**QV, "target_parameters": EXPERTS, "trainable_token_indices": [5, 9]}
    ),
}


def write(case: Case, path: Path, *, seed: int = 3) -> Any:
    """Save what PEFT has learned; the model that carries it, in PEFT."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped: Any = peft.get_peft_model(
            built(case.architecture), peft.LoraConfig(**{"r": 3, "lora_alpha": 7, **case.config})
        )
        generator = torch.Generator().manual_seed(seed)
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
        wrapped.save_pretrained(str(path))
    return wrapped.eval()


def logits(model: Any) -> Tensor:
    return tiny_models.outputs(model, tiny_models.inputs(model))


def in_peft(architecture: str, path: Path) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.PeftModel.from_pretrained(built(architecture), str(path)).eval()
    return logits(wrapped)


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_attached_merged_and_taken_out_again(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    wanted = logits(write(case, tmp_path))
    model, base = built(case.architecture), logits(built(case.architecture))
    load_adapter(model, tmp_path)
    close(logits(model), wanted)
    with use(model, None):
        assert logits(model).equal(base)
    merge(model)
    close(logits(model), wanted)
    unmerge(model)
    close(logits(model), wanted)
    with use(model, None):
        assert logits(model).equal(base)


@pytest.mark.parametrize("name", CASES)
def test_written_again_bit_for_bit(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    wanted = logits(write(case, tmp_path / "theirs"))
    Adapter.load(tmp_path / "theirs").save(tmp_path / "ours")
    first, again = (load_file(tmp_path / who / TENSORS) for who in ("theirs", "ours"))
    # PEFT also copies the frozen weight of an adapted embedding.
    first = {key: value for key, value in first.items() if not key.endswith("base_layer.weight")}
    assert first.keys() == again.keys()
    assert all(tensor.equal(again[key]) for key, tensor in first.items())
    close(in_peft(case.architecture, tmp_path / "ours"), wanted)


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.architecture != "bert"])
def test_merged_on_disk(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    wanted = logits(write(case, tmp_path / "adapter"))
    model = built(case.architecture)
    model.save_pretrained(tmp_path / "base")
    merge_to_disk(
        MergeRequest(
            adapter=tmp_path / "adapter", output=tmp_path / "merged", base=str(tmp_path / "base")
        )
    )
    merged = type(model).from_pretrained(tmp_path / "merged").eval()
    close(logits(merged), wanted)
    # Only different rows of what is tied part them.
    parted = ("tokens-of-both-tied", "tokens-and-tied-head", "tying", "tying-whole")
    tied = bool(model.config.tie_word_embeddings) and name not in parted
    assert bool(merged.config.tie_word_embeddings) == tied


def deltas(wrapped: Any, architecture: str) -> dict[str, Tensor]:
    """What PEFT's own merge changes of every parameter, tied ones each by its name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = wrapped.merge_and_unload()
    base = dict(built(architecture).named_parameters(remove_duplicate=False))
    return {
        name: (value - base[name]).detach()
        for name, value in merged.named_parameters(remove_duplicate=False)
        if not value.equal(base[name])
    }


def changed_logits(architecture: str, sums: dict[str, Tensor]) -> Tensor:
    model = built(architecture)
    tied = {id(p): n for n, p in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name in sums and tied.get(id(parameter)) == name:
                parameter += sums[name]
    return logits(model)


LORA_ON = {"embed": {"target_modules": ["embed_tokens", "q_proj"]}}
SUMS: dict[str, tuple[str, list[dict[str, Any]], bool]] = {
    "tokens": ("llama", [CASES["tokens"].config, {**QV, "trainable_token_indices": [9, 4]}], True),
    "tokens-tied": (
        "llama-tied",
        [CASES["tokens-tied"].config, {**QV, "trainable_token_indices": [9, 4]}],
        True,
    ),
    "tokens-beside-lora": ("llama", [CASES["tokens"].config, LORA_ON["embed"]], True),
    "tokens-beside-whole": (
        "llama",
        [CASES["tokens"].config, {**QV, "modules_to_save": ["embed_tokens"]}],
        True,
    ),
    "experts": ("qwen3_moe", [CASES["experts"].config, CASES["experts-patterns"].config], False),
    "experts-beside-none": (
        "qwen3_moe",
        [CASES["one-expert-weight"].config, {"target_modules": ["q_proj"]}],
        False,
    ),
    "experts-beside-whole": (
        "qwen3_moe",
        [CASES["experts"].config, {**QV, "modules_to_save": ["mlp.experts"]}],
        True,
    ),
    "experts-transposed": (
        "gpt_oss",
        [CASES["experts-transposed"].config, {**QV, "target_parameters": EXPERTS[:1]}],
        False,
    ),
    "weight-as-parameter": (
        "llama",
        [CASES["weight-as-parameter"].config, {"target_modules": ["q_proj"]}],
        True,
    ),
}


@pytest.mark.parametrize("how", ["cat", "linear"])
@pytest.mark.parametrize("name", SUMS)
def test_sums_are_the_sums_of_what_peft_merges(name: str, how: str, tmp_path: Path) -> None:
    architecture, configs, needs_base = SUMS[name]
    weights = (0.7, -0.4)
    sums: dict[str, Tensor] = {}
    parts: list[Part] = []
    for i, (config, weight) in enumerate(zip(configs, weights, strict=True)):
        path = tmp_path / str(i)
        wrapped = write(Case(architecture, config), path, seed=i + 3)
        for key, delta in deltas(wrapped, architecture).items():
            sums[key] = sums.get(key, 0) + weight * delta
        parts.append(Part(str(i), Adapter.load(path), weight))
    base = built(architecture) if needs_base else None
    if needs_base and "weight" not in name:
        with pytest.raises(SpecError, match="base"):
            compose_parts(parts, Recipe(how=how))
    made = compose_parts(parts, Recipe(how=how), base=base, quiet=True)
    made.adapter.save(tmp_path / "sum")
    wanted = changed_logits(architecture, sums)
    close(in_peft(architecture, tmp_path / "sum"), wanted)
    model = built(architecture)
    load_adapter(model, tmp_path / "sum")
    close(logits(model), wanted)


@pytest.mark.parametrize("name", ["tokens-tied", "experts-patterns", "experts-transposed"])
def test_one_part_at_weight_1_is_itself(name: str, tmp_path: Path) -> None:
    write(CASES[name], tmp_path / "one")
    part = Part("one", Adapter.load(tmp_path / "one"), 1.0)
    compose_parts([part], Recipe()).adapter.save(tmp_path / "same")
    first, again = (load_file(tmp_path / who / TENSORS) for who in ("one", "same"))
    assert first.keys() == again.keys()
    assert all(tensor.equal(again[key]) for key, tensor in first.items())


@pytest.mark.parametrize("name", ["experts-patterns", "experts-transposed", "tokens-tied"])
def test_analyzed_as_peft_changes_the_weights(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    changed = deltas(write(case, tmp_path / "one"), case.architecture)
    write(case, tmp_path / "two", seed=8)
    base = built(case.architecture)
    weights = {n: p.detach() for n, p in base.named_parameters(remove_duplicate=False)}
    found = analyze([tmp_path / "one", tmp_path / "two"], base=Base(base))
    mine = [site for site in found.sites if site.adapter == "one"]
    left = set(changed)
    for site in mine:
        parameter, _, index = site.site.rpartition(".")
        whole = changed.get(f"{site.site}.weight", changed.get(parameter))
        weight = weights.get(f"{site.site}.weight", weights.get(parameter))
        assert whole is not None and weight is not None  # noqa: PT018
        if whole.ndim == 3:
            whole, weight = whole[int(index)], weight[int(index)]
        left -= {f"{site.site}.weight", parameter}
        norm = float(whole.double().norm())
        assert site.spectrum.norm == pytest.approx(norm, rel=1e-4)
        assert site.relative_norm == pytest.approx(norm / float(weight.double().norm()), rel=1e-4)
    assert not left
    assert {found.agreement[i].site for i in range(len(found.agreement))} == {s.site for s in mine}


def test_rows_of_tokens_alone_are_not_analyzed_without_the_base(tmp_path: Path) -> None:
    write(CASES["tokens"], tmp_path / "one")
    options = AnalyzeOptions(sites=("embed_tokens",))
    with pytest.raises(RequestError, match="rows of tokens"):
        analyze([tmp_path / "one"], AnalyzeOptions(sites=("embed_tokens",)))
    found = analyze([tmp_path / "one"], options, base=Base(built("llama")))
    assert [site.site for site in found.sites] == ["model.embed_tokens"]
    found = analyze([tmp_path / "one"])
    assert "rows of tokens in model.embed_tokens" in " ".join(found.notes)


def test_both_layouts_of_experts_in_one_sum(tmp_path: Path) -> None:
    """The older layout turned by PEFT's own rule, not by ours: W[e] + s (B A)^T."""
    wrapped = write(CASES["experts"], tmp_path / "new")
    wanted = logits(wrapped)
    config = json.loads((tmp_path / "new" / CONFIG).read_text())
    old: dict[str, Tensor] = {}
    for key, tensor in load_file(tmp_path / "new" / TENSORS).items():
        # A (4 r, in), B (out, r 4) of one expert are those of its transpose in the other's place.
        other = load_file(tmp_path / "new" / TENSORS)[
            key.replace("lora_A", "?").replace("lora_B", "lora_A").replace("?", "lora_B")
        ]
        if "lora_A" in key:
            old[key] = torch.cat([other.reshape(-1, 3, 4)[:, :, e].T for e in range(4)])
        else:
            mine = other.reshape(4, 3, -1)
            old[key] = torch.stack([mine[e].T for e in range(4)], dim=-1).flatten(1)
        assert old[key].numel() == other.numel()
        assert tensor.ndim == 2
    (tmp_path / "old").mkdir()
    save_file({k: v.contiguous() for k, v in old.items()}, tmp_path / "old" / TENSORS)
    (tmp_path / "old" / CONFIG).write_text(json.dumps({**config, "peft_version": "0.18.1"}))
    model = built("qwen3_moe")
    load_adapter(model, tmp_path / "old")
    close(logits(model), wanted)
    parts = [Part(n, Adapter.load(tmp_path / n), w) for n, w in (("old", 1.4), ("new", -0.4))]
    with pytest.raises(SpecError, match=r"0\.19"):
        compose_parts(parts, Recipe())
    made = compose_parts(parts, Recipe(), base=built("qwen3_moe"), quiet=True)
    made.adapter.save(tmp_path / "sum")
    close(in_peft("qwen3_moe", tmp_path / "sum"), wanted)


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "fewer tokens": ("tokens", {"trainable_token_indices": [5, 9]}, "trainable_token_indices"),
    "no tokens": ("tokens", {"trainable_token_indices": None}, "trainable_token_indices"),
    "a token beyond": ("tokens", {"trainable_token_indices": [5, 9, 999]}, "999"),
    "a token twice": ("tokens", {"trainable_token_indices": [5, 9, 9]}, "trainable_token_indices"),
    "a number": ("tokens", {"trainable_token_indices": 7}, "trainable_token_indices"),
    "another rank": ("experts", {"r": 5}, "rank 5"),
    "one parameter of two": ("experts", {"target_parameters": EXPERTS[:1]}, "target_parameters"),
    "a number of parameters": ("experts", {"target_parameters": 3}, "target_parameters"),
    "unknown order": (
        "experts",
        {"target_parameters": ["mlp.experts.w1", "mlp.experts.w2"]},
        "target_parameters",
    ),
    "another parameter": (
        "one-expert-weight",
        {"target_parameters": ["mlp.experts.gate_up_proj"]},
        "misshapen",
    ),
    "no such parameter": (
        "one-expert-weight",
        {"target_parameters": ["mlp.experts.w1"]},
        "no such parameter",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_configuration_that_does_not_fit_is_an_error(name: str, tmp_path: Path) -> None:
    case, changed, reason = WRONG[name]
    write(CASES[case], tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, **changed}))
    with pytest.raises(AdapterFileError) as caught:
        load_adapter(built(CASES[case].architecture), tmp_path)
    assert reason in str(caught.value)


def test_what_has_no_place_is_refused_with_the_reason(tmp_path: Path) -> None:
    write(CASES["experts"], tmp_path / "experts")
    write(CASES["tokens"], tmp_path / "tokens")
    experts, tokens = (Adapter.load(tmp_path / name) for name in ("experts", "tokens"))
    with pytest.raises(AdapterFileError, match="one rank"):
        prune_adapter(experts, energy=0.5)
    pruned = prune_adapter(tokens, energy=0.5).adapter
    assert pruned.tokens == tokens.tokens
    for adapter in (experts, tokens):
        with pytest.raises(SpecError, match="whole parameters"):
            spec_to_continue(adapter, dropout=0.0)
        with pytest.raises(SpecError, match="on top of"):
            check_beneath(adapter, LoraSpec())


def test_a_tie_that_the_file_does_not_hold_is_an_error(tmp_path: Path) -> None:
    write(CASES["tying"], tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    save_file({k: v for k, v in tensors.items() if "lm_head" not in k}, tmp_path / TENSORS)
    with pytest.raises(AdapterFileError, match=r"lm_head: tied to model\.embed_tokens"):
        load_adapter(built("llama-tied"), tmp_path)


def test_a_module_both_adapted_and_replaced_is_an_error(tmp_path: Path) -> None:
    write(Case("llama", QV), tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    name = "base_model.model.model.layers.0.self_attn.q_proj.weight"
    save_file({**tensors, name: torch.ones(32, 32)}, tmp_path / TENSORS)
    with pytest.raises(AdapterFileError, match="both adapted and replaced"):
        load_adapter(built("llama"), tmp_path)


def test_rows_of_tokens_under_dora_are_an_error(tmp_path: Path) -> None:
    write(Case("llama-tied", {"target_modules": ["lm_head"], "use_dora": True}), tmp_path)
    tensors, config = load_file(tmp_path / TENSORS), json.loads((tmp_path / CONFIG).read_text())
    rows = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    save_file({**tensors, rows: torch.ones(1, 32)}, tmp_path / TENSORS)
    (tmp_path / CONFIG).write_text(json.dumps({**config, "trainable_token_indices": [3]}))
    with pytest.raises(AdapterFileError, match="DoRA changes all of them"):
        load_adapter(built("llama-tied"), tmp_path)
