"""Where an architecture's own code goes past its layers: facts read from transformers and PEFT."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_SCANNED = frozenset({"dt_proj", "x_proj", "out_proj"})
_OUT = frozenset({"out_proj"})
# Layers of state-space blocks whose weights a kernel takes as they are, at least while training.
_READ = {
    "mamba": _SCANNED,
    "falcon_mamba": _SCANNED,
    "jamba": frozenset({"dt_proj"}),
    "mamba2": _OUT,
    "bamba": _OUT,
    "falcon_h1": _OUT,
    "granitemoehybrid": _OUT,
    "nemotron_h": _OUT,
    "zamba2": _OUT,
    "longcat_flash": frozenset({"classifier"}),
}
# Projections of relative positions, which are one table for the whole batch.
_POSITIONS = {
    "deberta": frozenset({"pos_proj", "pos_q_proj"}),
    "deberta-v2": frozenset({"pos_key_proj", "pos_query_proj"}),
}
# Layers that are given (positions, rows, features).
_SLIDING = frozenset({"query", "key", "value", "query_global", "key_global", "value_global"})
_POSITIONS_FIRST = {"longformer": _SLIDING, "led": _SLIDING}
# Experts that were modules in transformers 4 are stacks in transformers 5, and PEFT (0.19 to 0.21,
# _convert_peft_config_moe) moves these names from target_modules to the stacks: by the last
# component alone, so also those of dense blocks and shared experts.
_GATED = frozenset({"gate", "gate_proj", "up_proj", "down_proj"})
_NUMBERED = frozenset({"gate", "w1", "w2", "w3"})
TAKEN_FOR_EXPERTS: Mapping[str, frozenset[str]] = {
    **dict.fromkeys(
        (
            *("afmoe", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32"),
            *("dots1", "ernie4_5_moe", "exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite"),
            *("glm4v_moe", "glm_moe_dsa", "hunyuan_v1_moe", "longcat_flash", "mellum", "olmoe"),
            *("qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_omni_moe_text"),
            *("qwen3_omni_moe_thinker", "solar_open"),
        ),
        _GATED,
    ),
    **dict.fromkeys(("minimax", "minimax_m2"), _NUMBERED),
}


def uncalled(config: Any, leaf: str) -> str | None:
    """Why an adapter on this layer would do nothing, or None.

    Args:
        config: the model's transformers configuration, or None.
        leaf: the last component of the layer's name.
    """
    if config is None or leaf not in _READ.get(str(config.model_type), ()):
        return None
    return "the model's code reads its weight and does not call it: no branch would run"


def rows_not_apart(config: Any, leaves: Iterable[str]) -> str | None:
    """Why rows of a batch cannot have adapters of their own on these layers, or None.

    Args:
        config: the model's transformers configuration, or None.
        leaves: the layers that are adapted, last components.
    """
    kind, given = str(config.model_type) if config else "", set(leaves)
    shared = _POSITIONS.get(kind, frozenset[str]())
    if shared and getattr(config, "share_att_key", False):
        shared |= {"query_proj", "key_proj"}
    if found := sorted(shared & given):
        return f"{', '.join(found)} are adapted and compute relative positions once for all rows"
    if found := sorted(_POSITIONS_FIRST.get(kind, frozenset[str]()) & given):
        return f"{', '.join(found)} are adapted and are given a batch with its positions first"
    return None


def taken_for_experts(model_type: str, names: Iterable[str]) -> list[str]:
    """Those of these layers that PEFT, told their names in target_modules, takes for experts.

    Args:
        model_type: of the model's transformers configuration.
        names: adapted layers.
    """
    leaves = TAKEN_FOR_EXPERTS.get(model_type, frozenset())
    return [name for name in names if name.rpartition(".")[2] in leaves]
