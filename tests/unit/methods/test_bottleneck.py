from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tiny_models
from learned import shake, trainable
from lorakit.adapters.attach import attach
from lorakit.adapters.spec import LoraSpec
from lorakit.errors import LorakitError, MergeError, SpecError, StateError, TargetError
from lorakit.layers.bottleneck import BottleneckSite
from lorakit.methods.bottleneck import BottleneckMethod
from lorakit.methods.registry import build_method

DESIGNS = ("houlsby", "lin", "pfeiffer")
DECODERS = ("llama", "gemma3_text", "phi3", "gpt2", "opt", "falcon", "falcon-grouped", "bloom")
ENCODERS = ("bert", "roberta", "deberta-v2")

each_design = pytest.mark.parametrize("design", DESIGNS)


def attached(
    design: str, architecture: str, **options: Any
) -> tuple[Any, dict[str, Tensor], BottleneckMethod]:
    model = tiny_models.build(architecture)
    method = build_method(design, {"bottleneck": 3, **options})
    assert isinstance(method, BottleneckMethod)
    torch.manual_seed(11)
    method.attach(model)
    return model, tiny_models.inputs(model), method


def loss(model: Any, given: dict[str, Tensor]) -> Tensor:
    """A sum with fixed random weights, so that no direction cancels."""
    result = model(**given)
    output = result.logits if "logits" in result else result.last_hidden_state
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    return (output.float() * weights).sum()


PLACES = {
    ("houlsby", "llama"): ["self_attn.o_proj", "mlp.down_proj"],
    ("houlsby", "gpt2"): ["attn.c_proj", "mlp.c_proj"],
    ("houlsby", "bert"): ["attention.output.dense", "output.dense"],
    ("houlsby", "gemma3_text"): ["post_attention_layernorm", "post_feedforward_layernorm"],
    ("lin", "llama"): [""],
    ("lin", "bert"): [""],
    ("pfeiffer", "gpt2"): [""],
    ("pfeiffer", "bert"): ["output.LayerNorm"],
}
STACKS = {
    "llama": "model.layers",
    "gpt2": "transformer.h",
    "bert": "encoder.layer",
    "gemma3_text": "model.layers",
}


@pytest.mark.parametrize(("design", "architecture"), PLACES)
def test_where_the_adapters_stand(design: str, architecture: str) -> None:
    stack = STACKS[architecture]
    expected = [
        ".".join(filter(None, (stack, str(block), place, "adapter")))
        for block in range(2)
        for place in PLACES[design, architecture]
    ]
    method = build_method(design, {"bottleneck": 3})
    assert list(method.plan(tiny_models.build(architecture)).sites) == expected


