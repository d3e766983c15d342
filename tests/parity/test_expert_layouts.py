"""Expert weights: PEFT's stacked layouts with patterns and in bfloat16, and experts one by one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

import tiny_models
from lorakit.converting import convert
from lorakit.errors import AdapterFileError, WorkError
from lorakit.formats import peft_experts

# PEFT looks for patterns among modules only, and warns of those that it finds at parameters.
pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
EXPERTS, HIDDEN, INSIDE = 4, 32, 24


def mixtral() -> Any:
    config = MixtralConfig(
        vocab_size=128,
        hidden_size=HIDDEN,
        intermediate_size=INSIDE,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        pad_token_id=0,
    )
    return tiny_models.seeded(lambda: MixtralForCausalLM(config))


def qwen3_moe() -> Any:
    return tiny_models.seeded(tiny_models.qwen3_moe)


def logits(model: Any) -> Tensor:
    return tiny_models.outputs(model, {"input_ids": torch.arange(3, 12)[None]})


def stacked(path: Path, dtype: torch.dtype = torch.float32) -> tuple[Path, Path, Tensor]:
    """An adapter of today's PEFT with two ranks; the directory, the base's, its logits."""
    model = qwen3_moe()
    model.save_pretrained(path / "base")
    config = peft.LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        rank_pattern={r".*\.gate_up_proj": 5},
        alpha_pattern={r".*\.gate_up_proj": 4},
    )
    adapted = peft.get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
                parameter.copy_(parameter.to(dtype))
    wanted = logits(adapted)
    adapted.save_pretrained(path / "new")
    file = path / "new" / "adapter_model.safetensors"
    save_file({k: t.to(dtype) for k, t in load_file(file).items()}, file)
    return path / "new", path / "base", wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ranks_of_parameters_and_dtypes_are_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    new, base, wanted = stacked(tmp_path, dtype)
    record = convert(new, tmp_path / "old", "peft-0.18", base=str(base))
    assert (record["moved"], record["as_they_were"]) == (4, 0)
    tensors = load_file(tmp_path / "old" / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {dtype}
    convert(tmp_path / "old", tmp_path / "again", "peft-0.19", base=str(base))
    first = load_file(new / "adapter_model.safetensors")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert first.keys() == again.keys()
    assert all(tensor.equal(again[name]) for name, tensor in first.items())
    fresh = peft.PeftModel.from_pretrained(qwen3_moe(), tmp_path / "again").eval()
    torch.testing.assert_close(logits(fresh), wanted, rtol=1e-4, atol=1e-5)


def test_half_an_expert_update_is_refused(tmp_path: Path) -> None:
    new, base, _ = stacked(tmp_path)
    file = new / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors["base_model.model.model.layers.0.mlp.experts.lora_B.weight"]
    save_file(tensors, file)
    with pytest.raises(AdapterFileError, match="stands without the other"):
        convert(new, tmp_path / "old", "peft-0.18", base=str(base))


def test_moved_experts_are_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new, base, _ = stacked(tmp_path)

    def careless(tensors: dict[str, Tensor], file: str, metadata: dict[str, str]) -> None:
        name = next(name for name in tensors if ".experts." in name)
        save_file({**tensors, name: tensors[name] * 1.001}, file, metadata)

    monkeypatch.setattr(peft_experts, "save_file", careless)
    with pytest.raises(WorkError, match="does not read back"):
        convert(new, tmp_path / "old", "peft-0.18", base=str(base))
    assert not (tmp_path / "old").exists()


# Block, experts' leaves for gate, up and down as transformers 4 had them.
OneByOne = tuple[Callable[[], Any], str, tuple[str, str, str]]
ONE_BY_ONE: dict[str, OneByOne] = {
    "mixtral": (mixtral, "block_sparse_moe", ("w1", "w3", "w2")),
    "qwen3_moe": (qwen3_moe, "mlp", ("gate_proj", "up_proj", "down_proj")),
}


def one_by_one(
    case: str, path: Path, leaves: tuple[str, ...], *, router: bool = False, **changed: Any
) -> dict[str, Tensor]:
    """An adapter as PEFT 0.18 beside transformers 4 saved it; name -> s B A, by hand."""
    _, block, _ = ONE_BY_ONE[case]
    generator = torch.Generator().manual_seed(5)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "base",
        "peft_version": "0.18.0",
        "r": 3,
        "lora_alpha": 7,
        "target_modules": ["q_proj", *leaves, *["gate"] * router],
        **changed,
    }
    ranks: dict[str, int] = config.get("rank_pattern", {})
    tensors: dict[str, Tensor] = {}
    deltas: dict[str, Tensor] = {}
    for layer in range(2):
        names = {f"model.layers.{layer}.self_attn.q_proj": (HIDDEN, HIDDEN)}
        for expert in range(EXPERTS):
            for leaf in leaves:
                shape = (HIDDEN, INSIDE) if leaf in ("w2", "down_proj") else (INSIDE, HIDDEN)
                names[f"model.layers.{layer}.{block}.experts.{expert}.{leaf}"] = shape
        if router:
            names[f"model.layers.{layer}.{block}.gate"] = (EXPERTS, HIDDEN)
        for name, (out, into) in names.items():
            r = next((r for end, r in ranks.items() if name.endswith(end)), 3)
            scale = config["lora_alpha"] / (r**0.5 if config.get("use_rslora") else r)
            A = 0.3 * torch.randn(r, into, generator=generator)
            B = 0.3 * torch.randn(out, r, generator=generator)
            tensors[f"base_model.model.{name}.lora_A.weight"] = A
            tensors[f"base_model.model.{name}.lora_B.weight"] = B
            deltas[name] = scale * (B @ A)
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    (path / "adapter_config.json").write_text(json.dumps(config))
    return deltas


def changed_by_hand(case: str, deltas: dict[str, Tensor]) -> Any:
    """The base with every change added to the weights that hold it today."""
    build, block, (gate, up, _) = ONE_BY_ONE[case]
    model = build()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, delta in deltas.items():
            owner, _, leaf = name.rpartition(".")
            if ".experts." not in name:
                parameters[f"{name.replace(block, 'mlp')}.weight"].add_(delta)
                continue
            owner, _, expert = owner.rpartition(".")
            owner = owner.replace(block, "mlp")
            if leaf in (gate, up):
                rows = slice(0, INSIDE) if leaf == gate else slice(INSIDE, None)
                parameters[f"{owner}.gate_up_proj"][int(expert), rows] += delta
            else:
                parameters[f"{owner}.down_proj"][int(expert)] += delta
    return model


@pytest.mark.parametrize("case", ONE_BY_ONE)
@pytest.mark.parametrize("which", ["all", "gate", "gate-up", "down"])
@pytest.mark.parametrize("rslora", [False, True])
def test_experts_one_by_one_are_stacked(
    case: str, which: str, rslora: bool, tmp_path: Path
) -> None:
    build, _, (gate, up, down) = ONE_BY_ONE[case]
    leaves = {"all": (gate, up, down), "gate": (gate,), "gate-up": (gate, up), "down": (down,)}
    build().save_pretrained(tmp_path / "base")
    deltas = one_by_one(case, tmp_path / "old", leaves[which], use_rslora=rslora)
    wanted = logits(changed_by_hand(case, deltas))
    record = convert(tmp_path / "old", tmp_path / "new", "peft-0.19", base=str(tmp_path / "base"))
    assert record["stacked"] == len(deltas) - 2
    ours = peft.PeftModel.from_pretrained(build(), tmp_path / "new").eval()
    torch.testing.assert_close(logits(ours), wanted, rtol=1e-4, atol=1e-5)
    # And in the layout of 0.18, turned back.
    convert(tmp_path / "old", tmp_path / "first", "peft-0.18", base=str(tmp_path / "base"))
    convert(tmp_path / "first", tmp_path / "again", "peft-0.19", base=str(tmp_path / "base"))
    one, two = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("new", "again"))
    assert one.keys() == two.keys()
    assert all(tensor.equal(two[name]) for name, tensor in one.items())


def test_experts_with_scalings_and_ranks_of_their_own(tmp_path: Path) -> None:
    mixtral().save_pretrained(tmp_path / "base")
    deltas = one_by_one(
        "mixtral",
        tmp_path / "old",
        ("w1", "w3", "w2"),
        router=True,
        alpha_pattern={"w3": 14, "experts.2.w2": 1},
        rank_pattern={"experts.1.w1": 5, "w2": 2, "q_proj": 4},
    )
    for name in deltas:
        if name.endswith("w3"):
            deltas[name] *= 2
        if name.endswith("experts.2.w2"):
            deltas[name] /= 7
    convert(tmp_path / "old", tmp_path / "new", "peft-0.19", base=str(tmp_path / "base"))
    ours = peft.PeftModel.from_pretrained(mixtral(), tmp_path / "new").eval()
    wanted = logits(changed_by_hand("mixtral", deltas))
    torch.testing.assert_close(logits(ours), wanted, rtol=1e-4, atol=1e-5)


def test_experts_one_by_one_that_fit_no_stack(tmp_path: Path) -> None:
    mixtral().save_pretrained(tmp_path / "base")
    one_by_one("mixtral", tmp_path / "old", ("w1", "w3", "w2"))
    with pytest.raises(AdapterFileError, match=r"peft-0\.19"):
        convert(tmp_path / "old", tmp_path / "new", "peft", base=str(tmp_path / "base"))
    file = tmp_path / "old" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.layers.1.block_sparse_moe.experts.{}.w2.lora_{}.weight"
    moved = {k.replace("experts.3", "experts.7"): t for k, t in tensors.items()}
    save_file(moved, file)
    with pytest.raises(AdapterFileError, match="experts"):
        convert(tmp_path / "old", tmp_path / "new", "peft-0.19", base=str(tmp_path / "base"))
    wide = {**tensors, name.format(1, "A"): torch.ones(3, INSIDE + 1)}
    save_file(wide, file)
    with pytest.raises(AdapterFileError, match="other shapes"):
        convert(tmp_path / "old", tmp_path / "new", "peft-0.19", base=str(tmp_path / "base"))
