"""What a hostile, broken or foreign adapter directory does: one clear error, nothing attached."""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import struct
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_models
from law_cases import Case, grid
from learned import assert_same_bits, attach_learned, bits, module_ids
from lorakit.adapters.adapter import Adapter
from lorakit.adapters.attach import active_adapter, attach, detach
from lorakit.adapters.extract import adapter_from_model
from lorakit.adapters.fold import merge
from lorakit.adapters.spec import LoraSpec
from lorakit.adapters.targets import base_modules
from lorakit.errors import (
    AdapterFileError,
    BaseMismatchError,
    LorakitError,
    LorakitWarning,
    OutputError,
    RequestError,
    StateError,
)
from lorakit.formats.peft import load_adapter, save_adapter
from lorakit.formats.peft_config import named_base
from lorakit.methods.files import read_saved

TENSORS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A learned adapter of the tiny llama on q_proj and v_proj, as files."""
    model = tiny_models.build("llama")
    attach_learned(model, LoraSpec(r=3, alpha=5))
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def _edit_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / CONFIG).read_text())
    config.update(changes)
    (path / CONFIG).write_text(json.dumps(config))


def _edit_tensors(path: Path, change: Any) -> None:
    tensors = load_file(path / TENSORS)
    change(tensors)
    save_file(tensors, path / TENSORS, metadata={"format": "pt"})


def _refused(path: Path, kind: type[LorakitError] = AdapterFileError) -> str:
    """Load into a fresh model; the error's text. Nothing may be left attached."""
    model = tiny_models.build("llama")
    ids, values = module_ids(model), bits(model)
    grads = [p.requires_grad for p in model.parameters()]
    with pytest.raises(kind) as caught:
        load_adapter(model, path)
    assert module_ids(model) == ids
    assert_same_bits(values, bits(model))
    assert [p.requires_grad for p in model.parameters()] == grads
    with pytest.raises(StateError):
        detach(model)
    return str(caught.value)


@grid()
def test_the_round_trip_keeps_every_bit(
    case: Case, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = tiny_models.build(case.architecture)
    given = tiny_models.inputs(model)
    plan = attach_learned(model, case.make(), "mine", warns=case.warns)
    live = tiny_models.outputs(model, given)
    mine = adapter_from_model(model, "mine")
    values = bits(model)
    save_adapter(model, tmp_path / "a", "mine")
    assert_same_bits(values, bits(model))
    fresh = tiny_models.build(case.architecture)
    load_adapter(fresh, tmp_path / "a", "again")
    assert active_adapter(fresh) == "again"
    again = adapter_from_model(fresh, "again")
    assert list(again.factors) == list(mine.factors) == [s.name for s in plan.sites]
    differing = [
        name
        for name, f in mine.factors.items()
        if not (f.A.equal(again.factors[name].A) and f.B.equal(again.factors[name].B))
    ]
    # PEFT's file has one scaling per module: where parts differ, the ratio is folded into B, and
    # from then on nothing moves.
    folded = [n for n, f in mine.factors.items() if f.scaling != again.factors[n].scaling]
    assert folded == (differing if "parts-ranks" in request.node.callspec.id else [])
    assert differing == folded
    for name in folded:
        weight = base_modules(fresh)[mine.factors[name].module].get_parameter("weight")
        delta = mine.factors[name].delta(weight)
        torch.testing.assert_close(again.factors[name].delta(weight), delta, rtol=1e-5, atol=1e-6)
    assert {k for k, v in mine.biases.items() if not v.equal(again.biases[k])} == set()
    assert {k for k, v in mine.overrides.items() if not v.equal(again.overrides[k])} == set()
    assert again.spec == mine.spec
    torch.testing.assert_close(
        tiny_models.outputs(fresh, given),
        live,
        rtol=1e-6 if folded else 0,
        atol=1e-6 if folded else 0,
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lora_bias", True),
        ("target_parameters", ["mlp.experts.gate_up_proj"]),
        ("trainable_token_indices", [1, 2]),
        ("layer_replication", [[0, 2], [1, 2]]),
        ("alora_invocation_tokens", [5, 6]),
        ("use_qalora", True),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("kasa_config", {"rank": 4}),
        ("arrow_config", {"top_k": 2}),
        ("peft_type", "LOHA"),
    ],
)
def test_keys_that_change_the_result_are_refused_by_name(
    saved: Path, key: str, value: object
) -> None:
    _edit_config(saved, **{key: value})
    text = _refused(saved)
    assert key in text
    if isinstance(value, str):
        assert value in text


