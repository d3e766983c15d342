"""llama.cpp in float32 over SmolLM2's own GGUF: the exported adapter's text and logits are ours."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from learned import attach_learned
from lorakit.adapters.attach import detach
from lorakit.adapters.extract import adapter_from_model
from lorakit.adapters.spec import LoraSpec
from lorakit.handover.run import export_adapter
from lorakit.models.named import find_named

BASE = "smollm2-135m-instruct"
PROMPTS = ("The capital of France is", "Water boils at 100 degrees because")
NUM_TOKENS = 24
TOP = 20


def server(xlc: Any, base: Path, adapter: Path | None) -> Any:
    params = xlc.CommonParams()
    params.model.path = str(base)
    params.n_ctx = 256
    params.cpuparams.n_threads = 1
    params.cache_type_k = params.cache_type_v = xlc.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xlc.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if adapter is not None:
        params.lora_adapters = [xlc.CommonAdapterLoraInfo(str(adapter), 1.0)]
    return xlc.Server(params)


def continued(running: Any, prompt: str) -> tuple[str, list[dict[int, float]]]:
    """The greedy text, and at each of its places token -> logprob of the likeliest."""
    answer = running.handle_completions(
        {
            "prompt": prompt,
            "max_tokens": NUM_TOKENS,
            "temperature": 0.0,
            "ignore_eos": True,
            "logprobs": TOP,
        }
    )
    (choice,) = answer["choices"]
    return choice["text"], [
        {found["id"]: found["logprob"] for found in place["top_logprobs"]}
        for place in choice["logprobs"]["content"]
    ]


@pytest.mark.real
@pytest.mark.slow
def test_greedy_text_and_logits_are_the_live_adapter_s(
    smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    xlc = pytest.importorskip("xllamacpp")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    in_float32 = importlib.import_module("serve_llama").in_float32
    model, tokenizer = smollm2
    spec = LoraSpec(
        r=4,
        alpha=6,
        targets="all-linear",
        rank_pattern={"k_proj": 6},
        scaling="alpha/sqrt(r)",
    )

    def ours(prompt: str) -> tuple[str, torch.Tensor]:
        ids: Any = tokenizer(prompt, return_tensors="pt").input_ids
        limits = {"max_new_tokens": NUM_TOKENS, "min_new_tokens": NUM_TOKENS, "do_sample": False}
        with torch.no_grad():
            whole = model.generate(ids, pad_token_id=0, **limits)  # type: ignore[operator]
            logits = model(input_ids=whole).logits[0, ids.shape[1] - 1 : -1]
        text = tokenizer.decode(whole[0, ids.shape[1] :])
        assert isinstance(text, str)
        return text, logits.log_softmax(-1)

    base = {prompt: ours(prompt)[0] for prompt in PROMPTS}
    attach_learned(model, spec, size=0.02)
    live = {prompt: ours(prompt) for prompt in PROMPTS}
    adapter_from_model(model).save(tmp_path / "adapter")
    detach(model)
    export_adapter(tmp_path / "adapter", tmp_path / "out", engine="llama.cpp", base=BASE)
    (adapter,) = (tmp_path / "out").glob("*.gguf")
    exact = in_float32(find_named(BASE), tmp_path / "base.gguf")
    running = server(xlc, exact, adapter)
    for prompt in PROMPTS:
        text, places = continued(running, prompt)
        expected, logprobs = live[prompt]
        assert text == expected
        assert text != base[prompt]
        assert len(places) == NUM_TOKENS
        for place, found in zip(logprobs, places, strict=True):
            assert len(found) == TOP
            off = max(abs(float(place[token]) - value) for token, value in found.items())
            assert off < 2e-3
