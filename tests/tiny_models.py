"""Tiny random models of every architecture the presets promise, made in memory.

Sizes are chosen so that no two that could be confused are equal: hidden 32, MLP 48, vocabulary
128, and where the architecture allows it fewer key/value heads than query heads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    BloomConfig,
    BloomForCausalLM,
    DebertaV2Config,
    DebertaV2Model,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

VOCAB = 128
HIDDEN = 32
INTERMEDIATE = 48

_TEXT = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "pad_token_id": 0}
_LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4}
_ENDS = {"bos_token_id": 1, "eos_token_id": 2}
# Four query heads on two key/value heads: k and v are (in 32, out 16).
_GQA = {**_TEXT, **_LAYERS, **_ENDS, "num_key_value_heads": 2, "intermediate_size": INTERMEDIATE}


def opt(vocab: int = VOCAB, **extra: object) -> PreTrainedModel:
    """OPT with embeddings narrower than its hidden states."""
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=vocab,
            hidden_size=32,
            word_embed_proj_dim=16,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            pad_token_id=0,
            **extra,
        )
    )


def t5(vocab: int = VOCAB, **extra: object) -> PreTrainedModel:
    """T5: an encoder and a decoder with relative positions."""
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=vocab,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
            pad_token_id=0,
            **extra,
        )
    )


def bart(vocab: int = VOCAB, **extra: object) -> PreTrainedModel:
    """BART: an encoder and a decoder with a bias on its logits."""
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=vocab,
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=2,
            **extra,
        )
    )


def masked_lm(vocab: int = VOCAB) -> PreTrainedModel:
    """RoBERTa with its head for masked tokens: every position sees all others."""
    config = RobertaConfig(**_TEXT, **_LAYERS, intermediate_size=INTERMEDIATE)
    config.vocab_size = vocab
    return RobertaForMaskedLM(config)


def llama_biased() -> PreTrainedModel:
    """Llama with biases, not zero, on every linear layer that may have one, and three layers."""
    layers = {**_GQA, "num_hidden_layers": 3}
    model = LlamaForCausalLM(
        LlamaConfig(**layers, attention_bias=True, mlp_bias=True, tie_word_embeddings=False)
    )
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.data.normal_(std=0.2)
    return model


def qwen3_moe() -> PreTrainedModel:
    """Qwen3-MoE: a tensor per projection of four experts, two for each token."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**_GQA, **experts, head_dim=8))


def gpt_oss() -> PreTrainedModel:
    """GPT-OSS: experts that are stored as (in, out) and have biases."""
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24}
    return GptOssForCausalLM(GptOssConfig(**{**_GQA, **experts}, head_dim=8))


def deepseek_v3() -> PreTrainedModel:
    """A dense block, then one of stacked experts beside a shared one."""
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    ranks = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8}
    sizes = {"intermediate_size": INTERMEDIATE, "moe_intermediate_size": 24, "v_head_dim": 12}
    return DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **_TEXT,
            **_LAYERS,
            **experts,
            **ranks,
            **sizes,
            first_k_dense_replace=1,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def _llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**_GQA, tie_word_embeddings=False))


def _llama_tied() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**_GQA, tie_word_embeddings=True))


def _mistral() -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(**_GQA, sliding_window=None))


def _qwen2() -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**_GQA))


def _qwen3() -> PreTrainedModel:
    # head_dim is free in Qwen3: 4 heads of 12 make q (in 32, out 48).
    return Qwen3ForCausalLM(Qwen3Config(**_GQA, head_dim=12))


def _gemma3() -> PreTrainedModel:
    config = Gemma3TextConfig(**_GQA, head_dim=12, sliding_window=8)
    return Gemma3ForCausalLM(config)


def _phi3() -> PreTrainedModel:
    return Phi3ForCausalLM(Phi3Config(**_GQA))


def _gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=64, **_ENDS)
    )


def _opt() -> PreTrainedModel:
    config = OPTConfig(
        **_TEXT,
        **_LAYERS,
        **_ENDS,
        ffn_dim=INTERMEDIATE,
        word_embed_proj_dim=HIDDEN,
        max_position_embeddings=64,
    )
    return OPTForCausalLM(config)


def _falcon_multi_query() -> PreTrainedModel:
    # Falcon-7B's layout: one key/value head behind all query heads.
    return FalconForCausalLM(FalconConfig(**_TEXT, **_LAYERS, **_ENDS, multi_query=True))


