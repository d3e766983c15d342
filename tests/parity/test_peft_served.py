"""Adapters as PEFT's own package writes them, served: its logits, or a refusal with the reason."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_models
from lorakit.errors import LorakitError
from lorakit.formats.peft import load_adapter
from lorakit.serve.engine import Engine
from serving import Reply, ask, assert_same, prompts, running

NAMES = ("adapter_config.json", "adapter_model.safetensors")


def biased_llama() -> Any:
    return tiny_models.seeded(tiny_models.llama_biased, seed=5)


def moe() -> Any:
    return tiny_models.seeded(tiny_models.qwen3_moe, seed=5)


MODELS: dict[str, Callable[[], Any]] = {
    "llama": biased_llama,
    "gpt2": lambda: tiny_models.build("gpt2"),
    "tied": lambda: tiny_models.build("llama-tied"),
    "moe": moe,
}


@dataclass(frozen=True)
class Made:
    """How PEFT makes an adapter.

    Attributes:
        config: of LoraConfig, beside r = 3 and lora_alpha = 7.
        reason: a word of the refusal; None where it is served.
        loads: it can be attached, alone, whether or not it is served.
        dtype: of the file.
    """

    config: dict[str, Any] = field(default_factory=dict)
    reason: str | None = None
    loads: bool = True
    dtype: torch.dtype = torch.float32


QV = {"target_modules": ["q_proj", "v_proj"]}
LLAMA = {
    "plain": Made(QV),
    "all-linear": Made({"target_modules": "all-linear"}),
    "regex": Made({"target_modules": r".*\.(1|2)\.self_attn\.(q|o)_proj"}),
    "bias-lora-only": Made({**QV, "bias": "lora_only"}),
    "bias-all-of-adapted": Made({"target_modules": "all-linear", "bias": "all"}),
    "bias-all": Made({**QV, "bias": "all"}, reason="mlp.down_proj"),
    "rslora": Made({**QV, "use_rslora": True}),
    "patterns": Made(
        {
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "rank_pattern": {"down_proj": 5, r"layers\.1\..*v_proj": 2},
            "alpha_pattern": {"v_proj": 11, "model.layers.0.self_attn.q_proj": 2},
        }
    ),
    "rslora-patterns": Made(
        {**QV, "use_rslora": True, "rank_pattern": {"v_proj": 6}, "alpha_pattern": {"q_proj": 2}}
    ),
    "dora": Made({"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "dora-bias": Made({**QV, "use_dora": True, "use_rslora": True, "bias": "lora_only"}),
    "some-layers": Made({**QV, "layers_to_transform": [0, 2], "layers_pattern": "layers"}),
    "exclude": Made({"target_modules": "all-linear", "exclude_modules": ["down_proj", "k_proj"]}),
    "embedding": Made({"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding-dora": Made({"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
    "head": Made({"target_modules": ["lm_head", "v_proj"]}),
    "float16": Made(QV, dtype=torch.float16),
    "bfloat16": Made({**QV, "use_dora": True}, dtype=torch.bfloat16),
    "other-inits": Made({**QV, "init_lora_weights": "orthogonal", "r": 4}),
    "modules-to-save": Made({**QV, "modules_to_save": ["lm_head"]}, reason="lm_head"),
    "norms-to-save": Made({**QV, "modules_to_save": ["norm"]}, reason="norm"),
    "lora-bias": Made({**QV, "lora_bias": True}, reason="lora_bias", loads=False),
    "pissa": Made({**QV, "init_lora_weights": "pissa"}, reason="init_lora_weights", loads=False),
    "tokens": Made({**QV, "trainable_token_indices": [5, 9, *range(20, 60)]}),
    "tokens-of-the-head": Made(
        {**QV, "trainable_token_indices": {"lm_head": [5, 9, *range(20, 60)]}}
    ),
    "weight-as-parameter": Made({"target_modules": [], "target_parameters": ["q_proj.weight"]}),
    "replication": Made(
        {**QV, "layer_replication": [[0, 2], [1, 3]]}, reason="layer_replication", loads=False
    ),
}
GPT2 = {
    "plain": Made({"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "all": Made({"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "dora": Made({"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True}),
    "bias": Made({"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "lora_only"}),
    "bias-all": Made(
        {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"}, reason="ln_1"
    ),
    "positions": Made({"target_modules": ["wpe", "c_attn"], "fan_in_fan_out": True}),
}
MOE = {
    "attention": Made(QV),
    # The router is a bare parameter here, which PEFT adapts as one.
    "router": Made({"target_modules": ["q_proj", "gate"]}, reason="target_parameters"),
    "experts": Made(
        {**QV, "target_parameters": ["mlp.experts.down_proj"]},
        reason="target_parameters",
    ),
    "experts-all": Made(
        {
            "target_modules": [],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
        reason="target_parameters",
    ),
}
TIED = {
    "tokens": Made({**QV, "trainable_token_indices": [5, 9, *range(20, 60)]}),
    "embedding": Made({"target_modules": ["embed_tokens", "q_proj"]}),
    "head": Made({"target_modules": ["lm_head", "q_proj"]}),
    "embedding-to-save": Made({**QV, "modules_to_save": ["embed_tokens"]}, reason="embed_tokens"),
    "head-to-save": Made({**QV, "modules_to_save": ["lm_head"]}, reason="lm_head"),
    "tying": Made({"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}),
    "tokens-and-head": Made({"target_modules": ["lm_head"], "trainable_token_indices": [4, 9]}),
}
CASES = {"llama": LLAMA, "tied": TIED, "gpt2": GPT2, "moe": MOE}


def write(model: Any, made: Made, path: Path, *, seed: int) -> Any:
    """Save an adapter with PEFT as if it had learned something; the model that carries it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(
            **{"r": 3, "lora_alpha": 7, "task_type": "CAUSAL_LM", **made.config}
        )
        wrapped: Any = peft.get_peft_model(model, config)
        generator = torch.Generator().manual_seed(seed)
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                noise = 0.2 * torch.randn(parameter.shape, generator=generator)
                # What is in the file is what PEFT computes with: as float16 or bfloat16 has it.
                parameter.data = (parameter.data + noise).to(made.dtype).float()
        wrapped.save_pretrained(str(path))
    if made.dtype != torch.float32:
        tensors = load_file(path / NAMES[1])
        save_file({k: v.to(made.dtype) for k, v in tensors.items()}, path / NAMES[1])
    return wrapped.eval()


