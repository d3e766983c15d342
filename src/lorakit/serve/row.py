"""One request on its way through the engine."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

from transformers import PreTrainedTokenizerBase

from lorakit.errors import LorakitError
from lorakit.serve.kv_cache import bucket_size
from lorakit.serve.pool import Wanted
from lorakit.serve.request import (
    FinishedEvent,
    FinishReason,
    GenerateRequest,
    OnEvent,
    Timings,
    TokenEvent,
    TokenLogprob,
    TopToken,
    adapter_label,
)
from lorakit.serve.sampler import Chosen, RowSampler
from lorakit.serve.served import ServedAdapter
from lorakit.serve.text import TextStream, token_bytes, token_text

_log = logging.getLogger("lorakit.serve")


@dataclass(eq=False)
class Row:
    """A request and how far it has come; owned by the engine's thread once it is submitted.

    Args:
        request: what was asked.
        wanted: what its adapter's name meant then; None for the base.
        on_event: where its events go.
        sampler: its choice of tokens.
        tokenizer: the model's.
        limit: the most tokens it may generate: its own, or what the context leaves.

    Attributes:
        state: where it is.
        served: its adapter, held while it runs.
        generated: its tokens so far.
        listening: whether events can still be delivered.
    """

    request: GenerateRequest
    wanted: Wanted | None
    on_event: OnEvent
    sampler: RowSampler
    tokenizer: PreTrainedTokenizerBase
    limit: int
    state: Literal["waiting", "running", "finished"] = "waiting"
    served: ServedAdapter | None = None
    generated: list[int] = field(default_factory=list[int])
    listening: bool = True

    def __post_init__(self) -> None:
        self.id = self.request.id
        self.label = adapter_label(self.request.adapter)
        self.prompt = self.request.prompt_ids
        behind = self.prompt if self.request.continues else ()
        self._text = TextStream(self.tokenizer, self.request.sampling.stop, behind=behind)
        self._pending: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._submitted = time.monotonic()
        self._started: float | None = None
        self._first: float | None = None

    @property
    def reserved_tokens(self) -> int:
        """Places in the cache that the whole answer may need."""
        return bucket_size(len(self.prompt) + self.limit)

    def start(self, served: ServedAdapter | None) -> None:
        """The row joins the batch."""
        self.state, self.served = "running", served
        self._started = time.monotonic()

    def accept(self, chosen: Chosen, ends: Collection[int]) -> FinishReason | None:
        """Take the next token, and say so; the reason if the answer ends with it."""
        if self._first is None:
            self._first = time.monotonic()
        options = self.request.sampling
        self.generated.append(chosen.token)
        ended = chosen.token in ends and not options.ignore_eos
        if ended or chosen.token in options.stop_token_ids:
            self._emit(self._text.finish())
            return "stop"
        self._pending.append(chosen.token)
        if chosen.logprob is not None:
            self._logprobs.append(self._described(chosen, chosen.logprob))
        text = self._text.push(chosen.token)
        if self._text.stopped_by is not None:
            self._emit(text)
            return "stop"
        if len(self.generated) >= self.limit:
            text += self._text.finish()
            self._emit(text)
            return "length" if self._text.stopped_by is None else "stop"
        if text:
            self._emit(text)
        return None

    def finish(self, reason: FinishReason, error: LorakitError | None = None) -> None:
        """Send the last event."""
        self.state = "finished"
        now = time.monotonic()
        started = now if self._started is None else self._started
        self._send(
            FinishedEvent(
                reason=reason,
                num_prompt_tokens=len(self.prompt),
                num_generated_tokens=len(self.generated),
                error=error,
                timings=Timings(
                    queue_s=started - self._submitted,
                    first_token_s=None if self._first is None else self._first - self._submitted,
                    total_s=now - self._submitted,
                ),
                stop_text=self._text.stopped_by,
            )
        )
        self.listening = False

    def _emit(self, text: str) -> None:
        if text or self._pending:
            self._send(TokenEvent(text, tuple(self._pending), tuple(self._logprobs)))
        self._pending, self._logprobs = [], []

    def _send(self, event: TokenEvent | FinishedEvent) -> None:
        if not self.listening:
            return
        try:
            self.on_event(event)
        except Exception:
            # Its listener's trouble is not the other rows': the engine cancels it.
            self.listening = False
            _log.exception("the listener of request %s failed", self.id)

    def _described(self, chosen: Chosen, logprob: float) -> TokenLogprob:
        def described(token: int, value: float) -> TopToken:
            text = token_text(self.tokenizer, token)
            return TopToken(token, text, value, token_bytes(self.tokenizer, token, text))

        top = tuple(described(token, value) for token, value in chosen.top)
        own = described(chosen.token, logprob)
        return TokenLogprob(own.token_id, own.text, logprob, own.raw, top)
