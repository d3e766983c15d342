"""Where a model begins to count positions, and how many it has."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    PretrainedConfig,
    PreTrainedModel,
)

import tiny_models
from lorakit.models.positions import first_position, num_positions

# Those of other configurations than RoBERTa's that number positions behind a padding index.
BEHIND_PADDING = ["roberta", "xlm-roberta", "camembert", "mpnet", "data2vec-text", "longformer"]
FROM_ZERO = ["bert", "gpt2", "opt", "electra", "gpt_neo"]


def small(model_type: str, padding: int) -> PreTrainedModel:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    if model_type == "gpt_neo":
        sizes = {"hidden_size": 16, "num_layers": 1, "attention_types": [[["global"], 1]]}
    config: PretrainedConfig = AutoConfig.for_model(
        model_type,
        vocab_size=64,
        num_attention_heads=2,
        num_heads=2,
        max_position_embeddings=40,
        n_positions=40,
        pad_token_id=padding,
        **sizes,
    )
    with torch.device("meta"):
        return AutoModel.from_config(config)


@pytest.mark.parametrize("model_type", BEHIND_PADDING)
def test_positions_behind_a_padding_index_are_found_without_names(
    model_type: str,
) -> None:
    model = small(model_type, 1)
    assert first_position(model) == 2
    assert num_positions(model) == 38


@pytest.mark.parametrize("model_type", FROM_ZERO)
def test_a_table_without_a_padding_index_counts_from_zero(model_type: str) -> None:
    model = small(model_type, 1)
    assert first_position(model) == 0
    assert num_positions(model) == 40


@pytest.mark.parametrize(
    ("architecture", "context"),
    [("bloom", None), ("t5", None), ("llama", 2048), ("roberta", 65), ("deberta-v2", 64)],
)
def test_how_much_a_model_can_read(architecture: str, context: int | None) -> None:
    assert num_positions(tiny_models.build(architecture)) == context


def test_the_longest_row_that_is_allowed_runs_and_one_more_token_does_not() -> None:
    model = tiny_models.build("roberta").eval()
    most = num_positions(model)
    assert most is not None
    ids = torch.full((1, most), 5)
    assert model(input_ids=ids).last_hidden_state.shape[1] == most
    with pytest.raises((IndexError, RuntimeError), match=r"out of (bounds|range)"):
        model(input_ids=torch.full((1, most + 1), 5))
