"""Where q, k, v, gate and up lie inside fused projections: facts about architectures.

Each layout was read from the forward pass of the architecture in transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lorakit.layers.rows import Rows

Parts = dict[str, Rows]


def fused_parts(config: Any, leaf: str, num_rows: int) -> Parts:
    """The parts of a fused projection.

    Args:
        config: the model's transformers configuration, or None.
        leaf: the last component of the module's name, such as "c_attn".
        num_rows: the size of the projection's output.

    Returns:
        part name -> its rows; empty when the module is not fused or its layout is not known.
    """
    if config is None:
        return {}
    if leaf == "gate_up_proj":
        return _contiguous({"gate": num_rows // 2, "up": num_rows // 2}, num_rows)
    if leaf == "kv_b_proj":
        return _latent(config, num_rows)
    layout = _LAYOUTS.get((str(config.model_type), leaf))
    return layout(config, num_rows) if layout else {}


def _contiguous(sizes: dict[str, int], num_rows: int) -> Parts:
    if sum(sizes.values()) != num_rows:
        return {}
    parts: Parts = {}
    start = 0
    for name, size in sizes.items():
        parts[name] = Rows(start=start, length=size, step=num_rows)
        start += size
    return parts


def _interleaved(per_block: dict[str, int], count: int, num_rows: int) -> Parts:
    """`count` repetitions of one block that holds some rows of each part."""
    step = sum(per_block.values())
    if step * count != num_rows:
        return {}
    parts: Parts = {}
    start = 0
    for name, length in per_block.items():
        parts[name] = Rows(start=start, length=length, step=step, count=count)
        start += length
    return parts


def _head_dim(config: Any) -> int:
    explicit = getattr(config, "head_dim", None)
    return int(explicit or config.hidden_size // config.num_attention_heads)


def _thirds(config: Any, num_rows: int) -> Parts:
    """q, k, v one after the other, equally wide (GPT-2, MPT, ModernBERT)."""
    third = num_rows // 3
    return _contiguous({"q": third, "k": third, "v": third}, num_rows)


def _gpt2(config: Any, num_rows: int) -> Parts:
    """q, k, v; in a cross-attention layer the same name holds k and v only."""
    width = int(config.hidden_size)
    if num_rows == 2 * width:
        return _contiguous({"k": width, "v": width}, num_rows)
    return _thirds(config, num_rows)


def _by_heads(config: Any, num_rows: int) -> Parts:
    """All query heads, then the key heads, then the value heads (Phi-3)."""
    head = _head_dim(config)
    key_value = int(config.num_key_value_heads) * head
    query = int(config.num_attention_heads) * head
    return _contiguous({"q": query, "k": key_value, "v": key_value}, num_rows)


def _per_head(config: Any, num_rows: int) -> Parts:
    """Every head holds its own q, k and v (BLOOM, DeBERTa, GPT-NeoX, Persimmon)."""
    count = int(config.num_attention_heads)
    head = num_rows // (3 * count)
    return _interleaved({"q": head, "k": head, "v": head}, count, num_rows)


def _latent(config: Any, num_rows: int) -> Parts:
    """Per head, the part of its key without positions and its value (DeepSeek-V2 and its like)."""
    key, value = (getattr(config, name, None) for name in ("qk_nope_head_dim", "v_head_dim"))
    if key is None or value is None:
        return {}
    sizes = {"k": int(key), "v": int(value)}
    return _interleaved(sizes, int(config.num_attention_heads), num_rows)


def _falcon(config: Any, num_rows: int) -> Parts:
    head = _head_dim(config)
    num_heads = int(config.num_attention_heads)
    if config.new_decoder_architecture:
        groups = int(config.num_kv_heads)
        block = {"q": num_heads // groups * head, "k": head, "v": head}
        return _interleaved(block, groups, num_rows)
    if config.multi_query:
        return _contiguous({"q": num_heads * head, "k": head, "v": head}, num_rows)
    return _per_head(config, num_rows)


def _gpt_bigcode(config: Any, num_rows: int) -> Parts:
    if config.multi_query:
        head = _head_dim(config)
        return _contiguous({"q": int(config.hidden_size), "k": head, "v": head}, num_rows)
    return _per_head(config, num_rows)


def _codegen(config: Any, num_rows: int) -> Parts:
    """Four blocks, one per core of the machine it was trained on, of q, v and k in this order."""
    share = num_rows // 12
    return _interleaved({"q": share, "v": share, "k": share}, 4, num_rows)


_LAYOUTS: dict[tuple[str, str], Callable[[Any, int], Parts]] = {
    ("bloom", "query_key_value"): _per_head,
    ("codegen", "qkv_proj"): _codegen,
    ("deberta", "in_proj"): _per_head,
    ("decision_transformer", "c_attn"): _gpt2,
    ("falcon", "query_key_value"): _falcon,
    ("gpt2", "c_attn"): _gpt2,
    ("gpt_bigcode", "c_attn"): _gpt_bigcode,
    ("gpt_neox", "query_key_value"): _per_head,
    ("gpt_neox_japanese", "query_key_value"): _per_head,
    ("imagegpt", "c_attn"): _gpt2,
    ("modernbert", "Wqkv"): _thirds,
    ("mpt", "Wqkv"): _thirds,
    ("openai-gpt", "c_attn"): _thirds,
    ("persimmon", "query_key_value"): _per_head,
    ("phi3", "qkv_proj"): _by_heads,
    ("phi4_multimodal", "qkv_proj"): _by_heads,
}