@pytest.mark.parametrize("value", [None, [], {}])
def test_the_same_keys_at_rest_are_accepted(saved: Path, value: object) -> None:
    for key in ("layer_replication", "alora_invocation_tokens", "arrow_config"):
        _edit_config(saved, **{key: value})
    Adapter.load(saved)


def test_unknown_harmless_keys_are_kept(saved: Path, tmp_path: Path) -> None:
    _edit_config(saved, my_note="made on a Tuesday", eva_config=None, revision="abc")
    with pytest.warns(LorakitWarning, match="my_note"):
        adapter = Adapter.load(saved)
    adapter.save(tmp_path / "copy")
    config = json.loads((tmp_path / "copy" / CONFIG).read_text())
    assert config["my_note"] == "made on a Tuesday"
    assert config["revision"] == "abc"


def test_all_problems_are_listed_in_one_error(saved: Path) -> None:
    q0 = "base_model.model.model.layers.0.self_attn.q_proj"
    v0 = "base_model.model.model.layers.0.self_attn.v_proj"
    q1 = "base_model.model.model.layers.1.self_attn.q_proj"
    v1 = "base_model.model.model.layers.1.self_attn.v_proj"

    def spoil(t: dict[str, torch.Tensor]) -> None:
        del t[f"{q0}.lora_A.weight"], t[f"{q0}.lora_B.weight"]
        t[f"{v0}.lora_B.weight"] = torch.zeros(17, 3)
        t[f"{q1}.lora_A.weight"][0, 0] = float("nan")
        t["base_model.model.model.layers.9.mlp.up_proj.lora_A.weight"] = torch.ones(3, 32)
        t["base_model.model.model.layers.9.mlp.up_proj.lora_B.weight"] = torch.ones(48, 3)
        del t[f"{v1}.lora_B.weight"]

    _edit_tensors(saved, spoil)
    text = _refused(saved)
    for site in (
        "layers.0.self_attn.q_proj",
        "layers.0.self_attn.v_proj",
        "layers.1.self_attn.q_proj",
        "layers.1.self_attn.v_proj",
        "layers.9.mlp.up_proj",
    ):
        assert site in text, f"{site} is not in:\n{text}"


@pytest.mark.parametrize("passport", [True, False], ids=["with-passport", "plain-peft"])
@pytest.mark.parametrize("problem", ["missing", "missing-half", "extra", "misshapen", "nan", "inf"])
def test_each_problem_alone_is_refused(saved: Path, problem: str, passport: bool) -> None:
    key = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"

    def spoil(t: dict[str, torch.Tensor]) -> None:
        if problem.startswith("missing"):
            del t[key]
            if problem == "missing":
                del t[key.replace("lora_B", "lora_A")]
        elif problem == "extra":
            t["base_model.model.model.layers.1.self_attn.v_proj.lora_C.weight"] = torch.ones(2)
        elif problem == "misshapen":
            t[key] = t[key].T.contiguous()
        else:
            t[key][1, 1] = float(problem)

    _edit_tensors(saved, spoil)
    if not passport:
        (saved / "lorakit.json").unlink()
    assert "layers.1.self_attn.v_proj" in _refused(saved)


def test_a_missing_module_to_save_or_bias_is_noticed(tmp_path: Path) -> None:
    model = tiny_models.build("bert")
    spec = LoraSpec(targets=("query",), bias="lora_only", also_train=("pooler",))
    attach_learned(model, spec)
    save_adapter(model, tmp_path / "a")
    for ending in ("pooler.dense.weight", "layer.1.attention.self.query.base_layer.bias"):
        broken = tmp_path / ending
        Adapter.load(tmp_path / "a").save(broken)
        _edit_tensors(broken, lambda t, e=ending: t.pop(f"base_model.model.{_full(t, e)}"))
        fresh = tiny_models.build("bert")
        with pytest.raises(AdapterFileError, match=r"pooler|query"):
            load_adapter(fresh, broken)