def _falcon_grouped() -> PreTrainedModel:
    # Falcon-40B's layout: grouped heads, q k v interleaved by group.
    config = FalconConfig(
        **_TEXT, **_LAYERS, **_ENDS, new_decoder_architecture=True, num_kv_heads=2
    )
    return FalconForCausalLM(config)


def _falcon_multi_head() -> PreTrainedModel:
    # Falcon-RW's layout: every head has its own q k v, interleaved by head; alibi and biases.
    config = FalconConfig(
        **_TEXT, **_LAYERS, **_ENDS, multi_query=False, alibi=True, bias=True, parallel_attn=False
    )
    return FalconForCausalLM(config)


def _bloom() -> PreTrainedModel:
    return BloomForCausalLM(
        BloomConfig(vocab_size=VOCAB, hidden_size=HIDDEN, n_layer=2, n_head=4, **_ENDS)
    )


def _gpt_neox() -> PreTrainedModel:
    config = GPTNeoXConfig(
        **_TEXT, **_LAYERS, **_ENDS, intermediate_size=INTERMEDIATE, max_position_embeddings=64
    )
    return GPTNeoXForCausalLM(config)


def _t5() -> PreTrainedModel:
    # d_kv 12: the projections are (in 32, out 48).
    config = T5Config(
        vocab_size=VOCAB,
        d_model=HIDDEN,
        d_kv=12,
        d_ff=56,
        num_layers=2,
        num_heads=4,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config)


def _bert() -> PreTrainedModel:
    config = BertConfig(
        **_TEXT, **_LAYERS, intermediate_size=INTERMEDIATE, max_position_embeddings=64
    )
    return BertModel(config)


def _roberta() -> PreTrainedModel:
    config = RobertaConfig(
        **_TEXT, **_LAYERS, **_ENDS, intermediate_size=INTERMEDIATE, max_position_embeddings=66
    )
    return RobertaModel(config)


def _deberta_v2() -> PreTrainedModel:
    config = DebertaV2Config(
        **_TEXT,
        **_LAYERS,
        intermediate_size=INTERMEDIATE,
        max_position_embeddings=64,
        relative_attention=True,
        position_buckets=8,
        pos_att_type=["p2c", "c2p"],
    )
    return DebertaV2Model(config)


def _vit() -> PreTrainedModel:
    config = ViTConfig(
        hidden_size=HIDDEN,
        **_LAYERS,
        intermediate_size=INTERMEDIATE,
        image_size=16,
        patch_size=8,
    )
    return ViTModel(config)


BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": _llama,
    "llama-tied": _llama_tied,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma3_text": _gemma3,
    "phi3": _phi3,
    "gpt2": _gpt2,
    "opt": _opt,
    "falcon": _falcon_multi_query,
    "falcon-grouped": _falcon_grouped,
    "falcon-multi-head": _falcon_multi_head,
    "bloom": _bloom,
    "gpt_neox": _gpt_neox,
    "t5": _t5,
    "bert": _bert,
    "roberta": _roberta,
    "deberta-v2": _deberta_v2,
    "vit": _vit,
}


def build(name: str, *, seed: int = 0) -> PreTrainedModel:
    """A tiny model in eval mode; the same seed gives the same weights.

    The global random state is left as it was.
    """
    return seeded(BUILDERS[name], seed=seed)


def seeded(builder: Callable[[], PreTrainedModel], *, seed: int = 0) -> PreTrainedModel:
    """A model that is not among BUILDERS, made as `build` makes one."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = builder()
    return model.eval()


def inputs(model: PreTrainedModel, *, batch: int = 3, length: int = 9, seed: int = 1) -> dict:
    """Keyword inputs the model accepts: tokens for text, pixels for images."""
    generator = torch.Generator().manual_seed(seed)
    if model.config.model_type == "vit":
        return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=generator)}
    # 0 to 2 are padding and the ends: RoBERTa counts positions from the padding token.
    ids = torch.randint(3, VOCAB, (batch, length), generator=generator)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = ids[:, : length - 2].clone()
    return given


def outputs(model: PreTrainedModel, given: dict) -> torch.Tensor:
    """The logits, or the last hidden state of a model without a head."""
    with torch.no_grad():
        result = model(**given)
    return result.logits if "logits" in result else result.last_hidden_state
