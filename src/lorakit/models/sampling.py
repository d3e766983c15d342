"""Several answers to each prompt, sampled or most likely, token by token.

The prompts are read once, whatever the number of answers to each; rows whose answer has ended leave
the batch, some at a time. The numbers that decide a sample are drawn before it begins, so that an
answer does not depend on which others have ended.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from lorakit.errors import ModelError
from lorakit.models.generation import contiguous_head
from lorakit.models.label_head import evaluating

_NEEDED = ("attention_mask", "position_ids", "past_key_values")
_LAST_ONLY = "logits_to_keep"
# Rows leave the batch together, since the keys and values of all others are then copied.
_SHARE_LEAVING = 0.25


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How answers are written.

    Attributes:
        max_new_tokens: the longest answer, in tokens, its end included.
        end_ids: the tokens that end an answer.
        pad_id: any token id.
        num_samples: answers to each prompt.
        temperature: of the distribution that tokens are drawn from; 0 takes the most likely one.
    """

    max_new_tokens: int
    end_ids: tuple[int, ...]
    pad_id: int
    num_samples: int = 1
    temperature: float = 0.0


@dataclass(frozen=True, slots=True)
class Written:
    """One answer.

    Attributes:
        ids: its tokens, the one that ends it included.
        logps: log-probability of each under the distribution it was drawn from, in nats.
        finished: the model ended it; False if it was cut at the limit.
    """

    ids: list[int]
    logps: list[float]
    finished: bool


def require_sampling(model: PreTrainedModel) -> None:
    """Refuse models that answers cannot be sampled from here; works on the meta device.

    Raises:
        ModelError: it is no decoder, or does not number its tokens by `position_ids`.
    """
    known = inspect.signature(type(model).forward).parameters
    missing = [name for name in _NEEDED if name not in known]
    if model.config.is_encoder_decoder or missing:
        raise ModelError(
            "answers of this architecture cannot be sampled in training in this version",
            where=type(model).__name__,
            expected=f"a decoder whose forward takes {', '.join(_NEEDED)}",
            found="an encoder and a decoder"
            if model.config.is_encoder_decoder
            else f"no {', '.join(missing)}",
        )


def write_answers(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    generator: torch.Generator | None = None,
) -> list[list[Written]]:
    """The answers to each prompt, in eval mode and without gradient.

    Args:
        model: a decoder, see `require_sampling`; in the mode it was in afterwards.
        prompts: token ids of each, none empty.
        sampling: how.
        generator: on the CPU, for the samples; None for the global one.
    """
    with torch.no_grad(), evaluating(model), contiguous_head(model):
        found = _Batch(model, prompts, sampling, generator).write()
    # Under autocast, weights that were cast without gradient would be taken with gradient too.
    torch.clear_autocast_cache()
    num = sampling.num_samples
    return [found[start : start + num] for start in range(0, len(found), num)]


class _Growing(DynamicLayer):
    """Keys and values with room behind them: a token is written there, and nothing is copied."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self._room = room
        self._storage: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Add tokens, (rows, key heads, tokens, d); returns all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin = self.get_seq_length()
        stop = begin + key_states.shape[-2]
        found = self._storage
        if found is None or found[0].shape[2] < stop:
            found = (self._storage_for(key_states, stop), self._storage_for(value_states, stop))
            if self.keys is not None and self.values is not None and begin:
                found[0][:, :, :begin], found[1][:, :, :begin] = self.keys, self.values
            self._storage = found
        found[0][:, :, begin:stop], found[1][:, :, begin:stop] = key_states, value_states
        self.keys, self.values = found[0][:, :, :stop], found[1][:, :, :stop]
        return self.keys, self.values

    def _storage_for(self, states: Tensor, stop: int) -> Tensor:
        return states.new_empty(*states.shape[:2], stop + self._room, states.shape[3])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row so many times."""
        self._storage = None
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """These rows alone."""
        self._storage = None
        super().batch_select_indices(indices)


def _cache(model: PreTrainedModel, room: int) -> DynamicCache:
    """An empty cache whose layers without a window have room for so many tokens."""
    cache = DynamicCache(config=model.config)
    cache.layers = [_Growing(room) if type(one) is DynamicLayer else one for one in cache.layers]
    return cache