def _full(tensors: dict[str, torch.Tensor], ending: str) -> str:
    return next(k for k in tensors if k.endswith(ending)).removeprefix("base_model.model.")


def test_an_adapter_that_changes_nothing_warns(tmp_path: Path) -> None:
    model = tiny_models.build("llama")
    attach(model, LoraSpec())
    save_adapter(model, tmp_path / "zero")
    fresh = tiny_models.build("llama")
    with pytest.warns(LorakitWarning, match="changes nothing"):
        load_adapter(fresh, tmp_path / "zero")


def test_a_dora_adapter_that_moved_only_magnitudes_does_not_warn(tmp_path: Path) -> None:
    spec = LoraSpec(r=2, targets=("c_attn.q", "c_attn.v", "c_fc"), update="dora")
    model = tiny_models.build("gpt2")
    attach(model, spec)
    save_adapter(model, tmp_path / "zero")
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if n.endswith("magnitude"))[3] *= 1.01
    save_adapter(model, tmp_path / "moved")
    given = tiny_models.inputs(model)
    fresh = tiny_models.build("gpt2")
    base = tiny_models.outputs(fresh, given)
    load_adapter(fresh, tmp_path / "moved", name="moved")
    assert not tiny_models.outputs(fresh, given).equal(base)
    with pytest.warns(LorakitWarning, match="changes nothing.*every magnitude its norm"):
        load_adapter(fresh, tmp_path / "zero", name="zero")


def test_an_adapter_that_binds_nothing_is_an_error(saved: Path) -> None:
    model = tiny_models.build("gpt2")
    with pytest.raises(AdapterFileError, match="nothing"):
        load_adapter(model, saved, any_base=True)
    with pytest.raises(StateError):
        detach(model)


_LEFT_INSIDE = {
    "compiled": lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
    "compiled-around-peft": lambda key: f"_orig_mod.{key}",
    "compiled-layers": lambda key: key.replace(".self_attn.", "._orig_mod.self_attn."),
    "fsdp": lambda key: key.replace(".self_attn.", "._fsdp_wrapped_module.self_attn."),
    "recomputed": lambda key: key.replace(".self_attn.", "._checkpoint_wrapped_module.self_attn."),
    "ddp": lambda key: f"module.{key}",
    "named": lambda key: key.replace(".weight", ".sql.weight"),
    "named-default": lambda key: key.replace(".weight", ".default.weight"),
}


@pytest.mark.parametrize("how", list(_LEFT_INSIDE))
def test_what_training_left_inside_keys_is_taken_out(saved: Path, how: str, tmp_path: Path) -> None:
    (saved / "lorakit.json").unlink()
    whole = tiny_models.build("llama")
    wanted = load_adapter(whole, saved)
    renamed = {_LEFT_INSIDE[how](k): t for k, t in load_file(saved / TENSORS).items()}
    assert renamed.keys() != load_file(saved / TENSORS).keys()
    save_file(renamed, saved / TENSORS)
    model = tiny_models.build("llama")
    found = load_adapter(model, saved)
    assert found.factors.keys() == wanted.factors.keys()
    given = tiny_models.inputs(model)
    assert tiny_models.outputs(model, given).equal(tiny_models.outputs(whole, given))


def test_names_inside_keys_of_dora_embeddings_and_whole_modules(tmp_path: Path) -> None:
    model = tiny_models.build("llama")
    spec = LoraSpec(
        r=3, alpha=5, targets=("q_proj", "embed_tokens"), update="dora", also_train=("norm",)
    )
    attach_learned(model, spec)
    save_adapter(model, tmp_path)
    (tmp_path / "lorakit.json").unlink()

    def as_in_memory(key: str) -> str:
        if ".lora_" not in key:
            return key.replace(".norm.", ".norm.modules_to_save.sql.")
        if key.endswith(".lora_magnitude_vector"):
            return f"{key}.sql.weight"
        return key.replace(".weight", ".sql.weight") if ".weight" in key else f"{key}.sql"

    renamed = {as_in_memory(k): t for k, t in load_file(tmp_path / TENSORS).items()}
    assert sum(".sql" in key for key in renamed) == len(renamed)
    save_file(renamed, tmp_path / TENSORS)
    again = tiny_models.build("llama")
    load_adapter(again, tmp_path)
    given = tiny_models.inputs(model)
    torch.testing.assert_close(tiny_models.outputs(again, given), tiny_models.outputs(model, given))


