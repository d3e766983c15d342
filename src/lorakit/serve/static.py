"""Static batches: a set of rows runs to its end before the next begins.

For architectures whose memory of a row is not keys and values at its own positions (state space
models, encoder-decoders, ALiBi): transformers' own generation keeps it, and our tokens are put in
its way.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel, StoppingCriteria

from lorakit.models.generation import contiguous_head, own_settings_aside
from lorakit.serve.bank import Bank
from lorakit.serve.batches import Deliver
from lorakit.serve.layer import ServedModel
from lorakit.serve.padded import generate_padded
from lorakit.serve.row import Row
from lorakit.serve.sampler import choose


class StaticBatch:
    """Rows that start and end together.

    Args:
        served: the model, with its wrapped layers.
        model: the same model.
        max_rows: rows at a time.
        pad_id: any token; it is masked.
        poll: called before every token: rows may be cancelled there.
    """

    def __init__(
        self,
        served: ServedModel,
        model: PreTrainedModel,
        *,
        max_rows: int,
        pad_id: int,
        poll: Callable[[], None],
    ) -> None:
        self._served, self._model = served, model
        self._max_rows, self._pad_id, self._poll = max_rows, pad_id, poll
        self._bank = Bank()
        self._live: dict[str, Row] = {}
        self._under_way = False

    def rows(self) -> list[Row]:
        """Every row in it."""
        return list(self._live.values())

    def has_place(self) -> bool:
        """Whether one more row can join: not while a batch is under way."""
        return not self._under_way and len(self._live) < self._max_rows

    def add(self, row: Row) -> None:
        """Take a row in, before the batch starts."""
        if row.served is not None:
            self._served.wrap(row.served.sites)
        self._live[row.id] = row

    def drop(self, row: Row) -> None:
        """Let a row go; what is computed for it from now on nobody sees."""
        self._live.pop(row.id, None)

    def mode(self) -> AbstractContextManager[None]:
        """The model's own settings for generation are kept out."""
        return own_settings_aside(self._model) if self._model.can_generate() else nullcontext()

    def step(self, deliver: Deliver) -> None:
        """Answer all rows to their end."""
        routing = self._bank.arrange([(row.id, row.served) for row in self._live.values()])
        rows = [self._live[name] for name in routing.order]
        follower = _Follower(rows, self._live, deliver, self._poll)
        self._under_way = True
        try:
            with self._served.routed(routing, routing), contiguous_head(self._model):
                generate_padded(
                    self._model,
                    [row.prompt for row in rows],
                    pad_id=self._pad_id,
                    max_new_tokens=max(row.limit for row in rows),
                    follower=follower,
                    ends=_AllDone(rows, self._live),
                )
        finally:
            self._under_way = False
            self._bank.clear()


class _Follower(LogitsProcessor):
    """Chooses every row's token itself, and leaves generation no other."""

    def __init__(
        self, rows: list[Row], live: dict[str, Row], deliver: Deliver, poll: Callable[[], None]
    ) -> None:
        self._rows, self._live, self._deliver, self._poll = rows, live, deliver, poll

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._poll()
        places = [i for i, row in enumerate(self._rows) if row.id in self._live]
        forced = torch.full_like(scores, float("-inf"))
        forced[:, 0] = 0.0
        chosen = choose(scores[places], [self._rows[i].sampler for i in places])
        for i, choice in zip(places, chosen, strict=True):
            row = self._rows[i]
            self._deliver(row, choice)
            if row.generated:
                forced[i, 0] = float("-inf")
                forced[i, row.generated[-1]] = 0.0
        return forced


class _AllDone(StoppingCriteria):
    """Per row: whether it is finished."""

    def __init__(self, rows: list[Row], live: dict[str, Row]) -> None:
        self._rows, self._live = rows, live

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_ids: Tensor, scores: object, **_: object
    ) -> Tensor:
        done = [row.id not in self._live for row in self._rows]
        return torch.tensor(done, device=input_ids.device)