@each_design
@pytest.mark.parametrize("architecture", [*DECODERS, *ENCODERS])
def test_after_one_step_the_gradient_reaches_every_parameter(design, architecture) -> None:
    model, given, method = attached(design, architecture, activation="gelu")
    model.train()
    parameters = trainable(model)
    assert len(parameters) == len(method.state(model))
    optimizer = torch.optim.SGD(parameters.values(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        loss(model, given).backward()
        optimizer.step()
    without = [n for n, p in parameters.items() if p.grad is None or not p.grad.abs().max() > 0]
    assert without == []


@each_design
@pytest.mark.parametrize("architecture", DECODERS)
def test_generating_with_a_cache_is_generating_without(design, architecture) -> None:
    model, given, method = attached(design, architecture)
    shake(model, size=0.5)

    def generated(*, cache: bool) -> tuple[Tensor, Tensor]:
        result = model.generate(
            **given,
            max_new_tokens=8,
            do_sample=False,
            use_cache=cache,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_logits=True,
        )
        return result.sequences, torch.stack(result.logits)

    ids, logits = generated(cache=True)
    ids_without, logits_without = generated(cache=False)
    assert ids.shape[1] == given["input_ids"].shape[1] + 8
    assert ids.equal(ids_without)
    torch.testing.assert_close(logits, logits_without, rtol=1e-4, atol=1e-4)
    with method.disabled(model):
        _, base = generated(cache=True)
    assert not torch.allclose(base, logits, atol=1e-2)


@pytest.mark.parametrize(
    ("design", "architecture", "options"),
    [
        ("houlsby", "llama", {}),
        ("lin", "gpt2", {}),
        ("lin", "falcon", {}),
        ("pfeiffer", "bert", {}),
        ("adapterdrop", "gpt2", {"drop_first": 1, "at_random": True}),
    ],
)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(
    design: str, architecture: str, options: dict[str, Any], reentrant: bool
) -> None:
    model, given, _ = attached(design, architecture, **options)
    shake(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0

    def gradients(seed: int) -> dict[str, Tensor]:
        model.train().zero_grad()
        torch.manual_seed(seed)
        loss(model, given).backward()
        return {
            n: torch.zeros_like(p) if p.grad is None else p.grad.clone()
            for n, p in trainable(model).items()
        }

    plain = [gradients(seed) for seed in range(4)]
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for seed, expected in enumerate(plain):
        torch.testing.assert_close(gradients(seed), expected)
    zeros = {all(g.abs().max() > 0 for g in found.values()) for found in plain}
    assert zeros == ({True, False} if options else {True})


@each_design
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
def test_a_bfloat16_base_keeps_float32_adapters(design: str, architecture: str) -> None:
    model = tiny_models.build(architecture).to(torch.bfloat16)
    given = tiny_models.inputs(model)
    base = tiny_models.outputs(model, given)
    method = build_method(design, {"bottleneck": 3})
    method.attach(model)
    assert {t.dtype for t in method.state(model).values()} == {torch.float32}
    assert tiny_models.outputs(model, given).equal(base)
    loss(model.train(), given).backward()
    assert all(p.grad is not None for p in trainable(model).values())
    shake(model)
    live = tiny_models.outputs(model.eval(), given)
    assert live.dtype == torch.bfloat16
    assert not live.equal(base)
    with method.disabled(model):
        assert tiny_models.outputs(model, given).equal(base)


@each_design
def test_autocast_agrees_with_float32(design: str) -> None:
    model, given, _ = attached(design, "llama")
    shake(model)
    live = tiny_models.outputs(model, given)
    with torch.autocast("cpu", torch.bfloat16):
        half = tiny_models.outputs(model, given)
    torch.testing.assert_close(half.float(), live, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("recorded_before", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_recorded_hidden_states_are_what_the_next_block_gets(architecture, recorded_before) -> None:
    model = tiny_models.build(architecture)
    given = tiny_models.inputs(model)
    if recorded_before:
        model(**given, output_hidden_states=True)
    method = build_method("lin", {"bottleneck": 3})
    method.attach(model)
    shake(model)
    second = [m for m in model.modules() if isinstance(m, BottleneckSite)][1]
    seen: list[Tensor] = []
    second.base.register_forward_pre_hook(
        lambda _m, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    with torch.no_grad():
        states = model(**given, output_hidden_states=True).hidden_states
    assert len(states) == 3
    assert states[1].equal(seen[0])


def test_layer_norms_are_trained_beside_when_asked_and_only_where_adapters_are() -> None:
    model = tiny_models.build("bert")
    without = build_method("houlsby", {"bottleneck": 3}).plan(model)
    some = build_method("houlsby", {"bottleneck": 3, "blocks": [1], "train_layer_norms": True})
    report = some.plan(model)
    # One of two blocks: half the adapters, and two norms of 2 d.
    assert report.num_trainable == without.num_trainable // 2 + 2 * 2 * 32
    norms = [site for site in report.sites if "LayerNorm" in site]
    assert norms == [
        f"encoder.layer.1.{place}.LayerNorm.{name}"
        for place in ("attention.output", "output")
        for name in ("weight", "bias")
    ]
    # RMSNorm has no bias; Qwen3's norms over heads see no residual.
    qwen = build_method("lin", {"bottleneck": 3, "train_layer_norms": True})
    norms = [s for s in qwen.plan(tiny_models.build("qwen3")).sites if "norm" in s]
    assert len(norms) == 4
    assert not any("q_norm" in n or "k_norm" in n for n in norms)


def test_parallel_blocks_say_what_houlsby_means_there() -> None:
    falcon = tiny_models.build("falcon")
    (note,) = build_method("houlsby", {"bottleneck": 3}).plan(falcon).notes
    assert "beside each other" in note
    assert build_method("lin", {"bottleneck": 3}).plan(falcon).notes == ()
    assert build_method("houlsby", {}).plan(tiny_models.build("bloom")).notes == ()


def test_adapterdrop_leaves_out_the_first_blocks() -> None:
    method = build_method("adapterdrop", {"bottleneck": 3, "drop_first": 1})
    sites = method.plan(tiny_models.build("bert")).sites
    assert sites == ("encoder.layer.1.output.LayerNorm.adapter",)
    method = build_method(
        "adapterdrop", {"bottleneck": 3, "drop_first": 1, "placement": "houlsby", "at_random": True}
    )
    assert len(method.plan(tiny_models.build("bert")).sites) == 4


def test_adapterdrop_at_random_drops_in_training_and_on_request() -> None:
    model, given, method = attached(
        "adapterdrop", "gpt2", drop_first=1, at_random=True, placement="houlsby"
    )
    shake(model)
    state = method.state(model)
    first = [t for n, t in state.items() if ".h.0." in n]
    assert 0 < len(first) < len(state)
    reached: set[bool] = set()
    for _ in range(12):
        model.train().zero_grad()
        loss(model, given).backward()
        reached.add(all(t.grad is not None for t in first))
        assert all(t.grad is not None for n, t in state.items() if ".h.1." in n)
    assert reached == {True, False}
    whole = tiny_models.outputs(model.eval(), given)
    with method.dropped(model, 1):
        dropped = tiny_models.outputs(model, given)
    assert tiny_models.outputs(model, given).equal(whole)
    with method.dropped(model, 2):
        none = tiny_models.outputs(model, given)
    base = tiny_models.outputs(tiny_models.build("gpt2"), given)
    assert none.equal(base)
    with torch.no_grad():
        for tensor in first:
            tensor.zero_()
    # Adapters of zeros do nothing: what remains is the second block's.
    assert tiny_models.outputs(model, given).equal(dropped)
    assert not dropped.equal(whole)
    with pytest.raises(SpecError, match="cannot be dropped"), method.dropped(model, 3):
        pass


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "bottleneck of 0": ("houlsby", {"bottleneck": 0}, "bottleneck"),
    "bottleneck below 0": ("lin", {"bottleneck": -4}, "bottleneck"),
    "half a bottleneck": ("pfeiffer", {"bottleneck": 2.5}, "bottleneck"),
    "bottleneck of yes": ("adapterdrop", {"bottleneck": True}, "bottleneck"),
    "unknown activation": ("houlsby", {"activation": "swish"}, "silu"),
    "activation of 1": ("houlsby", {"activation": 1}, "activation"),
    "norms of text": ("houlsby", {"train_layer_norms": "yes"}, "train_layer_norms"),
    "no block": ("lin", {"blocks": []}, "blocks"),
    "blocks of text": ("lin", {"blocks": "01"}, "blocks"),
    "block twice": ("lin", {"blocks": [1, 1]}, "named twice"),
    "block below 0": ("lin", {"blocks": [-1]}, "blocks"),
    "head of one letter": ("lin", {"also_train": "x"}, "also_train"),
    "unknown key": ("lin", {"bottelneck": 3}, "did you mean 'bottleneck'"),
    "blocks in adapterdrop": ("adapterdrop", {"blocks": [1]}, "unknown key"),
    "nothing dropped": ("adapterdrop", {"drop_first": 0}, "drop_first"),
    "unknown placement": ("adapterdrop", {"placement": "lin"}, "pfeiffer"),
    "random as a number": ("adapterdrop", {"at_random": 1}, "at_random"),
}


@pytest.mark.parametrize("name", WRONG)
def test_options_that_cannot_be_are_refused(name: str) -> None:
    method, options, says = WRONG[name]
    with pytest.raises(SpecError) as caught:
        build_method(method, options)
    assert says in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("method", "options", "architecture", "error", "says"),
    [
        ("lin", {"blocks": [0, 2]}, "llama", SpecError, "0 to 1"),
        ("adapterdrop", {"drop_first": 2}, "llama", SpecError, "1 to 1"),
        ("adapterdrop", {"drop_first": 2, "at_random": True}, "bert", SpecError, "drop_first"),
        ("houlsby", {}, "vit", TargetError, "not known"),
        ("lin", {}, "t5", TargetError, "cross-attention"),
        ("lin", {"also_train": ["haed"]}, "llama", TargetError, "haed"),
    ],
)
def test_what_a_model_does_not_have_is_refused_at_plan_time(
    method: str, options: dict[str, Any], architecture: str, error: type[LorakitError], says: str
) -> None:
    model = tiny_models.build(architecture)
    modules = [id(m) for m in model.modules()]
    for step in (build_method(method, options).plan, build_method(method, options).attach):
        with pytest.raises(error) as caught:
            step(model)
        assert says in str(caught.value)
    assert [id(m) for m in model.modules()] == modules
    assert all(p.requires_grad for p in model.parameters())


def test_it_does_not_stand_beside_another_method() -> None:
    model = tiny_models.build("llama")
    attach(model, LoraSpec(r=2, targets="qv"))
    for step in (build_method("houlsby", {}).plan, build_method("houlsby", {}).attach):
        with pytest.raises(StateError, match="beside"):
            step(model)
    model = tiny_models.build("llama")
    build_method("prefix_embedding", {"prefix": 2, "infix": 0}).attach(model)
    with pytest.raises(StateError, match="beside"):
        build_method("lin", {}).plan(model)
    model, _, method = attached("houlsby", "llama")
    with pytest.raises(StateError, match="beside houlsby"):
        attach(model, LoraSpec(r=2, targets="qv"))
    assert all(t.requires_grad for t in method.state(model).values())
    with pytest.raises(StateError, match="beside"):
        method.attach(model)
    with pytest.raises(MergeError, match="nonlinearity"):
        method.merge(model)