def test_several_adapters_in_one_file_are_refused_by_name(saved: Path) -> None:
    tensors = load_file(saved / TENSORS)
    both = {
        k.replace(".weight", f".{n}.weight"): t.clone() for n in "ab" for k, t in tensors.items()
    }
    save_file(both, saved / TENSORS)
    text = _refused(saved)
    assert "several adapters" in text
    assert "a, b" in text


def test_two_values_of_one_parameter_are_refused(tmp_path: Path) -> None:
    model = tiny_models.build("llama")
    attach_learned(model, LoraSpec(r=3, alpha=5, targets="qv", also_train=("lm_head",)))
    save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    name = "base_model.model.lm_head"
    copy = tensors[f"{name}.weight"].clone()
    save_file({**tensors, f"{name}.modules_to_save.weight": copy}, tmp_path / TENSORS)
    Adapter.load(tmp_path)
    copy[0, 0] += 1
    save_file({**tensors, f"{name}.modules_to_save.weight": copy}, tmp_path / TENSORS)
    assert "two values of one parameter" in _refused(tmp_path)


def test_a_tensor_that_stands_twice_is_refused(saved: Path) -> None:
    def spoil(t: dict[str, torch.Tensor]) -> None:
        key = next(iter(t))
        t[f"_orig_mod.{key}"] = t[key] + 1

    _edit_tensors(saved, spoil)
    assert "lora_A.weight" in _refused(saved)


def test_parts_that_were_not_gathered_are_said(saved: Path) -> None:
    def spoil(t: dict[str, torch.Tensor]) -> None:
        t.update({key: torch.empty(0) for key in t})

    _edit_tensors(saved, spoil)
    assert "ZeRO-3" in _refused(saved)


@pytest.mark.parametrize("content", [[1], {"a": 1}, {"state_dict": {"x": torch.ones(2)}}])
def test_an_old_bin_that_is_no_state_dict_is_refused(saved: Path, content: object) -> None:
    (saved / TENSORS).unlink()
    torch.save(content, saved / "adapter_model.bin")
    assert "not a state dict" in _refused(saved)


def test_another_tools_tensors_are_named(saved: Path) -> None:
    (saved / TENSORS).rename(saved / "adapters.safetensors")
    text = _refused(saved)
    assert "adapters.safetensors" in text
    assert "lorakit convert" in text


def test_a_revision_of_the_base_is_not_passed_over() -> None:
    config = {"base_model_name_or_path": "some/model", "revision": "abc"}
    with pytest.warns(LorakitWarning, match="revision abc of some/model"):
        assert named_base(config, Path("here"), "--base") == "some/model"
    for revision in (None, "", "main"):
        assert named_base({**config, "revision": revision}, Path("here"), "--base")


def test_modules_to_save_may_be_one_name(tmp_path: Path) -> None:
    model = tiny_models.build("llama")
    attach_learned(model, LoraSpec(r=3, alpha=5, targets="qv", also_train=("norm",)))
    save_adapter(model, tmp_path)
    (tmp_path / "lorakit.json").unlink()
    _edit_config(tmp_path, modules_to_save="norm")
    assert Adapter.load(tmp_path).spec.also_train == ("norm",)


