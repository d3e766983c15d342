"""Layers whose rows are not apart are found before anything is served, and refused at load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

import tiny_models
from lorakit.adapters.spec import LoraSpec
from lorakit.errors import AdapterFileError
from lorakit.serve.probe import layers_out_of_order
from serving import ask, assert_same, byte_llama, prompts, running, save_learned


class Experts(nn.Module):
    """A mixture whose experts are modules: each token goes to `top` of them."""

    def __init__(self, mlp: nn.Module, hidden: int, count: int, top: int) -> None:
        super().__init__()
        self.top = top
        self.gate = nn.Linear(hidden, count, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(hidden, 12), nn.SiLU(), nn.Linear(12, hidden))
            for _ in range(count)
        )
        self.shared = mlp

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        weights, chosen = self.gate(flat).softmax(-1).topk(self.top, dim=-1)
        out = self.shared(flat)
        for number, expert in enumerate(self.experts):
            # Choice by choice, as Mixtral's loop went: another order than the tokens'.
            place, token = torch.where((chosen == number).T)
            if len(token):
                out = out.index_add(0, token, expert(flat[token]) * weights[token, place, None])
        return out.view_as(x)


def with_experts(count: int, top: int) -> PreTrainedModel:
    model = byte_llama(seed=2)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        assert isinstance(model, LlamaForCausalLM)
        for layer in model.model.layers:
            layer.mlp = Experts(layer.mlp, model.config.hidden_size, count, top)  # type: ignore[assignment]
    return model.eval()


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "opt", "gemma3_text", "phi3", "gpt_neox", "falcon", "bloom", "bart"]
)
def test_ordinary_layers_keep_rows_in_order(name: str) -> None:
    build = tiny_models.bart if name == "bart" else lambda: tiny_models.build(name)
    assert layers_out_of_order(build().eval()) == frozenset()


def test_a_table_of_relative_positions_has_no_rows() -> None:
    found = layers_out_of_order(tiny_models.build("t5"))
    assert found
    assert all("relative_attention_bias" in name for name in found)


@pytest.mark.parametrize(
    ("count", "top"),
    # Some tokens each; all tokens each, in another order; more experts than ten tokens can reach.
    [(3, 1), (2, 2), (40, 1)],
)
def test_experts_are_found_and_nothing_else(count: int, top: int) -> None:
    model = with_experts(count, top)
    experts = {
        name
        for name, module in model.named_modules()
        if ".experts." in name and isinstance(module, nn.Linear)
    }
    assert len(experts) == 2 * 2 * count
    assert layers_out_of_order(model) == experts


def test_stacked_experts_leave_the_layers_around_them_open() -> None:
    shape = {
        "vocab_size": 128,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    qwen = Qwen2MoeConfig(
        **shape,
        moe_intermediate_size=12,
        shared_expert_intermediate_size=20,
        num_experts=4,
        num_experts_per_tok=2,
    )
    for model in (
        MixtralForCausalLM(MixtralConfig(**shape, num_local_experts=4)),
        Qwen2MoeForCausalLM(qwen),
    ):
        assert layers_out_of_order(model.eval()) == frozenset()


def test_an_adapter_on_experts_is_refused_when_it_is_loaded(tmp_path: Path) -> None:
    model = with_experts(3, 1)
    save_learned(model, LoraSpec(r=2, targets="all-linear"), tmp_path / "whole")
    around = LoraSpec(r=3, alpha=9, targets=("q_proj", "gate_proj", "gate"))
    save_learned(model, around, tmp_path / "around", seed=3)
    rows = [
        {"prompt": p, "adapter": name, "max_tokens": 5, "logprobs": 1, "ignore_eos": True}
        for p, name in zip(prompts([9, 4, 6]), ["around", None, "around"], strict=True)
    ]
    with running(model, adapters_dir=tmp_path, prefill_chunk=4) as engine:
        with pytest.raises(AdapterFileError, match=r"experts") as caught:
            engine.pool.load("whole")
        assert "merge" in (caught.value.remedy or "")
        beside = [ask(engine, **row) for row in rows]
        refused = ask(engine, prompts([5])[0], "whole").wait()
        assert refused.reason == "error"
        assert isinstance(refused.ended.error, AdapterFileError)
        together = [reply.wait() for reply in beside]
        for row, reply in zip(rows, together, strict=True):
            assert_same(ask(engine, **row).wait(), reply)
    assert together[0].tokens != together[1].tokens
