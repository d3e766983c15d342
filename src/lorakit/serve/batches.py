"""The two ways to run rows together: continuous batches, and static ones where those do not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Protocol

from transformers import PreTrainedModel

from lorakit.errors import LorakitError
from lorakit.layers.routing import GroupedRows, TokenRouting
from lorakit.serve.bank import AdapterRows, Bank
from lorakit.serve.kv_cache import PromptCache, RowCache, bucket_size
from lorakit.serve.layer import ServedModel
from lorakit.serve.packed import PackedStep, Piece, packed_logits, packed_mode
from lorakit.serve.row import Row
from lorakit.serve.sampler import Chosen, choose

# Prompt tokens per step when nobody waits for the next token.
_IDLE_CHUNK = 512

Deliver = Callable[[Row, "Chosen | LorakitError"], None]


class Batch(Protocol):
    """Rows that run together; used by the engine's thread alone."""

    def rows(self) -> list[Row]:
        """Every row in it."""
        ...

    def has_place(self) -> bool:
        """Whether one more row can join now."""
        ...

    def add(self, row: Row) -> None:
        """Take a row in."""
        ...

    def drop(self, row: Row) -> None:
        """Let a row go, whatever it was doing."""
        ...

    def step(self, deliver: Deliver) -> None:
        """Go on: every token that is chosen is handed to `deliver`, which may drop rows."""
        ...

    def mode(self) -> AbstractContextManager[None]:
        """What the model needs around the steps."""
        ...


class PackedBatch:
    """Continuous batches: rows join and leave at every step, prompts are read in pieces.

    Args:
        served: the model.
        max_rows: rows at a time.
        chunk: prompt tokens per step while others are being answered.
    """

    def __init__(
        self, served: ServedModel, model: PreTrainedModel, *, max_rows: int, chunk: int
    ) -> None:
        self._served, self._model = served, model
        self._max_rows, self._chunk = max_rows, chunk
        self._cache, self._bank = RowCache(), Bank()
        self._reading: dict[str, tuple[Row, PromptCache]] = {}
        self._answering: dict[str, Row] = {}
        self._routing: TokenRouting | None = None

    def rows(self) -> list[Row]:
        """Every row in it."""
        return [*self._answering.values(), *(row for row, _ in self._reading.values())]

    def has_place(self) -> bool:
        """Whether one more row can join now."""
        return len(self._answering) + len(self._reading) < self._max_rows

    def add(self, row: Row) -> None:
        """Take a row in; its prompt is read from the next step on."""
        if row.served is not None:
            self._served.wrap(row.served.sites)
        self._reading[row.id] = (row, PromptCache(bucket_size(len(row.prompt) + 1)))

    def drop(self, row: Row) -> None:
        """Let a row go."""
        self._reading.pop(row.id, None)
        if self._answering.pop(row.id, None) is not None:
            self._cache.remove(row.id)
            self._routing = None
        if not self._answering:
            self._bank.clear()
            # A pass that failed may have left a bucket half grown.
            self._cache.clear()

    def mode(self) -> AbstractContextManager[None]:
        """The model's attention is ours inside."""
        return packed_mode(self._model)

    def step(self, deliver: Deliver) -> None:
        """One forward pass: a token for every row that is answered, and a piece of the prompts."""
        self._cache.make_room()
        if self._routing is None:
            rows = [(row.id, row.served) for row in self._answering.values()]
            self._routing = self._bank.arrange(rows)
        routing = self._routing
        pieces = self._pieces()
        step = PackedStep(
            self._cache, routing.order, [piece for _, piece in pieces], self._model.device
        )
        num_rows = len(routing.order)
        body, head, wanted, read = self._route(routing, pieces)
        last = [self._answering[row].generated[-1] for row in routing.order]
        with self._served.routed(body, head):
            logits = packed_logits(self._model, step, last, wanted)
        for row in read:
            # Memory may run out here: until its keys are moved the row is one that reads.
            self._cache.insert(row.id, self._reading[row.id][1])
            self._answering[row.id] = row
            del self._reading[row.id]
            self._routing = None
        rows = [*(self._answering[name] for name in routing.order), *read]
        if rows:
            chosen = choose(logits[: num_rows + len(read)], [row.sampler for row in rows])
            for row, choice in zip(rows, chosen, strict=True):
                deliver(row, choice)

    def _pieces(self) -> list[tuple[Row, Piece]]:
        """What is read of the prompts in this step, the longest waiting first."""
        budget = self._chunk if self._answering else max(self._chunk, _IDLE_CHUNK)
        pieces: list[tuple[Row, Piece]] = []
        for row, cache in self._reading.values():
            if budget <= 0:
                break
            ids = row.prompt[cache.length : cache.length + budget]
            pieces.append((row, Piece(ids, cache)))
            budget -= len(ids)
        return pieces

    def _route(
        self, routing: TokenRouting, pieces: Iterable[tuple[Row, Piece]]
    ) -> tuple[TokenRouting, TokenRouting, list[int], list[Row]]:
        """The routing of all entries and of the head's, whose logits are wanted, and whose rows.

        The head is asked for every row's token and for the last token of each prompt that is read
        to its end. If that is nothing at all, it is asked for one entry that nobody looks at.
        """
        start = len(routing.order)
        wanted, read = list(range(start)), list[Row]()
        body: list[GroupedRows] = []
        head: list[GroupedRows] = []
        for row, piece in pieces:
            stop = start + len(piece.ids)
            ends = piece.cache.length + len(piece.ids) == len(row.prompt)
            if row.served is not None:
                adapter = AdapterRows(row.served)
                body.append(GroupedRows(start, stop, adapter))
                if ends:
                    head.append(GroupedRows(len(wanted), len(wanted) + 1, adapter))
            if ends:
                wanted.append(stop - 1)
                read.append(row)
            start = stop
        wanted = wanted or [0]
        return (
            TokenRouting(routing.order, routing.groups, tuple(body), start),
            TokenRouting(routing.order, routing.groups, tuple(head), len(wanted)),
            wanted,
            read,
        )
