"""What each preset adapts, written down by hand per architecture; what a target cannot be."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import tiny_models
from learned import module_ids
from lorakit.adapters.plan import plan_adapter
from lorakit.adapters.spec import LoraSpec
from lorakit.errors import LorakitWarning, SpecError, TargetError


def _names(prefix: str, *leaves: str) -> set[str]:
    """Both layers' modules."""
    return {f"{prefix}.{i}.{leaf}" for i in range(2) for leaf in leaves}


def _self_attn(prefix: str, out: str = "o_proj") -> dict[str, set[str]]:
    a = "self_attn"
    return {
        "qv": _names(prefix, f"{a}.q_proj", f"{a}.v_proj"),
        "attention": _names(prefix, f"{a}.q_proj", f"{a}.k_proj", f"{a}.v_proj", f"{a}.{out}"),
    }


_LLAMA = {
    **_self_attn("model.layers"),
    "mlp": _names("model.layers", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
}
_FALCON = {
    "qv": _names("transformer.h", "self_attention.query_key_value"),
    "attention": _names("transformer.h", "self_attention.query_key_value", "self_attention.dense"),
    "mlp": _names("transformer.h", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
}


def _bert(suffix: str = "") -> dict[str, set[str]]:
    layer, own = "encoder.layer", "attention.self"
    return {
        "qv": _names(layer, f"{own}.query{suffix}", f"{own}.value{suffix}"),
        "attention": _names(
            layer,
            f"{own}.query{suffix}",
            f"{own}.key{suffix}",
            f"{own}.value{suffix}",
            "attention.output.dense",
        ),
        "mlp": _names(layer, "intermediate.dense", "output.dense"),
    }


_T5_SELF = [
    f"{side}.block.{i}.layer.0.SelfAttention" for side in ("encoder", "decoder") for i in (0, 1)
]
_T5_CROSS = [f"decoder.block.{i}.layer.1.EncDecAttention" for i in (0, 1)]
_T5_MLP = [f"encoder.block.{i}.layer.1.DenseReluDense" for i in (0, 1)] + [
    f"decoder.block.{i}.layer.2.DenseReluDense" for i in (0, 1)
]
_VIT_ATTENTION = ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj")
_DEBERTA = _bert("_proj")

# The modules each preset touches. all-linear = attention + mlp + what `_MORE` names.
EXPECTED: dict[str, dict[str, set[str]]] = {
    **dict.fromkeys(("llama", "llama-tied", "mistral", "qwen2", "qwen3", "gemma3_text"), _LLAMA),
    "phi3": {
        "qv": _names("model.layers", "self_attn.qkv_proj"),
        "attention": _names("model.layers", "self_attn.qkv_proj", "self_attn.o_proj"),
        "mlp": _names("model.layers", "mlp.gate_up_proj", "mlp.down_proj"),
    },
    "gpt2": {
        "qv": _names("transformer.h", "attn.c_attn"),
        "attention": _names("transformer.h", "attn.c_attn", "attn.c_proj"),
        "mlp": _names("transformer.h", "mlp.c_fc", "mlp.c_proj"),
    },
    "opt": {
        **_self_attn("model.decoder.layers", "out_proj"),
        "mlp": _names("model.decoder.layers", "fc1", "fc2"),
    },
    **dict.fromkeys(("falcon", "falcon-grouped", "falcon-multi-head", "bloom"), _FALCON),
    "gpt_neox": {
        "qv": _names("gpt_neox.layers", "attention.query_key_value"),
        "attention": _names(
            "gpt_neox.layers", "attention.query_key_value", "attention.dense"
        ),
        "mlp": _names("gpt_neox.layers", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    },
    "t5": {
        "qv": {f"{a}.{x}" for a in _T5_SELF + _T5_CROSS for x in "qv"},
        "attention": {f"{a}.{x}" for a in _T5_SELF + _T5_CROSS for x in "qkvo"},
        "mlp": {f"{m}.{x}" for m in _T5_MLP for x in ("wi", "wo")},
    },
    "bert": _bert(),
    "roberta": _bert(),
    "deberta-v2": {
        **_DEBERTA,
        "attention": _DEBERTA["attention"]
        | _names("encoder.layer", "attention.self.pos_key_proj", "attention.self.pos_query_proj"),
    },
    "vit": {
        "qv": _names("layers", "attention.q_proj", "attention.v_proj"),
        "attention": _names("layers", *_VIT_ATTENTION),
        "mlp": _names("layers", "mlp.fc1", "mlp.fc2"),
    },
}  # fmt: skip
# A pooler is a linear layer like any other; an output head never is one.
_MORE = {"bert": {"pooler.dense"}, "roberta": {"pooler.dense"}, "vit": {"pooler.dense"}}
_FUSED = {"gpt2", "phi3", "falcon", "falcon-grouped", "falcon-multi-head", "bloom", "gpt_neox"}


def test_every_architecture_is_written_down() -> None:
    assert set(EXPECTED) == set(tiny_models.BUILDERS)


@pytest.mark.parametrize("name", list(EXPECTED))
def test_presets_adapt_exactly_these_modules(name: str) -> None:
    with torch.device("meta"):
        model = tiny_models.build(name)
    expected = dict(EXPECTED[name])
    expected["all-linear"] = expected["attention"] | expected["mlp"] | _MORE.get(name, set())
    for preset, modules in expected.items():
        plan = plan_adapter(model, LoraSpec(targets=preset, r=2))
        assert {s.module for s in plan.sites} == modules, f"{name}: {preset}"
        assert len({s.name for s in plan.sites}) == len(plan.sites)
        assert not [s for s in plan.sites if "head" in s.module.rpartition(".")[2]]


@pytest.mark.parametrize("name", sorted(_FUSED))
def test_qv_means_the_parts_q_and_v_of_a_fused_projection(name: str) -> None:
    with torch.device("meta"):
        model = tiny_models.build(name)
    plan = plan_adapter(model, LoraSpec(targets="qv", r=2))
    assert {s.name.rpartition(".")[2] for s in plan.sites} == {"q", "v"}
    assert {s.part for s in plan.sites} == {"q", "v"}


@pytest.mark.parametrize("head", ["BertForSequenceClassification", "BertForMaskedLM"])
def test_no_kind_of_head_is_in_all_linear(head: str) -> None:
    import transformers

    config = tiny_models.build("bert").config
    with torch.device("meta"):
        model = getattr(transformers, head)(config)
    plan = plan_adapter(model, LoraSpec(targets="all-linear", r=2))
    modules = {s.module for s in plan.sites}
    assert "classifier" not in modules
    assert "cls.predictions.decoder" not in modules
    assert "bert.encoder.layer.1.output.dense" in modules


_MATCHES: list[tuple[str, Any, set[str]]] = [
    ("llama", ("q_proj",), _names("model.layers", "self_attn.q_proj")),
    ("llama", "q_proj", _names("model.layers", "self_attn.q_proj")),
    ("llama", ("self_attn.q_proj",), _names("model.layers", "self_attn.q_proj")),
    ("llama", ("layers.1.self_attn.q_proj",), {"model.layers.1.self_attn.q_proj"}),
    ("llama", ("model.layers.0.mlp.up_proj",), {"model.layers.0.mlp.up_proj"}),
    ("llama", r".*\.1\..*\.(q|v)_proj", {f"model.layers.1.self_attn.{x}_proj" for x in "qv"}),
    ("llama", ("q_proj", "lm_head"), {*_names("model.layers", "self_attn.q_proj"), "lm_head"}),
    ("bert", ("output.dense",), _names("encoder.layer", "attention.output.dense", "output.dense")),
    ("gpt2", ("h.1.attn.c_attn.k",), {"transformer.h.1.attn.c_attn.k"}),
    ("gpt2", ("c_attn",), _names("transformer.h", "attn.c_attn")),
    ("t5", ("EncDecAttention.v",), {f"{a}.v" for a in _T5_CROSS}),
]


@pytest.mark.parametrize(("name", "targets", "expected"), _MATCHES, ids=range(len(_MATCHES)))
def test_names_suffixes_and_regular_expressions(
    name: str, targets: Any, expected: set[str]
) -> None:
    plan = plan_adapter(tiny_models.build(name), LoraSpec(targets=targets, r=2))
    assert {s.name for s in plan.sites} == expected


def test_a_suffix_matches_whole_names_only() -> None:
    # "proj" and "_proj" are ends of names, not of dotted paths; "o" must not match "o_proj".
    for wrong in ("proj", "_proj", "o", "attn.q_proj"):
        with pytest.raises(TargetError):
            plan_adapter(tiny_models.build("llama"), LoraSpec(targets=(wrong,)))


@pytest.mark.parametrize(
    ("targets", "named"),
    [
        (("q_porj",), "q_proj"),
        (("q_proj", "v_porj"), "v_proj"),
        (("v_proj", "mlp.upproj"), "up_proj"),
        ("atention", "attention"),
        (r".*\.7\.q_proj", ""),
        (("(q_proj",), ""),
    ],
    ids=str,
)
def test_a_target_that_matches_nothing_is_an_error_also_beside_one_that_does(
    targets: Any, named: str
) -> None:
    model = tiny_models.build("llama")
    ids = module_ids(model)
    with pytest.raises(TargetError) as caught:
        plan_adapter(model, LoraSpec(targets=targets))
    text = str(caught.value)
    assert named in text
    wrong = targets if isinstance(targets, str) else targets[-1]
    assert repr(wrong) in text
    assert module_ids(model) == ids


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("gpt2", ("ln_1",)),
        ("llama", ("q_proj", "input_layernorm")),
        ("llama", ("self_attn",)),
        ("gpt2", ("c_attn", "c_attn.q")),
        ("gpt2", ("c_proj.q",)),
        ("phi3", ("gate_up_proj.middle",)),
    ],
    ids=str,
)
def test_what_cannot_be_adapted_is_an_error(name: str, targets: tuple[str, ...]) -> None:
    with pytest.raises(TargetError) as caught:
        plan_adapter(tiny_models.build(name), LoraSpec(targets=targets))
    assert any(t in str(caught.value) for t in targets)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"r": 0}, "r"),
        ({"r": -3}, "r"),
        ({"r": 2.0}, "r"),
        ({"r": "8"}, "r"),
        ({"r": True}, "r"),
        ({"alpha": 0}, "alpha"),
        ({"alpha": -1.0}, "alpha"),
        ({"alpha": float("nan")}, "alpha"),
        ({"alpha": float("inf")}, "alpha"),
        ({"alpha": "16"}, "alpha"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": -0.1}, "dropout"),
        ({"dropout": float("nan")}, "dropout"),
        ({"targets": ()}, "targets"),
        ({"targets": ""}, "targets"),
        ({"targets": ("q_proj", "")}, "targets"),
        ({"targets": None}, "targets"),
        ({"targets": 3}, "targets"),
        ({"scaling": "alpha"}, "scaling"),
        ({"bias": "some"}, "bias"),
        ({"init": "zeros"}, "init"),
        ({"update": "loha"}, "update"),
        ({"bias": ["none"]}, "bias"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": -2}}, "alpha_pattern"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern"),
        ({"alpha_pattern": None}, "alpha_pattern"),
        ({"also_train": 5}, "also_train"),
        ({"also_train": None}, "also_train"),
        ({"also_train": ("",)}, "also_train"),
    ],
    ids=str,
)
def test_a_spec_that_cannot_be_names_its_field(values: dict[str, Any], named: str) -> None:
    with pytest.raises(SpecError) as caught:
        LoraSpec.from_dict(values)
    assert named in str(caught.value)