@pytest.mark.parametrize(
    "values", [{"also_train": ("embed_tokens",)}, {"targets": ("embed_tokens", "q_proj")}]
)
def test_tokens_that_were_added_to_the_base_are_said_and_can_be_added_here(
    values: dict[str, Any], tmp_path: Path
) -> None:
    trained = tiny_models.build("llama")
    trained.resize_token_embeddings(tiny_models.VOCAB + 5)
    whole: dict[str, Any] = {"r": 3, "alpha": 5, "targets": "qv", **values}
    attach_learned(trained, LoraSpec(**whole))
    save_adapter(trained, tmp_path)
    (tmp_path / "lorakit.json").unlink()
    text = _refused(tmp_path)
    assert f"model.resize_token_embeddings({tiny_models.VOCAB + 5})" in text.replace("\n", " ")
    model = tiny_models.build("llama")
    model.resize_token_embeddings(tiny_models.VOCAB + 5)
    load_adapter(model, tmp_path)
    given = {"input_ids": torch.tensor([[1, 7, tiny_models.VOCAB + 3]])}
    with torch.no_grad():
        here = model.model.embed_tokens(given["input_ids"])[0, :2]
        there = trained.model.embed_tokens(given["input_ids"])[0, :2]
    torch.testing.assert_close(here, there)


def test_a_classifiers_adapter_on_a_language_model_says_what_it_wants(saved: Path) -> None:
    def spoil(t: dict[str, torch.Tensor]) -> None:
        t["base_model.model.score.weight"] = torch.ones(2, 32)

    _edit_tensors(saved, spoil)
    _edit_config(saved, task_type="SEQ_CLS", modules_to_save=["score"])
    assert "task_type SEQ_CLS" in _refused(saved)


def test_an_empty_tensor_file_is_an_error(saved: Path) -> None:
    save_file({}, saved / TENSORS)
    _refused(saved)


def _header(payload: bytes, *, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(payload) if length is None else length) + payload


_HOSTILE = {
    "empty": b"",
    "short": b"\x01\x02\x03",
    "huge-header": _header(b"{}", length=2**63),
    "header-past-the-end": _header(b"{}", length=100_000),
    "not-json": _header(b"{not json at all"),
    "not-utf8": _header(b"\xff\xfe\xfd\xfc"),
    "a-list": _header(b"[1, 2, 3]"),
    "out-of-range": _header(
        json.dumps({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 2**40]}}).encode()
    ),
    "negative": _header(
        json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}).encode()
    ),
    "huge-shape": _header(
        json.dumps({"x": {"dtype": "F32", "shape": [2**62, 8], "data_offsets": [0, 4]}}).encode()
    )
    + b"\0\0\0\0",
    "unknown-dtype": _header(
        json.dumps({"x": {"dtype": "Q9", "shape": [1], "data_offsets": [0, 4]}}).encode()
    )
    + b"\0\0\0\0",
    "a-pickle": b"\x80\x04\x95" + b"cos\nsystem\n(S'true'\ntR.",
}


@pytest.mark.parametrize("name", list(_HOSTILE))
def test_a_hostile_tensor_file_is_refused(saved: Path, name: str) -> None:
    (saved / TENSORS).write_bytes(_HOSTILE[name])
    assert TENSORS in _refused(saved)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.999])
def test_a_truncated_tensor_file_is_refused(saved: Path, share: float) -> None:
    whole = (saved / TENSORS).read_bytes()
    (saved / TENSORS).write_bytes(whole[: int(len(whole) * share)])
    _refused(saved)


