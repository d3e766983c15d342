"""llama.cpp itself loads the GGUF adapters that we write, and answers as the live adapter does."""

from __future__ import annotations

import shlex
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

_PROMPT = "The capital of France is"
_BASE = "smollm2-135m-instruct"


def asked(xlc: Any, base: str, adapter: str | None) -> dict[int, float]:
    """Token -> log probability of the 20 likeliest next tokens, as llama.cpp gives them."""
    params = xlc.CommonParams()
    params.model.path = base
    params.n_ctx = 256
    params.cpuparams.n_threads = 1
    if adapter is not None:
        params.lora_adapters = [xlc.CommonAdapterLoraInfo(adapter, 1.0)]
    request = {
        "prompt": _PROMPT,
        "max_tokens": 1,
        "temperature": 0.0,
        "n_probs": 20,
        "logprobs": 20,
    }
    answer = xlc.Server(params).handle_completions(request)
    (token,) = answer["choices"][0]["logprobs"]["content"]
    return {found["id"]: found["logprob"] for found in token["top_logprobs"]}


CASES: dict[str, tuple[dict[str, Any], float]] = {
    # Rows of q and k stand in another order in llama.cpp.
    "q-and-k": (
        {
            "targets": ("q_proj", "k_proj"),
            "rank_pattern": {"k_proj": 6},
            "scaling": "alpha/sqrt(r)",
            "alpha": 6,
        },
        0.1,
    ),
}


@pytest.mark.real
@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_answers_as_the_live_adapter(
    case: str, smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase], tmp_path: Path
) -> None:
    xlc = pytest.importorskip("xllamacpp")
    model, tokenizer = smollm2
    ids: Any = tokenizer(_PROMPT, return_tensors="pt")["input_ids"]

    def ours() -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids).logits[0, -1].log_softmax(-1)

    before = ours()
    spec, size = CASES[case]
    attach_learned(model, LoraSpec(r=4, **spec), size=size)
    live = ours()
    adapter_from_model(model).save(tmp_path / "adapter")
    detach(model)
    done = export_adapter(tmp_path / "adapter", tmp_path / "out", engine="llama.cpp", base=_BASE)
    words = shlex.split(done.command)
    assert words[:3] == ["llama-server", "--model", str(find_named(_BASE))]
    theirs = asked(xlc, words[2], words[words.index("--lora") + 1])
    # llama.cpp multiplies in 8 bits: 0.3 nats for the base alone, where the adapter moves several.
    # With q's and k's rows in the other order it is more than half of what the adapter moves.
    moved = max(abs(float(live[i] - before[i])) for i in theirs)
    differs = max(abs(float(live[i]) - value) for i, value in theirs.items())
    assert moved > 2
    assert differs < 0.25 * moved
