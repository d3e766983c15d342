"""Where an architecture's own code goes past its layers: facts read from transformers."""

from __future__ import annotations

from collections.abc import Iterable
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
}
# Projections of relative positions, which are one table for the whole batch.
_POSITIONS = {
    "deberta": frozenset({"pos_proj", "pos_q_proj"}),
    "deberta-v2": frozenset({"pos_key_proj", "pos_query_proj"}),
}


def uncalled(config: Any, leaf: str) -> str | None:
    """Why an adapter on this layer would do nothing, or None.

    Args:
        config: the model's transformers configuration, or None.
        leaf: the last component of the layer's name.
    """
    if config is None or leaf not in _READ.get(str(config.model_type), ()):
        return None
    return "the state-space kernel reads its weight and does not call it: no branch would run"


def shared_by_rows(config: Any, leaves: Iterable[str]) -> list[str]:
    """Those of these layers (last components) that compute once for all rows of a batch.

    Args:
        config: the model's transformers configuration, or None.
        leaves: the layers that are adapted.
    """
    shared = _POSITIONS.get(str(config.model_type), frozenset()) if config else frozenset[str]()
    if shared and getattr(config, "share_att_key", False):
        shared |= {"query_proj", "key_proj"}
    return sorted(shared & set(leaves))