def test_an_old_bin_that_runs_code_is_refused(saved: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.mkdir, (str(tmp_path / "owned"),)

    (saved / TENSORS).unlink()
    (saved / "adapter_model.bin").write_bytes(pickle.dumps({"x": Evil()}, protocol=2))
    _refused(saved)
    torch.save({"x": Evil()}, saved / "adapter_model.bin")
    _refused(saved)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("text", ["[]", "3", "null", '"LORA"', "{", "", "\ufeff{}{}"])
def test_a_config_that_is_not_an_object_is_refused(saved: Path, text: str) -> None:
    (saved / CONFIG).write_text(text)
    assert CONFIG in _refused(saved)


# With a passport its own spec says these, and rules: only a plain PEFT file is read for them.
PLAIN_ONLY: list[dict[str, Any]] = [
    {"lora_dropout": "much"},
    {"bias": "some"},
    {"modules_to_save": 5},
]
BAD_VALUES: list[dict[str, Any]] = [
    {"r": "three"},
    {"r": 0},
    {"r": None},
    {"lora_alpha": "x"},
    {"lora_alpha": None},
    {"lora_alpha": -1},
    {"rank_pattern": ["q_proj"]},
    {"alpha_pattern": {"q_proj": "big"}},
    {"alpha_pattern": "q"},
    {"target_modules": 7},
    {"target_modules": "(unclosed"},
    {"target_modules": [1, 2]},
]


@pytest.mark.parametrize(
    ("changes", "passport"),
    [(c, True) for c in BAD_VALUES] + [(c, False) for c in [*BAD_VALUES, *PLAIN_ONLY]],
    ids=str,
)
def test_a_config_value_that_cannot_be_is_a_request_error(
    saved: Path, changes: dict[str, Any], passport: bool
) -> None:
    _edit_config(saved, **changes)
    if not passport:
        (saved / "lorakit.json").unlink()
    _refused(saved, RequestError)


@pytest.mark.parametrize(
    "text",
    ["[]", "{}", "3", "{", '{"format": 99, "sites": [], "spec": {}}',
     '{"format": 1, "sites": [1], "spec": {}}', '{"format": 1, "sites": [], "spec": {"rank": 1}}',
     '{"format": 1, "sites": [], "spec": {}, "base": {"samples": 3, "sha256": 1}}',
     '{"format": 1, "sites": [], "spec": {}, "base": {"samples": "!!!", "sha256": "x", '
     '"layout_sha256": "y", "num_tensors": 1, "left_out": [], "dtype": "float32"}}'],
)  # fmt: skip
def test_a_broken_passport_is_a_request_error(saved: Path, text: str) -> None:
    (saved / "lorakit.json").write_text(text)
    _refused(saved, RequestError)


def test_site_records_that_lie_are_refused(saved: Path) -> None:
    passport = json.loads((saved / "lorakit.json").read_text())
    passport["sites"][0]["rows"] = {"start": 0, "length": 10**6, "step": 10**7, "count": 3}
    (saved / "lorakit.json").write_text(json.dumps(passport))
    _refused(saved, RequestError)


def test_no_directory_and_a_directory_of_adapters_say_what_is_there(tmp_path: Path) -> None:
    model = tiny_models.build("llama")
    with pytest.raises(AdapterFileError, match="nothing"):
        load_adapter(model, tmp_path / "absent")
    attach(model, LoraSpec())
    save_adapter(model, tmp_path / "many" / "sql")
    for above in (tmp_path, tmp_path / "many", tmp_path / "many" / "sql" / TENSORS):
        with pytest.raises(AdapterFileError, match=r"there are adapters in .*many/sql"):
            load_adapter(tiny_models.build("llama"), above)
        with pytest.raises(AdapterFileError, match=r"there are adapters in .*many/sql"):
            read_saved(above)


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../b", "..", ".", "con\0"])
def test_an_adapter_name_cannot_be_a_path(saved: Path, name: str) -> None:
    model = tiny_models.build("llama")
    ids = module_ids(model)
    with pytest.raises(StateError):
        load_adapter(model, saved, name)
    assert module_ids(model) == ids


def test_another_base_is_refused_unless_asked_for(saved: Path) -> None:
    other = tiny_models.build("llama", seed=5)
    ids = module_ids(other)
    with pytest.raises(BaseMismatchError, match="any_base"):
        load_adapter(other, saved)
    assert module_ids(other) == ids
    load_adapter(other, saved, any_base=True)
    assert active_adapter(other) == "default"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_base_in_another_dtype_is_the_same(saved: Path, dtype: torch.dtype) -> None:
    load_adapter(tiny_models.build("llama").to(dtype), saved)


def test_a_model_with_adapters_can_load_more(saved: Path, tmp_path: Path) -> None:
    model = tiny_models.build("llama")
    attach_learned(model, LoraSpec(targets="all-linear", bias="all", also_train=("lm_head",)), "x")
    load_adapter(model, saved, "y")
    with pytest.raises(StateError, match="y"):
        load_adapter(model, saved, "y")
    save_adapter(model, tmp_path / "y2", "y")
    one, two = load_file(saved / TENSORS), load_file(tmp_path / "y2" / TENSORS)
    assert one.keys() == two.keys()
    assert all(one[k].equal(two[k]) for k in one)


def test_saving_while_merged_writes_the_same_adapter(tmp_path: Path) -> None:
    model = tiny_models.build("llama")
    attach_learned(model, LoraSpec())
    save_adapter(model, tmp_path / "before")
    merge(model)
    save_adapter(model, tmp_path / "merged")
    load_adapter(tiny_models.build("llama"), tmp_path / "merged")
    before, after = (Adapter.load(tmp_path / n) for n in ("before", "merged"))
    assert before.passport["base"] == after.passport["base"]


def test_an_output_that_is_not_empty_is_refused_and_kept(saved: Path) -> None:
    model = tiny_models.build("llama")
    attach_learned(model, LoraSpec(r=2))
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    with pytest.raises(OutputError):
        save_adapter(model, saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    save_adapter(model, saved, replace=True)
    assert json.loads((saved / CONFIG).read_text())["r"] == 2
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    # The limit on a file's size makes the system refuse the write, as a full disk does.
    script = f"""
        import resource, signal, sys
        sys.path.insert(0, {str(Path(tiny_models.__file__).parent)!r})
        import tiny_models
        from lorakit.adapters.attach import attach
        from lorakit.adapters.spec import LoraSpec
        from lorakit.errors import OutputError
        from lorakit.formats.peft import save_adapter
        model = tiny_models.build("llama")
        attach(model, LoraSpec(r=8, targets="all-linear"))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            save_adapter(model, {str(tmp_path / "out" / "adapter")!r})
        except OutputError as error:
            print("refused:", error)
            sys.exit(2)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "refused" in done.stdout
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
    assert not (tmp_path / "out" / "adapter").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_really_full_disk_says_so(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this machine does not let us mount")
    try:
        model = tiny_models.build("llama")
        attach(model, LoraSpec(r=8, targets="all-linear"))
        with pytest.raises(OutputError, match="full"):
            save_adapter(model, disk / "adapter")
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_kill_in_the_middle_leaves_no_final_directory(tmp_path: Path) -> None:
    script = f"""
        import os, signal, sys
        sys.path.insert(0, {str(Path(tiny_models.__file__).parent)!r})
        import tiny_models
        import lorakit.formats.peft as peft
        from lorakit.adapters.attach import attach
        from lorakit.adapters.spec import LoraSpec
        model = tiny_models.build("llama")
        attach(model, LoraSpec())
        write = peft.write_json
        def die(*args, **kwargs):
            os.kill(os.getpid(), signal.SIGKILL)
        peft.write_json = die
        peft.save_adapter(model, {str(tmp_path / "adapter")!r})
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "adapter").exists()
    # And a second try works beside what the first left.
    model = tiny_models.build("llama")
    attach_learned(model, LoraSpec())
    save_adapter(model, tmp_path / "adapter")
    load_adapter(tiny_models.build("llama"), tmp_path / "adapter")


def test_the_passport_keeps_what_it_is_given(tmp_path: Path) -> None:
    model = tiny_models.build("llama")
    attach_learned(model, LoraSpec(r=3, alpha=5))
    facts = {"data": {"sha256": "ab", "num_rows": 12}, "seed": 3, "metrics": {"loss": 0.5}}
    save_adapter(model, tmp_path / "a", passport=facts)
    written = json.loads((tmp_path / "a" / "lorakit.json").read_text())
    assert all(written[k] == v for k, v in facts.items())
    assert written["spec"]["r"] == 3
    assert written["base"]["architecture"] == "LlamaForCausalLM"
    fresh = tiny_models.build("llama")
    loaded = load_adapter(fresh, tmp_path / "a")
    assert all(loaded.passport[k] == v for k, v in facts.items())
    save_adapter(fresh, tmp_path / "b")
    again = json.loads((tmp_path / "b" / "lorakit.json").read_text())
    assert all(again[k] == v for k, v in facts.items())


def test_the_size_limit_of_this_process_is_untouched() -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