class _Batch:
    """The rows that are being written."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        generator: torch.Generator | None,
    ) -> None:
        self._model = model
        self._sampling = sampling
        num_rows = len(prompts) * sampling.num_samples
        self._num_rows = num_rows
        self._cache = _cache(model, sampling.max_new_tokens)
        self._ends = torch.tensor(sampling.end_ids, dtype=torch.long, device=model.device)
        # The row of each line of the batch, and whether its answer goes on.
        self._live = torch.arange(num_rows, device=model.device)
        self._going = torch.ones(num_rows, dtype=torch.bool, device=model.device)
        shape = (num_rows, sampling.max_new_tokens)
        # What is most likely draws nothing: a validation leaves the generators as they are.
        drawn = torch.rand(shape, generator=generator) if sampling.temperature else torch.zeros(0)
        self._drawn = drawn.to(model.device)
        self._ids = torch.full(shape, sampling.pad_id, device=model.device)
        self._logps = torch.zeros(shape, device=model.device)
        self._lengths = torch.full((num_rows,), sampling.max_new_tokens, device=model.device)
        self._finished = torch.zeros(num_rows, dtype=torch.bool, device=model.device)
        self._mask = torch.zeros(0)
        self._logits = self._read(prompts)

    def _read(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read the prompts, padded on the left; (rows, vocabulary) logits behind them."""
        device, width = self._model.device, max(map(len, prompts))
        ids = torch.full((len(prompts), width), self._sampling.pad_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(list(prompt))
            mask[row, width - len(prompt) :] = 1
        places = (mask.cumsum(1) - 1).clamp(min=0).to(device)
        self._mask = mask.to(device)
        logits = self._forward(ids.to(device), places)
        num = self._sampling.num_samples
        self._cache.batch_repeat_interleave(num)
        self._mask = self._mask.repeat_interleave(num, 0)
        return logits.repeat_interleave(num, 0)

    def write(self) -> list[Written]:
        """Until every answer has ended, or is cut."""
        last = self._sampling.max_new_tokens - 1
        for place in range(last + 1):
            chosen = self._choose(place)
            num_going = int(self._going.sum())
            if place == last or not num_going:
                break
            if num_going <= (1 - _SHARE_LEAVING) * len(self._going):
                stay = self._going.nonzero()[:, 0]
                chosen, self._live, self._mask = chosen[stay], self._live[stay], self._mask[stay]
                self._going = self._going[stay]
                self._cache.batch_select_indices(stay)
            self._mask = F.pad(self._mask, (0, 1), value=1)
            self._logits = self._forward(chosen[:, None], self._mask.sum(1, keepdim=True) - 1)
        every = zip(
            self._ids.tolist(),
            self._logps.tolist(),
            self._lengths.tolist(),
            self._finished.tolist(),
            strict=True,
        )
        return [Written(ids[:n], logps[:n], finished) for ids, logps, n, finished in every]

    def _choose(self, place: int) -> Tensor:
        """The next token of every line; kept where its answer goes on."""
        logps = self._logits.float()
        temperature = self._sampling.temperature
        logps = (logps / temperature if temperature else logps).log_softmax(-1)
        if temperature:
            # The first token at which the cumulative probability is beyond a uniform number.
            beyond = logps.exp().cumsum(-1)
            wanted = self._drawn[self._live, place][:, None] * beyond[:, -1:]
            chosen = torch.searchsorted(beyond, wanted, right=True)[:, 0]
            chosen = chosen.clamp(max=logps.shape[-1] - 1)
        else:
            chosen = logps.argmax(-1)
        self._ids[self._live, place] = chosen
        self._logps[self._live, place] = logps.gather(1, chosen[:, None])[:, 0]
        ended = self._going & torch.isin(chosen, self._ends)
        self._lengths[self._live[ended]] = place + 1
        self._finished[self._live[ended]] = True
        self._going &= ~ended
        return chosen

    def _forward(self, ids: Tensor, places: Tensor) -> Tensor:
        """(rows, vocabulary) logits behind the last token of every row."""
        short = _LAST_ONLY in inspect.signature(type(self._model).forward).parameters
        found = self._model(
            input_ids=ids,
            attention_mask=self._mask,
            position_ids=places,
            past_key_values=self._cache,
            use_cache=True,
            **({_LAST_ONLY: 1} if short else {}),
        )
        return found.logits[:, -1]
