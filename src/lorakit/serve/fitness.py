"""Whether a model can be run in packed continuous batches: declared, then tried."""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from lorakit.models.generation import own_settings_aside
from lorakit.serve.kv_cache import PromptCache, RowCache, bucket_size
from lorakit.serve.packed import PackedStep, Piece, packed_logits, packed_mode
from lorakit.serve.padded import generate_padded

_log = logging.getLogger("lorakit.serve")
_LAYERS = frozenset({"full_attention", "sliding_attention"})
# Their angles depend on the longest row of the batch, so rows must not share one.
_LENGTH_DEPENDENT = frozenset({"dynamic", "longrope"})
# Of the spread of the logits: a wrong position or a missing key is off by the spread itself.
_TOLERANCE = {torch.float32: 0.01, torch.float64: 0.01}
_HALF_TOLERANCE = 0.25


@dataclass(frozen=True, slots=True)
class Fitness:
    """How a model is run.

    Attributes:
        static_reason: why in static batches, or None for continuous ones.
        alone: every request runs by itself, because a row's result depends on the others' length.
    """

    static_reason: str | None
    alone: bool = False


def fitness_of(model: PreTrainedModel) -> Fitness:
    """Look at the architecture, and try two prompts in packed steps against the model itself.

    Where static batches are left, two prompts in one are tried against each by itself. Takes a few
    forward passes of short prompts; changes nothing.
    """
    config = model.config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {rope.get("rope_type")} if "rope_type" in rope else set[object]()
    kinds |= {v.get("rope_type") for v in rope.values() if isinstance(v, dict)}
    if kinds & _LENGTH_DEPENDENT:
        return Fitness("its positions depend on the longest row of a batch", alone=True)
    reason = _declared_reason(model)
    reason = reason if reason is not None else _tried_reason(model)
    if reason is not None and _padding_is_seen(model):
        return Fitness(f"{reason}; padding changes its answers", alone=True)
    return Fitness(reason)


def _declared_reason(model: PreTrainedModel) -> str | None:
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        return "it is an encoder-decoder"
    if not getattr(model, "_supports_attention_backend", False):
        return "its attention, or what it has instead, is its own"
    if getattr(model, "_is_stateful", False):
        return "it carries a state from token to token"
    odd = set(getattr(config, "layer_types", None) or ()) - _LAYERS
    if odd:
        return f"it has layers of the kind {', '.join(sorted(odd))}"
    takes = inspect.signature(model.forward).parameters
    lacking = [name for name in ("position_ids", "logits_to_keep") if name not in takes]
    if lacking:
        return f"its forward does not take {', '.join(lacking)}"
    return None


def _tried_reason(model: PreTrainedModel) -> str | None:
    """Two rows in packed steps, one token after the other, against the model's own forward."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(0)
    first, second = (
        torch.randint(vocabulary, (length,), generator=generator).tolist() for length in (11, 7)
    )
    with torch.inference_mode():
        expected = [_own_logits(model, ids) for ids in (first, second)]
        try:
            with packed_mode(model):
                found = _packed(model, first, second)
        except Exception as error:
            line = str(error).splitlines()[0] if str(error) else ""
            return f"a packed batch does not run: {type(error).__name__}: {line}"
    wanted = torch.stack([expected[0][-2], expected[1][-2], expected[0][-1], expected[1][-1]])
    off = float((found - wanted).abs().max() / wanted.std())
    tolerance = _TOLERANCE.get(model.dtype, _HALF_TOLERANCE)
    if not off <= tolerance:
        return f"a packed batch gives other logits: off by {off:.2g} of their spread"
    return None


def _padding_is_seen(model: PreTrainedModel) -> bool:
    """Whether a prompt in a padded batch gives another first or second token than by itself.

    A decoder that counts positions from the left edge does, and a state that padding runs through.
    """
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(0)
    long, short = (
        torch.randint(vocabulary, (length,), generator=generator).tolist() for length in (9, 4)
    )
    try:
        with torch.inference_mode(), own_settings_aside(model):
            expected = [_first_logits(model, [ids]) for ids in (long, short)]
            found = _first_logits(model, [long, short])
    except Exception:
        # It does not run so, or not at all: its requests will say why, and to each its own.
        _log.exception("%s could not be tried in a padded batch", type(model).__name__)
        return True
    tolerance = _TOLERANCE.get(model.dtype, _HALF_TOLERANCE)
    return any(_apart(found[:, i], alone[:, 0], tolerance) for i, alone in enumerate(expected))


def _apart(found: Tensor, alone: Tensor, tolerance: float) -> bool:
    """Whether logits differ by more than a share of their spread; forced ones are infinite."""
    off = torch.where(found == alone, 0.0, found - alone).abs().max()
    return not float(off / alone[alone.isfinite()].std()) <= tolerance


def _first_logits(model: PreTrainedModel, prompts: list[list[int]]) -> Tensor:
    """(2, rows, vocabulary): the logits of the first two tokens; token 0 is taken as the first."""
    seen = _Seen()
    generate_padded(model, prompts, pad_id=0, max_new_tokens=2, follower=seen)
    return torch.stack(seen.logits)


class _Seen(LogitsProcessor):
    """Keeps the logits, and leaves generation token 0."""

    def __init__(self) -> None:
        self.logits: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.logits.append(scores.float().clone())
        forced = torch.full_like(scores, float("-inf"))
        forced[:, 0] = 0.0
        return forced


def _own_logits(model: PreTrainedModel, ids: list[int]) -> Tensor:
    tokens = torch.tensor(ids, device=model.device)[None]
    return model(input_ids=tokens, use_cache=False).logits[0].float()


def _packed(model: PreTrainedModel, first: list[int], second: list[int]) -> Tensor:
    """The last two logits of both rows: prompts in pieces, then one token each."""
    cache = RowCache()
    caches = [PromptCache(bucket_size(len(ids))) for ids in (first, second)]
    one, two = (
        PackedStep(
            cache,
            (),
            [Piece(ids[part], c) for ids, c in zip((first, second), caches, strict=True)],
            model.device,
        )
        for part in (slice(0, 5), slice(5, -1))
    )
    packed_logits(model, one, [], [0])
    start = len(first) - 6
    before = packed_logits(model, two, [], [start - 1, start + len(second) - 7])
    for name, prompt in zip(("second", "first"), reversed(caches), strict=True):
        cache.insert(name, prompt)
    step = PackedStep(cache, ("first", "second"), [], model.device)
    after = packed_logits(model, step, [first[-1], second[-1]], [0, 1])
    return torch.cat([before, after]).float()
