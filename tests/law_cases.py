"""The grid of the laws: architecture x geometry x part x scaling x bias x modules beside.

Scaling is never 1, and ranks, alphas and shapes differ from each other wherever they can.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from lorakit.adapters.spec import LoraSpec


@dataclass(frozen=True)
class Case:
    architecture: str
    spec: dict[str, Any] = field(default_factory=dict)
    warns: str | None = None
    # What PEFT cannot hold under its own config: no parity asked.
    peft: bool = True

    def make(self, **changes: Any) -> LoraSpec:
        return LoraSpec(**{"r": 3, "alpha": 7.5, **self.spec, **changes})


_TIED = "shares its weight"

CASES: dict[str, Case] = {
    "llama-qv": Case("llama"),
    "llama-all-linear": Case("llama", {"targets": "all-linear", "r": 5, "alpha": 3.0}),
    "mistral-attention-rslora": Case(
        "mistral", {"targets": "attention", "scaling": "alpha/sqrt(r)", "r": 4}
    ),
    "qwen2-mlp": Case("qwen2", {"targets": "mlp", "r": 2}),
    "qwen3-all-linear": Case("qwen3", {"targets": "all-linear"}),
    "gemma3-attention": Case("gemma3_text", {"targets": "attention"}),
    "opt-all-linear": Case("opt", {"targets": "all-linear"}),
    "t5-all-linear": Case("t5", {"targets": "all-linear"}),
    "deberta-qv": Case("deberta-v2"),
    "roberta-mlp": Case("roberta", {"targets": "mlp", "scaling": "alpha/sqrt(r)"}),
    "bert-all-linear": Case("bert", {"targets": "all-linear"}),
    "vit-all-linear": Case("vit", {"targets": "all-linear"}),
    "vit-conv": Case("vit", {"targets": ("projection", "q_proj"), "r": 4}),
    # Patterns give each layer its own rank and alpha.
    "llama-patterns": Case(
        "llama",
        {
            "targets": ("q_proj", "v_proj", "down_proj"),
            "rank_pattern": {"layers.1.self_attn.q_proj": 6, "down_proj": 2},
            "alpha_pattern": {"v_proj": 11.0, "layers.0.mlp.down_proj": 1.5},
        },
    ),
    "llama-patterns-rslora": Case(
        "llama",
        {
            "targets": "qv",
            "scaling": "alpha/sqrt(r)",
            "rank_pattern": {"v_proj": 6},
            "alpha_pattern": {"q_proj": 2.0},
        },
    ),
    # Conv1D, and parts of fused projections.
    "gpt2-all-linear": Case("gpt2", {"targets": "all-linear", "r": 4, "alpha": 10.0}),
    "gpt2-qv": Case("gpt2"),
    "gpt2-v-alone": Case("gpt2", {"targets": ("c_attn.v",), "r": 2}),
    "gpt2-parts-ranks": Case(
        "gpt2",
        {
            "targets": ("c_attn.q", "c_attn.v"),
            "rank_pattern": {"c_attn.v": 5},
            "alpha_pattern": {"h.1.attn.c_attn.q": 4.0},
        },
    ),
    "phi3-parts": Case("phi3", {"targets": ("qkv_proj.v", "gate_up_proj.up", "o_proj")}),
    "phi3-qv-rslora": Case("phi3", {"targets": "qv", "scaling": "alpha/sqrt(r)"}),
    "bloom-qv": Case("bloom"),
    "falcon-qv": Case("falcon"),
    "falcon-grouped-qv": Case("falcon-grouped"),
    "falcon-multi-head-qv": Case("falcon-multi-head"),
    "neox-qv": Case("gpt_neox"),
    # Embeddings.
    "llama-embedding": Case("llama", {"targets": ("embed_tokens", "q_proj")}),
    "llama-tied-embedding": Case("llama-tied", {"targets": ("embed_tokens", "v_proj")}, _TIED),
    "gemma3-embedding": Case("gemma3_text", {"targets": ("embed_tokens",)}, _TIED),
    "gpt2-positions": Case("gpt2", {"targets": ("wpe", "c_attn")}),
    "gpt2-tokens": Case("gpt2", {"targets": ("wte", "c_proj")}, _TIED),
    "bert-embeddings": Case(
        "bert", {"targets": ("word_embeddings", "token_type_embeddings", "query"), "r": 2}
    ),
    "t5-embeddings": Case("t5", {"targets": ("embed_tokens", "q")}, _TIED),
    # DoRA: every geometry, parts, scalings, biases, tied weights.
    "llama-dora": Case("llama", {"targets": "all-linear", "update": "dora", "r": 5}),
    "llama-dora-patterns-rslora": Case(
        "llama",
        {
            "targets": "qv",
            "update": "dora",
            "scaling": "alpha/sqrt(r)",
            "rank_pattern": {"v_proj": 6},
            "alpha_pattern": {"q_proj": 2.0},
        },
    ),
    "gpt2-dora": Case("gpt2", {"targets": "all-linear", "update": "dora"}),
    "gpt2-dora-parts-ranks": Case(
        "gpt2",
        {
            "targets": ("c_attn.q", "c_attn.v"),
            "update": "dora",
            "rank_pattern": {"c_attn.v": 5},
            "alpha_pattern": {"h.1.attn.c_attn.q": 4.0},
        },
    ),
    "bloom-dora-qv": Case("bloom", {"update": "dora"}),
    "phi3-dora-parts": Case("phi3", {"targets": ("qkv_proj.v", "o_proj"), "update": "dora"}),
    "vit-dora-conv": Case("vit", {"targets": ("projection", "q_proj"), "update": "dora"}),
    "vit-dora-conv-bias": Case(
        "vit", {"targets": ("projection",), "update": "dora", "bias": "lora_only"}
    ),
    "bert-dora-embeddings": Case(
        "bert", {"targets": ("word_embeddings", "query"), "update": "dora", "r": 2}
    ),
    "gemma3-dora-embedding": Case(
        "gemma3_text", {"targets": ("embed_tokens",), "update": "dora"}, _TIED
    ),
    "bert-dora-bias-all": Case(
        "bert", {"targets": ("query", "dense"), "update": "dora", "bias": "all"}
    ),
    # Biases.
    "bert-bias-lora-only": Case("bert", {"targets": ("query", "value"), "bias": "lora_only"}),
    "gpt2-bias-lora-only": Case("gpt2", {"targets": ("c_attn",), "bias": "lora_only"}),
    "gpt2-part-bias": Case("gpt2", {"targets": ("c_attn.q",), "bias": "lora_only"}),
    "bloom-bias-all": Case("bloom", {"targets": ("dense",), "bias": "all"}),
    "vit-conv-bias": Case("vit", {"targets": ("projection",), "bias": "lora_only"}),
    "opt-bias-all": Case("opt", {"targets": ("q_proj",), "bias": "all"}),
    # Whole modules beside.
    "llama-head-beside": Case("llama", {"also_train": ("lm_head",)}),
    "bert-pooler-beside": Case("bert", {"also_train": ("pooler.dense",)}),
    "llama-norms-beside": Case("llama", {"also_train": ("input_layernorm", "embed_tokens")}),
    "vit-everything": Case(
        "vit", {"targets": ("q_proj",), "bias": "all", "also_train": ("pooler",)}
    ),
}


def grid(*names: str) -> pytest.MarkDecorator:
    """Parametrise `case` over the named cases, or over all."""
    chosen = names or tuple(CASES)
    return pytest.mark.parametrize("case", [pytest.param(CASES[n], id=n) for n in chosen])
