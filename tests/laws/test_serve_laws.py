"""Row i of a mixed batch gives the tokens and logprobs it gives alone, under joins and leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    MambaConfig,
    MambaForCausalLM,
    ModernBertDecoderConfig,
    ModernBertDecoderForCausalLM,
)

import tiny_models
from lorakit.adapters.adapter import Adapter
from lorakit.adapters.attach import use
from lorakit.adapters.spec import LoraSpec
from lorakit.formats.peft import load_adapter
from lorakit.models.load import load_base_model
from serving import Reply, ask, assert_same, byte_tokenizer, prompts, running, save_learned

# Architecture -> the specs of its adapters; ranks, alphas and targets differ.
CONTINUOUS: dict[str, list[dict]] = {
    "llama": [
        {"targets": "all-linear", "r": 5, "alpha": 3.0},
        {"targets": "qv", "r": 3, "alpha": 7.5},
        {"targets": "all-linear", "update": "dora", "r": 2, "alpha": 5.0},
        {"targets": ("embed_tokens", "q_proj", "lm_head"), "r": 4},
        {"targets": "mlp", "r": 20, "alpha": 9.0, "scaling": "alpha/sqrt(r)"},
    ],
    "gpt2": [
        {"targets": ("c_attn.q", "c_attn.v"), "rank_pattern": {"c_attn.v": 5}, "r": 3},
        {"targets": "all-linear", "r": 4, "alpha": 10.0},
        {"targets": ("c_attn",), "update": "dora", "bias": "lora_only", "r": 3},
        {"targets": ("wpe", "c_attn"), "r": 2},
    ],
    "gemma3_text": [
        {"targets": "attention", "r": 3, "alpha": 7.0},
        {"targets": ("embed_tokens",), "r": 2},
        {"targets": "mlp", "r": 4, "update": "dora"},
    ],
    "phi3": [
        {"targets": ("qkv_proj.v", "gate_up_proj.up", "o_proj"), "r": 3},
        {"targets": ("qkv_proj.v", "o_proj"), "update": "dora", "r": 2},
    ],
    "opt": [{"targets": "all-linear", "r": 3}, {"targets": ("q_proj",), "bias": "lora_only"}],
    "qwen3": [{"targets": "all-linear", "r": 3, "alpha": 4.0}],
    "gpt_neox": [{"targets": "qv", "r": 3, "alpha": 4.0}],
    # A layer of its head sees the positions that are asked for, as the output layer does.
    "modernbert": [{"targets": "all-linear", "r": 3}, {"targets": r".*lm_head\.dense", "r": 2}],
}
STATIC = {
    "bloom": [{"targets": "qv", "r": 3}, {"targets": "all-linear", "r": 2}],
    "falcon": [{"targets": "qv", "r": 3}],
    "t5": [{"targets": "all-linear", "r": 3}, {"targets": ("embed_tokens", "q"), "r": 2}],
    "mamba": [{"targets": ("in_proj",), "r": 3}],
}


def build(name: str) -> torch.nn.Module:
    if name == "modernbert":
        sizes = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "pad_token_id": 0}
        depth = {"num_hidden_layers": 3, "num_attention_heads": 4, "initializer_range": 0.3}
        return ModernBertDecoderForCausalLM(ModernBertDecoderConfig(**sizes, **depth)).eval()
    if name != "mamba":
        return tiny_models.build(name)
    config = MambaConfig(
        vocab_size=128, hidden_size=32, num_hidden_layers=2, state_size=4, pad_token_id=0
    )
    return MambaForCausalLM(config).eval()


def save_all(model, specs: list[dict], root: Path) -> list[str]:
    for i, spec in enumerate(specs):
        made = LoraSpec(**{"r": 3, "alpha": 7.5, **spec})
        save_learned(model, made, root / f"a{i}", seed=i, size=0.3)
    return [f"a{i}" for i in range(len(specs))]


def work(names: list[str]) -> list[dict]:
    """Rows of different prompts, lengths, adapters and ways of sampling."""
    given = prompts([9, 3, 21, 1, 14, 6, 11])
    choices = [names[0], None, names[-1], *names, names[0]]
    rows = [
        {"prompt": prompt, "adapter": choice, "max_tokens": 4 + 3 * (i % 3), "logprobs": 2}
        for i, (prompt, choice) in enumerate(zip(given, choices, strict=False))
    ]
    rows[1].update(temperature=0.9, seed=5)
    rows[2].update(temperature=1.2, top_k=20, seed=6)
    rows[-1].update(temperature=0.7, top_p=0.8, seed=7)
    if len(names) > 1:
        rows.append({**rows[0], "adapter": {names[0]: 0.7, names[1]: -0.4}})
    return [{**row, "ignore_eos": True} for row in rows]


def alone_and_together(model, root: Path, rows: list[dict]) -> tuple[list[Reply], list[Reply]]:
    with running(model, adapters_dir=root, max_batch=4, prefill_chunk=5) as engine:
        alone = [ask(engine, **row).wait() for row in rows]
        # More rows than places, prompts in pieces: they join and leave at every step.
        together = [ask(engine, **row) for row in rows]
        return alone, [reply.wait() for reply in together]


@pytest.mark.parametrize("name", CONTINUOUS)
def test_each_row_runs_as_if_alone(name: str, tmp_path: Path) -> None:
    model = build(name)
    rows = work(save_all(model, CONTINUOUS[name], tmp_path))
    alone, together = alone_and_together(model, tmp_path, rows)
    for one, other in zip(alone, together, strict=True):
        assert_same(one, other)
    # The rows are not all the same: adapters and prompts matter.
    assert len({tuple(reply.tokens) for reply in alone}) > len(rows) // 2


@pytest.mark.parametrize("name", STATIC)
def test_static_batches_keep_the_law(name: str, tmp_path: Path) -> None:
    model = build(name)
    rows = work(save_all(model, STATIC[name], tmp_path))
    with running(model, adapters_dir=tmp_path) as engine:
        assert engine.static_reason is not None
    alone, together = alone_and_together(model, tmp_path, rows)
    for one, other in zip(alone, together, strict=True):
        assert_same(one, other, atol=1e-4)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_what_is_served_is_what_the_attached_adapter_computes(name: str, tmp_path: Path) -> None:
    """Greedy logprobs of every adapter against the model with the adapter attached."""
    model = build(name)
    names = save_all(model, CONTINUOUS[name], tmp_path)
    prompt = prompts([13])[0]
    with running(model, adapters_dir=tmp_path, prefill_chunk=5) as engine:
        assert engine.static_reason is None
        replies = {
            n: ask(engine, prompt, n, max_tokens=6, logprobs=0, ignore_eos=True)
            for n in [*names, None]
        }
        replies = {n: reply.wait() for n, reply in replies.items()}
    seen: set[float] = set()
    for n in names:
        load_adapter(model, tmp_path / n, name=n)
    for n, reply in replies.items():
        ids = torch.tensor([[*prompt, *reply.tokens]])
        with torch.no_grad(), use(model, n):
            logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        logprobs = logits.log_softmax(-1)
        assert logprobs.argmax(-1).tolist() == reply.tokens
        served = torch.tensor([found.logprob for found in reply.logprobs])
        expected = logprobs.gather(1, torch.tensor(reply.tokens)[:, None])[:, 0]
        torch.testing.assert_close(served, expected, rtol=1e-4, atol=2e-5)
        seen.add(round(float(served.sum()), 4))
    assert len(seen) == len(replies)


def test_a_composition_is_the_weighted_sum_of_the_changes(tmp_path: Path) -> None:
    """Against weights to which the weighted deltas were added by hand, DoRA among them."""
    model = build("llama")
    names = save_all(model, CONTINUOUS["llama"][:3], tmp_path)
    prompt = prompts([8])[0]
    weights = {names[0]: 0.6, names[1]: -0.3, names[2]: 0.5}
    with running(model, adapters_dir=tmp_path) as engine:
        reply = ask(engine, prompt, weights, max_tokens=6, logprobs=0, ignore_eos=True).wait()
    by_hand = build("llama")
    modules = dict(by_hand.named_modules())
    originals = {n: m.weight.detach().clone() for n, m in modules.items() if hasattr(m, "weight")}
    for name, weight in weights.items():
        adapter = Adapter.load(tmp_path / name)
        for module in adapter.modules():
            with torch.no_grad():
                modules[module].weight += weight * adapter.delta(module, originals[module])
    ids = torch.tensor([[*prompt, *reply.tokens]])
    with torch.no_grad():
        logprobs = by_hand(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    expected = logprobs.gather(1, torch.tensor(reply.tokens)[:, None])[:, 0]
    served = torch.tensor([found.logprob for found in reply.logprobs])
    torch.testing.assert_close(served, expected, rtol=1e-4, atol=2e-5)


def test_the_base_beside_adapters_is_the_base(tmp_path: Path) -> None:
    model = build("llama")
    names = save_all(model, CONTINUOUS["llama"], tmp_path)
    prompt = prompts([12])[0]
    before = model.generate(
        torch.tensor([prompt]), max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0
    )[0, 12:].tolist()
    with running(model, adapters_dir=tmp_path) as engine:
        others = [ask(engine, prompt, n, max_tokens=12, ignore_eos=True) for n in names]
        base = ask(engine, prompt, max_tokens=8, ignore_eos=True).wait()
        for other in others:
            other.wait()
    assert base.tokens == before
    after = model.generate(
        torch.tensor([prompt]), max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0
    )[0, 12:].tolist()
    assert after == before, "the model was not given back as it came"


@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_the_law_holds_over_a_four_bit_base(case: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    tiny_models.build(case).save_pretrained(tmp_path / "base")
    model = load_base_model(tmp_path / "base", "nf4", device="cpu")
    names = save_all(model, CONTINUOUS[case][:3], tmp_path / "adapters")
    rows = work(names)
    alone, together = alone_and_together(model, tmp_path / "adapters", rows)
    for one, other in zip(alone, together, strict=True):
        assert_same(one, other)
    reply = alone[-2]
    load_adapter(model, tmp_path / "adapters" / "a0", name="a0")
    ids = torch.tensor([[*rows[-2]["prompt"], *reply.tokens]])
    with torch.no_grad(), use(model, rows[-2]["adapter"]):
        own = model(input_ids=ids).logits[0, -len(reply.tokens) - 1 : -1].log_softmax(-1)
    found = torch.tensor([one.logprob for one in reply.logprobs])
    expected = own.gather(1, torch.tensor(reply.tokens)[:, None])[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_the_law_on_a_gpu(name: str, tmp_path: Path) -> None:
    """Adapters come from memory to the device, and leave it again: two places for five."""
    model = build(name)
    specs = {**CONTINUOUS, **STATIC}[name]
    rows = work(save_all(model, specs, tmp_path))
    model.to("cuda")  # type: ignore[arg-type]
    options = {"adapters_dir": tmp_path, "max_adapters_device": 2, "max_batch": 4}
    with running(model, **options) as engine:
        alone = [ask(engine, **row).wait() for row in rows]
        together = [ask(engine, **row) for row in rows]
        for one, other in zip(alone, together, strict=True):
            assert_same(one, other.wait(), atol=1e-3)
        assert engine.stats().adapters_device <= 2


@pytest.mark.real
def test_each_row_of_smollm2_runs_as_if_alone(smollm2, tmp_path: Path) -> None:
    model, tokenizer = smollm2
    for i, spec in enumerate(
        [LoraSpec(r=8, alpha=20, targets="all-linear"), LoraSpec(r=3, alpha=9, targets="qv")]
    ):
        save_learned(model, spec, tmp_path / f"a{i}", seed=i, size=0.02)
    texts = ["The capital of France is", "Once upon a time", "1, 2, 3,", "Water boils at"]
    rows = [
        {"prompt": tokenizer(text).input_ids, "adapter": adapter, "max_tokens": 6, "logprobs": 0}
        for text, adapter in zip(texts, ["a0", None, "a1", "a0"], strict=True)
    ]
    with running(model, tokenizer, adapters_dir=tmp_path, prefill_chunk=4) as engine:
        alone = [ask(engine, **row).wait() for row in rows]
        together = [ask(engine, **row) for row in rows]
        for one, other in zip(alone, together, strict=True):
            assert_same(one, other.wait(), atol=1e-3)


def test_the_byte_tokenizer_knows_every_token_of_the_tiny_models() -> None:
    assert len(byte_tokenizer(128)) == 128