def answers(engine: Engine, prompt: list[int], names: list[str | None]) -> dict[Any, Reply]:
    """All of them at once: rows of one batch."""
    asked = {n: ask(engine, prompt, n, max_tokens=5, logprobs=0, ignore_eos=True) for n in names}
    return {name: reply.wait() for name, reply in asked.items()}


def expect(wrapped: Any, prompt: list[int], reply: Reply) -> None:
    """The served answer is the one that PEFT's greedy decoding gives, with its probabilities."""
    ids = torch.tensor([[*prompt, *reply.tokens]])
    with torch.no_grad():
        logits = wrapped(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    assert reply.tokens == logits.argmax(-1).tolist()
    found = torch.tensor([item.logprob for item in reply.logprobs])
    torch.testing.assert_close(found, logits.max(-1).values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_what_peft_writes_is_served_as_peft_computes_it_or_refused(
    name: str, tmp_path: Path
) -> None:
    cases = CASES[name]
    theirs = {
        key: write(MODELS[name](), made, tmp_path / key, seed=i)
        for i, (key, made) in enumerate(cases.items())
    }
    prompt = prompts([11])[0]
    with running(MODELS[name](), adapters_dir=tmp_path, max_batch=7, prefill_chunk=4) as engine:
        replies = answers(engine, prompt, [None, *cases])
        alone = ask(engine, prompt, max_tokens=5, logprobs=0, ignore_eos=True).wait()
    assert_same(alone, replies[None])
    wrong: list[str] = []
    for key, made in cases.items():
        try:
            if made.loads:
                expect_attached(MODELS[name](), theirs[key], tmp_path / key)
            error = replies[key].ended.error
            assert made.reason is None or made.reason in str(error)
            if made.reason is None:
                assert error is None
                expect(theirs[key], prompt, replies[key])
                # The adapter does something: a base row's answer has other probabilities.
                assert replies[key].logprobs[0].logprob != alone.logprobs[0].logprob
        except (AssertionError, LorakitError) as problem:
            wrong.append(f"{key}: {problem}")
    assert not wrong, "\n".join(wrong)


def expect_attached(model: Any, wrapped: Any, path: Path) -> None:
    """Attached to a model of its own, the adapter gives PEFT's logits too."""
    given = tiny_models.inputs(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_adapter(model, path)
    torch.testing.assert_close(
        tiny_models.outputs(model, given), tiny_models.outputs(wrapped, given), rtol=1e-4, atol=1e-4
    )


OTHER_METHODS = {
    "ia3": lambda: peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
    "loha": lambda: peft.LoHaConfig(target_modules=["q_proj"]),
    "adalora": lambda: peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10),
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


@pytest.fixture
def others(tmp_path: Path) -> dict[str, str]:
    """Files of other methods and of older transformers; the word that their refusal must have."""
    write(biased_llama(), LLAMA["plain"], tmp_path / "good", seed=1)
    for key, config in OTHER_METHODS.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peft.get_peft_model(biased_llama(), config()).save_pretrained(str(tmp_path / key))
    # An adapter on experts that are modules of their own, as transformers 4 had them.
    write(biased_llama(), LLAMA["plain"], tmp_path / "old-experts", seed=2)
    file = tmp_path / "old-experts" / NAMES[1]
    renamed = {
        k.replace("self_attn.q_proj", "mlp.experts.0.w1"): v for k, v in load_file(file).items()
    }
    save_file(renamed, file)
    return {**dict.fromkeys(OTHER_METHODS, "peft_type"), "old-experts": "mlp.experts.0.w1"}


def test_other_methods_and_layouts_are_refused_and_the_rest_is_served(
    others: dict[str, str], tmp_path: Path
) -> None:
    prompt = prompts([7])[0]
    with running(biased_llama(), adapters_dir=tmp_path) as engine:
        listed = {info.name: info.problem for info in engine.pool.list()}
        replies = answers(engine, prompt, ["good", *others])
    assert replies["good"].ended.error is None
    for key, word in others.items():
        assert word in str(replies[key].ended.error), key
    # What the configuration alone tells is known before anybody asks.
    assert listed["good"] is None
    assert all(listed[key] for key in OTHER_METHODS)
    assert json.loads((tmp_path / "loha" / NAMES[0]).read_text())["peft_type"] in str(
        listed["loha"]
    )