def test_unknown_keys_come_with_the_nearest_name() -> None:
    with pytest.raises(SpecError, match="dropout"):
        LoraSpec.from_dict({"dropuot": 0.1})
    with pytest.raises(SpecError, match="alpha"):
        LoraSpec.from_dict({"lora_alpha": 3})


def test_a_spec_survives_plain_values() -> None:
    spec = LoraSpec(
        r=3,
        alpha=2.5,
        targets=("q_proj", "c_attn.v"),
        rank_pattern={"q": 4},
        alpha_pattern={"v": 1.0},
        also_train=("lm_head",),
        scaling="alpha/sqrt(r)",
        bias="all",
        dropout=0.1,
    )
    import json

    assert LoraSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_a_rank_above_the_matrix_warns() -> None:
    model = tiny_models.build("llama")
    with pytest.warns(LorakitWarning, match="rank") as caught:
        plan = plan_adapter(model, LoraSpec(targets=("v_proj", "q_proj"), r=20))
    # v_proj is 16 x 32: 20 is too much; q_proj is 32 x 32: it is not.
    text = " ".join(str(w.message) for w in caught)
    assert "v_proj" in text
    assert "q_proj" not in text
    assert plan.notes
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan_adapter(model, LoraSpec(targets=("v_proj",), r=16))


