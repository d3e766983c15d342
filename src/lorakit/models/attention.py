"""An attention for training on a CPU, registered with transformers as "grouped".

Eager attention repeats keys and values for every query head, and takes the scores to float32 and
back around the softmax; the fused kernel (sdpa) recomputes the scores in its backward pass, which
a CPU pays for. Here the query heads that share a key are stacked into one product per key head, and
the softmax reads and writes the activations' dtype (torch computes it in float32 inside). Same
mathematics, fewer passes over the scores (benchmarks/train_means.py).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from lorakit.errors import ModelError
from lorakit.layers.packed import Packing, packed_attention

GROUPED = "grouped"


def use_attention(model: PreTrainedModel, name: str) -> None:
    """Choose the model's attention kernel; mutates `model`.

    Args:
        model: a transformers model.
        name: eager, sdpa, flash_attention_2, or grouped (this module's).

    Raises:
        ModelError: the model does not have this kernel, or its package is missing.
    """
    found = ""
    try:
        model.set_attn_implementation(name)
    except (ValueError, ImportError) as error:
        found = str(error).splitlines()[0]
    # Some architectures keep what they have and only log it.
    if found or model.config._attn_implementation != name:
        raise ModelError(
            f"{type(model).__name__} cannot run with attention {name}",
            where="model.attention",
            expected=name,
            found=found or f"{model.config._attn_implementation}, which it keeps",
            remedy="take eager, or leave it out for transformers' choice",
        )


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    packing: Packing | None = None,
    **_unused: object,  # transformers passes what other kernels need: sliding_window, is_causal
) -> tuple[Tensor, None]:
    """softmax(s q k^T + mask) v, in the layout of transformers' attention interface.

    Args:
        module: the attention layer.
        query: (batch, heads, queries, width).
        key: (batch, key heads, keys, width); heads is a multiple of key heads.
        value: (batch, key heads, keys, value width).
        attention_mask: (batch or 1, heads or 1, queries, keys), added to the scores; or None.
        scaling: s; 1/sqrt(width) when not given.
        dropout: probability on the attention weights, in training.
        softcap: scores become softcap * tanh(scores / softcap).
        s_aux: attention sinks; refused.
        position_bias: added to the scores; refused.
        packing: the batch is a packed one (`lorakit.layers.packed`): one row, no mask.

    Returns:
        (batch, queries, heads, value width), and no attention weights.

    Raises:
        ModelError: the model needs what this attention does not have.
    """
    if s_aux is not None or position_bias is not None:
        raise ModelError(
            "this model's attention has sinks or a position bias",
            where=type(module).__name__,
            expected="an attention that knows them",
            found=f"attention {GROUPED}",
            remedy="set model.attention to eager, or leave it out",
        )
    if packing is not None:
        q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        mixed = packed_attention(q, k, v, packing, scale=scale, softcap=softcap, dropout=dropout)
        return mixed[None], None
    batch, heads, queries, width = query.shape
    groups, keys = key.shape[1], key.shape[2]
    stacked = (batch, groups, heads // groups * queries)
    scale = width**-0.5 if scaling is None else scaling
    scores = (query * scale).reshape(*stacked, width) @ key.transpose(-1, -2)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        # Under autocast the mask is wider than the scores, and its lowest value would overflow.
        attention_mask = attention_mask.clamp(min=torch.finfo(scores.dtype).min).to(scores.dtype)
        per_head = scores.view(batch, groups, heads // groups, queries, keys)
        if attention_mask.shape[1] == 1:
            per_head += attention_mask[:, :, None, :, :keys]
        else:
            shape = (attention_mask.shape[0], groups, heads // groups, queries, -1)
            per_head += attention_mask.reshape(shape)[..., :keys]
    weights = F.dropout(scores.softmax(-1), dropout, training=dropout > 0)
    mixed = (weights @ value).view(batch, heads, queries, value.shape[-1])
    return mixed.transpose(1, 2).contiguous(), None


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, eager_mask)
