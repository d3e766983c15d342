"""What other engines take, and what they would get wrong in silence."""

from __future__ import annotations

from dataclasses import dataclass

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.parameters import stacked_parameters
from lorakit.errors import AdapterFileError

# vllm/config/lora.py, MaxLoRARanks.
VLLM_MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineRules:
    """What an engine loads.

    Attributes:
        name: of the engine.
        max_rank: the highest rank; None for any.
        kinds: layer kinds whose updates it applies.
        uniform: it computes one rank and one scaling for all modules, so they must be equal.
        trained_beside: it loads biases and whole modules that were trained beside.
        dora: layer kinds whose DoRA it computes.
    """

    name: str
    max_rank: int | None
    kinds: frozenset[str]
    uniform: bool
    trained_beside: bool
    dora: frozenset[str]


VLLM = EngineRules(
    name="vLLM",
    max_rank=VLLM_MAX_RANKS[-1],
    kinds=frozenset({"linear"}),
    uniform=True,
    trained_beside=False,
    dora=frozenset(),
)
LLAMA_CPP = EngineRules(
    name="llama.cpp",
    max_rank=None,
    kinds=frozenset({"linear", "embedding"}),
    uniform=False,
    trained_beside=False,
    dora=frozenset(),
)
MLX = EngineRules(
    name="mlx-lm",
    max_rank=None,
    kinds=frozenset({"linear", "conv1d", "embedding"}),
    uniform=True,
    trained_beside=False,
    # It measures an embedding's DoRA per token, PEFT per dimension.
    dora=frozenset({"linear", "conv1d"}),
)
PEFT = EngineRules(
    name="PEFT",
    max_rank=None,
    kinds=frozenset({"linear", "conv1d", "embedding", "conv2d"}),
    uniform=False,
    trained_beside=True,
    dora=frozenset({"linear", "conv1d", "embedding", "conv2d"}),
)


def check(adapter: Adapter, rules: EngineRules) -> list[str]:
    """Check an adapter against an engine's rules.

    Args:
        adapter: as it is on disk.
        rules: of the engine.

    Returns:
        What was checked, one line each.

    Raises:
        AdapterFileError: what the engine cannot load or would compute otherwise, all of it at once.
    """
    wrong = list(_problems(adapter, rules))
    if wrong:
        merge = "lorakit merge writes base and adapter as one model, which every engine loads"
        raise AdapterFileError(
            f"{rules.name} cannot serve this adapter",
            found="\n".join(wrong),
            remedy=f"{merge}; lorakit serve serves it as it is",
        )
    limit = "any rank" if rules.max_rank is None else f"rank {_rank(adapter)} <= {rules.max_rank}"
    checked = [f"{len(adapter.modules())} modules of kinds that it adapts", limit]
    if not rules.dora:
        checked.append("LoRA, not DoRA")
    if not rules.trained_beside:
        checked.append("no bias and no module trained beside")
    return checked


def _problems(adapter: Adapter, rules: EngineRules) -> list[str]:
    found: list[str] = []
    if adapter.spec.update == "dora":
        kinds = {factors.kind for factors in adapter.factors.values()} & rules.kinds
        if not rules.dora:
            found.append("DoRA: its magnitudes are not low-rank")
        elif kinds - rules.dora:
            found.append(f"DoRA of {', '.join(sorted(kinds - rules.dora))}, which it does not do")
    if stacked_parameters(adapter) and not rules.trained_beside:
        found.append(f"expert weights: {', '.join(list(stacked_parameters(adapter))[:3])}")
    beside = sorted({*adapter.biases, *adapter.overrides, *adapter.tokens})
    if beside and not rules.trained_beside:
        shown = ", ".join(beside[:3]) + (f" and {len(beside) - 3} more" if len(beside) > 3 else "")
        found.append(f"trained beside (modules_to_save, bias, tokens): {shown}")
    strange = sorted(
        {factors.kind for factors in adapter.factors.values() if factors.kind not in rules.kinds}
    )
    if strange:
        found.append(f"updates of layers it does not adapt: {', '.join(strange)}")
    if rules.max_rank is not None and _rank(adapter) > rules.max_rank:
        found.append(f"rank {_rank(adapter)}, more than {rules.max_rank}")
    return found


def _rank(adapter: Adapter) -> int:
    """The highest rank of a module, parts of a fused projection added up."""
    return max(
        (sum(part.r for part in parts.values()) for parts in adapter.modules().values()), default=0
    )


def vllm_max_rank(r: int) -> int:
    """The smallest --max-lora-rank that vLLM accepts for this rank."""
    return next(step for step in VLLM_MAX_RANKS if step >= r)