def test_patterns_give_each_site_its_rank_alpha_and_scaling() -> None:
    spec = LoraSpec(
        r=4,
        alpha=6,
        targets=("q_proj", "v_proj"),
        rank_pattern={"layers.1.self_attn.q_proj": 2, "q_proj": 3},
        alpha_pattern={r"layers\.\d+\.self_attn\.v_proj": 10},
    )
    plan = plan_adapter(tiny_models.build("llama"), spec)
    found = {(s.name.split(".")[2], s.name[-6:]): (s.r, s.alpha, s.scaling) for s in plan.sites}
    assert found == {
        ("0", "q_proj"): (3, 6, 2.0),
        ("1", "q_proj"): (2, 6, 3.0),
        ("0", "v_proj"): (4, 10, 2.5),
        ("1", "v_proj"): (4, 10, 2.5),
    }


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_matches_nothing_is_an_error(field: str) -> None:
    spec = LoraSpec.from_dict({"targets": ["q_proj"], field: {"q_proj": 2, "v_proj": 3}})
    with pytest.raises(TargetError, match="v_proj"):
        plan_adapter(tiny_models.build("llama"), spec)


@pytest.mark.parametrize("name", ["lm_haed", "score"])
def test_also_train_that_matches_nothing_is_an_error(name: str) -> None:
    with pytest.raises(TargetError, match=name):
        plan_adapter(tiny_models.build("llama"), LoraSpec(also_train=(name,)))


