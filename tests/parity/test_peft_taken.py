"""Linear layers that PEFT takes for experts: it reads our updates of them, and we read its own."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.utils.transformers_weight_conversion import _MOE_TARGET_MODULE_MAPPING
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN

import tiny_models
from learned import attach_learned
from lorakit.adapters.architectures import TAKEN_FOR_EXPERTS
from lorakit.adapters.spec import LoraSpec
from lorakit.converting import convert
from lorakit.errors import LorakitWarning
from lorakit.formats.peft import load_adapter, read_adapter, save_adapter

SHARED = r"layers\.\d+\.mlp\.shared_experts\..*"


def built() -> PreTrainedModel:
    return tiny_models.seeded(tiny_models.deepseek_v3).eval()


def test_every_architecture_that_peft_renames_is_known() -> None:
    theirs = {
        kind: frozenset(_MOE_TARGET_MODULE_MAPPING[like])
        for kind, like in _MODEL_TO_CONVERSION_PATTERN.items()
        if like in _MOE_TARGET_MODULE_MAPPING and kind in CONFIG_MAPPING
    }
    assert theirs.items() <= TAKEN_FOR_EXPERTS.items()


@pytest.mark.parametrize(
    ("targets", "given"),
    [
        ("all-linear", {}),
        ("mlp", {"dropout": 0.1}),
        (("o_proj", SHARED), {"rank_pattern": {SHARED: 5}, "alpha_pattern": {"up_proj": 9.0}}),
        ("mlp", {"scaling": "alpha/sqrt(r)"}),
    ],
)
def test_peft_reads_updates_of_what_it_takes_for_experts(
    targets: str | tuple[str, ...], given: dict[str, Any], tmp_path: Path
) -> None:
    model, plain = built(), built()
    x = tiny_models.inputs(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LorakitWarning)  # the stacks are not adapted
        attach_learned(model, LoraSpec(targets=targets, r=3, alpha=7.0, **given))
    wanted = tiny_models.outputs(model.eval(), x)
    save_adapter(model, tmp_path / "ours")
    with warnings.catch_warnings():
        # PEFT 0.20 looks for the names of patterns among modules alone; they do apply.
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys")
        theirs = PeftModel.from_pretrained(built(), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(tiny_models.outputs(theirs, x), wanted)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    for written in ("ours", "theirs"):
        load_adapter(plain, tmp_path / written, name=written)
        torch.testing.assert_close(tiny_models.outputs(plain, x), wanted)
    spec = load_adapter(model, tmp_path / "ours", name="again").spec
    assert (spec.r, spec.dropout) == (3, given.get("dropout", 0.0))


def test_they_are_converted_as_ordinary_layers(tmp_path: Path) -> None:
    model = built()
    model.save_pretrained(tmp_path / "base")
    attach_learned(model, LoraSpec(targets=("o_proj", SHARED), r=3, alpha=7.0))
    adapter = save_adapter(model, tmp_path / "ours")
    base = str(tmp_path / "base")
    convert(tmp_path / "ours", tmp_path / "mlx", to="mlx", base=base)
    convert(tmp_path / "mlx", tmp_path / "again", to="peft", base=base)
    again = read_adapter(tmp_path / "again")
    assert again.factors.keys() == adapter.factors.keys()
    for name, factors in adapter.factors.items():
        torch.testing.assert_close(again.delta(name), factors.scaling * factors.B @ factors.A)
    theirs = PeftModel.from_pretrained(built(), str(tmp_path / "again")).eval()
    x = tiny_models.inputs(model)
    torch.testing.assert_close(tiny_models.outputs(theirs, x), tiny_models.outputs(model, x))
