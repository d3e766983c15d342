"""Architectures whose code goes past their layers, or numbers and fuses them in its own way."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CodeGenConfig,
    DebertaConfig,
    DebertaV2Config,
    GPTNeoXJapaneseConfig,
    Llama4TextConfig,
    LongformerConfig,
    MambaConfig,
    NemotronHConfig,
    OpenAIGPTConfig,
    PersimmonConfig,
    PretrainedConfig,
    XLMConfig,
)

import tiny_models
from learned import attach_learned
from lorakit.adapters.attach import use
from lorakit.adapters.plan import plan_adapter
from lorakit.adapters.spec import LoraSpec
from lorakit.errors import LorakitWarning, StateError, TargetError

_SIZES = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_MLP = {"intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0}
_ENDS = {"bos_token_id": 1, "eos_token_id": 2}
_GPT = {"vocab_size": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **_ENDS}


def build(config: PretrainedConfig, *, causal: bool = True) -> torch.nn.Module:
    auto = AutoModelForCausalLM if causal else AutoModel
    return tiny_models.seeded(lambda: auto.from_config(config))


def leaves(model: torch.nn.Module, targets: str) -> set[str]:
    plan = plan_adapter(model, LoraSpec(targets=targets, r=2))
    return {site.name.rpartition(".")[2] for site in plan.sites}


def test_layers_that_a_kernel_reads_are_refused_and_not_in_presets() -> None:
    config = MambaConfig(
        vocab_size=128, hidden_size=32, num_hidden_layers=2, state_size=4, pad_token_id=0, **_ENDS
    )
    model = build(config)
    assert leaves(model, "all-linear") == {"in_proj"}
    for name in ("dt_proj", "x_proj", "out_proj"):
        with pytest.raises(TargetError, match="cannot be adapted") as caught:
            plan_adapter(model, LoraSpec(targets=name))
        assert "does not call it" in str(caught.value)


def test_a_router_that_is_a_linear_layer_is_left_alone() -> None:
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 48}
    config = Llama4TextConfig(
        **_SIZES, **_MLP, **_ENDS, **experts, num_key_value_heads=2, interleave_moe_layer_step=2
    )
    model = build(config)
    before = tiny_models.outputs(model, tiny_models.inputs(model))
    with pytest.warns(LorakitWarning, match="expert"):
        assert "router" not in leaves(model, "all-linear")
    with pytest.raises(TargetError, match="cannot be adapted") as caught:
        plan_adapter(model, LoraSpec(targets="router"))
    assert "more than a linear map" in str(caught.value)
    with pytest.warns(LorakitWarning, match="expert"):
        attach_learned(model, LoraSpec(targets="all-linear", r=2))
    assert not torch.allclose(tiny_models.outputs(model, tiny_models.inputs(model)), before)


def test_peft_does_not_know_dora_on_what_it_takes_for_experts() -> None:
    with torch.device("meta"):
        model = tiny_models.deepseek_v3()

    def about_peft(targets: str, **given: str) -> bool:
        notes = plan_adapter(model, LoraSpec(targets=targets, **given)).notes
        return any("PEFT" in note for note in notes)

    with pytest.warns(LorakitWarning):
        assert about_peft("mlp", update="dora")
    with pytest.warns(LorakitWarning):
        assert not about_peft("mlp")
    assert not about_peft("attention", update="dora")


def test_attentions_that_are_numbered_instead_of_blocks() -> None:
    config = XLMConfig(n_words=128, emb_dim=32, n_layers=2, n_heads=4, max_position_embeddings=64)
    model = build(config, causal=False)
    assert leaves(model, "qv") == {"q_lin", "v_lin"}
    assert leaves(model, "attention") == {"q_lin", "k_lin", "v_lin", "out_lin"}
    assert leaves(model, "mlp") == {"lin1", "lin2"}


def _persimmon(y: Tensor) -> dict[str, Tensor]:
    # PersimmonAttention._split_heads: view(b, s, heads, 3, head_dim)
    return dict(zip("qkv", y.view(*y.shape[:2], 4, 3, 8).unbind(3), strict=True))


def _codegen(y: Tensor) -> dict[str, Tensor]:
    # CodeGenAttention.forward: reshape(b, s, 4, -1).split(local_dim) as query, value, key
    return dict(zip("qvk", y.view(*y.shape[:2], 4, 24).split(8, dim=-1), strict=True))


def _deberta(y: Tensor) -> dict[str, Tensor]:
    # DisentangledSelfAttention.transpose_for_scores: view(b, s, heads, -1), then chunk(3, dim=-1)
    return dict(zip("qkv", y.view(*y.shape[:2], 4, 24).chunk(3, dim=-1), strict=True))


def _gpt(y: Tensor) -> dict[str, Tensor]:
    return dict(zip("qkv", y.split(32, dim=2), strict=True))


def _neox(y: Tensor) -> dict[str, Tensor]:
    # GPTNeoXJapaneseAttention.forward: view(b, s, heads, 3 * head_dim), then thirds of the last
    return dict(zip("qkv", y.view(*y.shape[:2], 4, 24).split(8, dim=-1), strict=True))


@pytest.mark.parametrize(
    ("config", "module", "split"),
    [
        (DebertaConfig(**_SIZES, **_MLP), "encoder.layer.0.attention.self.in_proj", _deberta),
        (OpenAIGPTConfig(**_GPT), "transformer.h.0.attn.c_attn", _gpt),
        (
            GPTNeoXJapaneseConfig(**_SIZES, max_position_embeddings=64, **_ENDS),
            "gpt_neox_japanese.layers.0.attention.query_key_value",
            _neox,
        ),
        (
            PersimmonConfig(**_SIZES, **_MLP, **_ENDS),
            "model.layers.0.self_attn.query_key_value",
            _persimmon,
        ),
        (CodeGenConfig(**_GPT, rotary_dim=4), "transformer.h.0.attn.qkv_proj", _codegen),
    ],
    ids=["deberta", "gpt", "gpt_neox_japanese", "persimmon", "codegen"],
)
def test_qv_moves_the_rows_of_q_and_v(
    config: PretrainedConfig, module: str, split: Callable[[Tensor], dict[str, Tensor]]
) -> None:
    model = build(config, causal=config.model_type != "deberta").eval()
    given = tiny_models.inputs(model)
    attach_learned(model, LoraSpec(targets="qv", r=3, alpha=5.0))
    caught: list[Tensor] = []
    model.get_submodule(module).register_forward_hook(
        lambda _m, _i, y: caught.append(y.detach().clone())
    )
    tiny_models.outputs(model, given)
    with use(model, None):
        tiny_models.outputs(model, given)
    moved = split(caught[0] - caught[1])
    assert not moved["k"].any()
    assert all((moved[part] != 0).float().mean() > 0.99 for part in "qv")


def test_qv_of_latent_attention_moves_the_values_alone() -> None:
    model = tiny_models.seeded(tiny_models.deepseek_v3).eval()
    given = tiny_models.inputs(model)
    plan = attach_learned(model, LoraSpec(targets="qv", r=3, alpha=5.0))
    assert {site.name.split("self_attn.")[1] for site in plan.sites} == {"q_b_proj", "kv_b_proj.v"}
    module = model.get_submodule("model.layers.0.self_attn.kv_b_proj")
    caught: list[Tensor] = []
    module.register_forward_hook(lambda _m, _i, y: caught.append(y.detach().clone()))
    tiny_models.outputs(model, given)
    with use(model, None):
        tiny_models.outputs(model, given)
    # view(b, s, heads, -1), then split([qk_nope_head_dim, v_head_dim], dim=-1)
    keys, values = (caught[0] - caught[1]).view(3, 9, 4, -1).split([8, 12], dim=-1)
    assert not keys.any()
    assert (values != 0).float().mean() > 0.99


def test_layers_of_a_mixer_are_known_by_their_own_names() -> None:
    sizes = {"ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1}
    config = NemotronHConfig(
        **{**_SIZES, "num_hidden_layers": 3},
        **_MLP,
        **_ENDS,
        **sizes,
        num_key_value_heads=2,
        head_dim=8,
        layers_block_type=["mamba", "attention", "mlp"],
    )
    model = build(config)
    assert leaves(model, "qv") == {"q_proj", "v_proj"}
    assert leaves(model, "attention") == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert leaves(model, "mlp") == {"up_proj", "down_proj"}


@pytest.mark.parametrize("targets", ["qv", "mlp"])
def test_rows_where_positions_come_first(targets: str) -> None:
    config = LongformerConfig(**_SIZES, **_MLP, attention_window=[4, 4])
    model = build(config, causal=False).eval()
    attach_learned(model, LoraSpec(targets=targets, r=2, alpha=5.0))
    ids = torch.arange(16).reshape(2, 8) + 4
    alone = [tiny_models.outputs(model, {"input_ids": ids[i : i + 1]}) for i in range(2)]
    if targets == "qv":
        with (
            pytest.raises(StateError, match="rows cannot have adapters of their own") as caught,
            use(model, ["default", None]),
        ):
            pass
        assert "positions first" in str(caught.value)
    else:
        with use(model, None):
            alone[1] = tiny_models.outputs(model, {"input_ids": ids[1:]})
        with use(model, ["default", None]):
            found = tiny_models.outputs(model, {"input_ids": ids})
        torch.testing.assert_close(found, torch.cat(alone))


@pytest.mark.parametrize("shared", [True, False])
def test_rows_where_positions_are_computed_once_for_all(shared: bool) -> None:
    config = DebertaV2Config(
        **_SIZES,
        **_MLP,
        relative_attention=True,
        position_buckets=8,
        pos_att_type=["p2c", "c2p"],
        share_att_key=shared,
    )
    model = build(config, causal=False)
    attach_learned(model, LoraSpec(targets="qv" if shared else "attention", r=2))
    with (
        pytest.raises(StateError, match="rows cannot have adapters of their own") as caught,
        use(model, ["default", None, None]),
    ):
        pass
    assert ("query_proj" if shared else "pos_key_proj") in str(caught.value)
    with use(model, "default"):
        tiny_models.outputs(model, tiny_models.inputs(model))