def test_also_train_of_an_adapted_module_is_an_error() -> None:
    for beside in ("q_proj", "self_attn"):
        with pytest.raises((TargetError, SpecError), match=r"q_proj|self_attn"):
            plan_adapter(
                tiny_models.build("llama"), LoraSpec(targets=("q_proj",), also_train=(beside,))
            )


def test_a_preset_leaves_out_what_is_trained_as_a_whole() -> None:
    model = tiny_models.build("llama")
    spec = LoraSpec(targets="all-linear", also_train=("layers.1.mlp",))
    plan = plan_adapter(model, spec)
    mlps = [site.module for site in plan.sites if ".mlp." in site.module]
    assert len(mlps) == 3
    assert all("layers.0" in name for name in mlps)
    assert [site.module for site in plan.overrides] == ["model.layers.1.mlp"]


def test_dora_plans_one_magnitude_per_output_row() -> None:
    model = tiny_models.build("gpt2")
    spec = {"targets": ("c_attn.q", "c_fc", "wpe"), "rank_pattern": {"c_fc": 5}}
    plain = plan_adapter(model, LoraSpec(**spec))
    dora = plan_adapter(model, LoraSpec(update="dora", **spec))
    assert dora.num_params() == plain.num_params() + sum(site.shape[0] for site in dora.sites)


def test_the_scaling_is_what_the_papers_say() -> None:
    from lorakit.math.scaling import alpha_for, lora_scaling

    assert lora_scaling(16, 4, "alpha/r") == 4.0
    assert lora_scaling(16, 4, "alpha/sqrt(r)") == 8.0
    for rule in ("alpha/r", "alpha/sqrt(r)"):
        for r in (1, 3, 7, 64):
            assert lora_scaling(alpha_for(0.3, r, rule), r, rule) == pytest.approx(0.3, rel=1e-15)


@pytest.mark.parametrize("init", ["gaussian", "kaiming"])
def test_the_start_is_distributed_as_promised(init: str) -> None:
    from lorakit.adapters.attach import attach

    linear = torch.nn.Sequential(torch.nn.Linear(400, 7))
    with pytest.warns(LorakitWarning, match="rank"):
        attach(linear, LoraSpec(targets=("0",), r=200, init=init))
    factors = {n: p for n, p in linear.named_parameters() if p.requires_grad}
    a = next(p for n, p in factors.items() if n.endswith("lora_A"))
    b = next(p for n, p in factors.items() if n.endswith("lora_B"))
    assert a.shape == (200, 400)
    assert b.shape == (7, 200)
    assert not b.any()
    bound = 400**-0.5
    if init == "gaussian":
        assert a.std().item() == pytest.approx(bound, rel=0.02)
        assert a.abs().max() > 2 * bound
    else:
        assert a.abs().max() <= bound
        assert a.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
