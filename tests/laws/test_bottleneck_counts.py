"""The parameter counts of Hu et al. 2021 for adapters, on the meta device.

|Theta| = L_adpt (2 d r + r + d) + 2 L_LN d, with L_LN the layer norms of Adapter-L alone.
"""

from __future__ import annotations

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from lorakit.methods.registry import build_method


def gpt2(width: int, layers: int, heads: int, **others: int) -> PreTrainedModel:
    with torch.device("meta"):
        return GPT2LMHeadModel(GPT2Config(n_embd=width, n_layer=layers, n_head=heads, **others))


def roberta(width: int, layers: int, heads: int) -> PreTrainedModel:
    config = RobertaConfig(
        vocab_size=50265,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        max_position_embeddings=514,
        type_vocab_size=1,
    )
    with torch.device("meta"):
        return RobertaForSequenceClassification(config)


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    return {
        "GPT-3": gpt2(12288, 96, 96, n_positions=2048),
        "GPT-2 M": gpt2(1024, 24, 16),
        "GPT-2 L": gpt2(1280, 36, 20),
        "RoB-base": roberta(768, 12, 12),
        "RoB-large": roberta(1024, 24, 16),
    }


# Model, method, r, exact count, what the paper prints.
ROWS = [
    ("GPT-3", "houlsby", 1, 7_078_080, "7.1M"),
    ("GPT-3", "houlsby", 4, 21_234_432, "21.2M"),
    ("GPT-3", "houlsby", 8, 40_109_568, "40.1M"),
    ("GPT-3", "houlsby", 16, 77_859_840, "77.9M"),
    ("GPT-3", "houlsby", 64, 304_361_472, "304.4M"),
    ("GPT-2 M", "lin", 6, 368_784, "0.37M"),
    ("GPT-2 M", "lin", 224, 11_089_152, "11.09M"),
    ("GPT-2 M", "houlsby", 112, 11_064_576, None),  # printed as Adapter-L's 11.09M
    ("GPT-2 L", "lin", 8, 875_808, "0.88M"),
    ("GPT-2 L", "lin", 248, 23_002_848, "23.00M"),
    ("RoB-large", "pfeiffer", 16, 811_392, "0.8M"),
    ("RoB-large", "pfeiffer", 64, 3_171_840, None),  # printed as 3.0, in units of 2^20
    ("RoB-large", "houlsby", 8, 835_968, "0.8M"),
    ("RoB-large", "houlsby", 64, 6_343_680, None),  # printed as 6.0, in units of 2^20
    ("RoB-base", "pfeiffer", 48, 894_528, "0.9M"),  # the size of the Adpt-D row before dropping
]


@pytest.mark.parametrize(("model", "method", "r", "exact", "printed"), ROWS)
def test_adapter_counts_are_the_papers(models, model, method, r, exact, printed) -> None:
    report = build_method(method, {"bottleneck": r}).plan(models[model])
    assert report.num_trainable == exact
    if printed is not None:
        digits = len(printed.partition(".")[2]) - 1
        assert f"{exact / 1e6:.{digits}f}M" == printed


@pytest.mark.parametrize(
    ("r", "printed"),
    [(64, "3.0"), (16, "0.8")],
)
def test_pfeiffer_counts_in_units_of_two_to_the_twenty(models, r, printed) -> None:
    report = build_method("pfeiffer", {"bottleneck": r}).plan(models["RoB-large"])
    assert f"{report.num_trainable / 2**20:.1f}" == printed


def test_adapterdrop_counts_the_blocks_that_keep_adapters(models) -> None:
    options = {"bottleneck": 48, "drop_first": 5}
    report = build_method("adapterdrop", options).plan(models["RoB-base"])
    assert report.num_trainable == 894_528 * 7 // 12


@pytest.mark.parametrize("model", ["GPT-2 M", "RoB-large"])
def test_layer_norms_of_the_base_count_2_d_each(models, model) -> None:
    plain = build_method("houlsby", {"bottleneck": 8}).plan(models[model])
    normed = build_method("houlsby", {"bottleneck": 8, "train_layer_norms": True})
    extra = normed.plan(models[model]).num_trainable - plain.num_trainable
    assert extra == 2 * (2 * 24) * 1024
