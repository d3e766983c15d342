"""The engine: one thread owns the model; requests come by a queue, tokens go by callbacks."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from threading import Condition, Event, Thread

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorakit.data.endings import end_of_sequence_ids
from lorakit.errors import (
    LorakitError,
    ModelError,
    QueueFullError,
    RequestError,
    ServeError,
    StateError,
)
from lorakit.models.generation import context_length
from lorakit.serve.batches import Batch, PackedBatch
from lorakit.serve.constrain import Constrainer
from lorakit.serve.fitness import fitness_of
from lorakit.serve.layer import ServedModel
from lorakit.serve.pool import AdapterPool
from lorakit.serve.probe import layers_out_of_order
from lorakit.serve.request import (
    EngineOptions,
    EngineStats,
    FinishReason,
    GenerateRequest,
    OnEvent,
)
from lorakit.serve.row import Row
from lorakit.serve.sampler import Chosen, RowSampler
from lorakit.serve.scheduler import FairQueue, Outcome
from lorakit.serve.static import StaticBatch

_log = logging.getLogger("lorakit.serve")
_CHUNK_CPU, _CHUNK_GPU = 64, 512
_RATE_WINDOW_S = 10.0


class Engine:
    """Continuous batches over one base, each row with its own adapter.

    Args:
        model: a base as `load_model` gives it, nothing attached; the engine's own until `stop`.
        tokenizer: its tokenizer.
        options: the limits.

    Attributes:
        pool: the adapters.
        options: the limits.
        static_reason: why this architecture runs in static batches, or None.
        context: the most tokens of prompt and answer, or None where positions have no end.
        failure: the defect that ended the engine's thread, or None while it is well.

    Raises:
        ModelError: the model does not generate.
        StateError: something is attached to the model.
        RequestError: `adapters_dir` is not a directory.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        options: EngineOptions | None = None,
    ) -> None:
        if not model.can_generate():
            raise ModelError(
                "this model cannot write answers",
                where=type(model).__name__,
                expected="a causal or sequence-to-sequence language model",
            )
        self.options = options = options or EngineOptions()
        self._model, self._tokenizer = model.eval(), tokenizer
        self._served = ServedModel(model)
        self._ends = frozenset(end_of_sequence_ids(model, tokenizer))
        self.context = context_length(model)
        fitness = fitness_of(model)
        self.static_reason = fitness.static_reason
        width = model.config.get_text_config(decoder=True).vocab_size
        self._constrainer = Constrainer(tokenizer, width, sorted(self._ends))
        self._news = Event()
        self.pool = AdapterPool(
            model,
            model.device,
            options,
            on_ready=self._news.set,
            closed=layers_out_of_order(model),
        )
        if options.prepack:
            self._served.prepack()
        self._batch = self._new_batch(1 if fitness.alone else options.max_batch)
        self._queue = FairQueue()
        self._lock = Condition()  # guards what follows; notified when a row ends
        self._rows: dict[str, Row] = {}
        self._arrived: deque[Row] = deque()
        self._cancelled: set[str] = set()
        self._draining = self._stopping = False
        self.failure: LorakitError | None = None
        self._reserved = 0
        self._num_generated = self._num_prompt = 0
        self._recent: deque[tuple[float, int]] = deque()
        self._thread: Thread | None = None

    def _new_batch(self, max_rows: int) -> Batch:
        if self.static_reason is None:
            on_cpu = self._model.device.type == "cpu"
            chunk = self.options.prefill_chunk or (_CHUNK_CPU if on_cpu else _CHUNK_GPU)
            return PackedBatch(self._served, self._model, max_rows=max_rows, chunk=chunk)
        pad = self._tokenizer.pad_token_id
        return StaticBatch(
            self._served,
            self._model,
            max_rows=max_rows,
            pad_id=pad if isinstance(pad, int) else min(self._ends, default=0),
            poll=self._take_news,
        )

    # From any thread.

    def start(self) -> None:
        """Start the engine's thread; afterwards requests are answered.

        Raises:
            StateError: it was started before.
        """
        if self._thread is not None:
            raise StateError("the engine was started before", remedy="make a new Engine")
        self._thread = Thread(target=self._run, name="lorakit-engine", daemon=True)
        self._thread.start()

    def drain(self, timeout_s: float) -> bool:
        """Take no more requests, and wait until those under way are finished.

        Returns:
            Whether they were, within `timeout_s` seconds.
        """
        with self._lock:
            self._draining = True
            return self._lock.wait_for(lambda: not self._rows, timeout_s)

    def stop(self) -> None:
        """End the thread; whatever is under way ends with "abort". The model is given back."""
        with self._lock:
            self._draining = self._stopping = True
        self._news.set()
        if self._thread is not None:
            self._thread.join()
        else:
            self._end_all(None)
        self.pool.close()
        self._served.unwrap()

    def submit(self, request: GenerateRequest, on_event: OnEvent) -> None:
        """Queue a request; from any thread, without waiting.

        A schema is compiled here: milliseconds, and about a second for the first of all.

        Args:
            request: what to continue.
            on_event: called in the engine's thread with every event, the last a FinishedEvent;
                must not wait. An exception from it cancels the request.

        Raises:
            QueueFullError: max_queue requests wait already, or the engine is draining.
            ServeError: the engine has failed.
            UnknownAdapterError: no such adapter.
            RequestError: an empty prompt, one longer than the model's context or the cache, an id
                that is under way, a schema that cannot be compiled.
        """
        row = self._new_row(request, on_event)
        with self._lock:
            if self.failure is not None:
                raise ServeError(
                    "the engine has failed, and answers nothing more",
                    found=str(self.failure.found),
                    remedy="start the server again; its log has the whole error",
                )
            num_waiting = sum(other.state == "waiting" for other in self._rows.values())
            if self._draining or num_waiting >= self.options.max_queue:
                raise QueueFullError(
                    "the server is shutting down" if self._draining else "the queue is full",
                    found=f"{num_waiting} requests wait",
                    remedy="try again later",
                )
            if request.id in self._rows:
                raise RequestError("a request of this id is under way", where=request.id)
            self._rows[request.id] = row
            self._arrived.append(row)
        self._news.set()

    def cancel(self, request_id: str) -> None:
        """End a request with "abort"; one that is finished or unknown is left alone."""
        with self._lock:
            if request_id in self._rows:
                self._cancelled.add(request_id)
        self._news.set()

    def stats(self) -> EngineStats:
        """What the engine does now; from any thread."""
        with self._lock:
            running = Counter(row.label for row in self._rows.values() if row.state == "running")
            waiting = Counter(row.label for row in self._rows.values() if row.state == "waiting")
            since = time.monotonic() - _RATE_WINDOW_S
            recent = sum(count for when, count in self._recent if when >= since)
            in_ram, on_device = self.pool.counts()
            return EngineStats(
                running=running.total(),
                waiting=waiting.total(),
                kv_tokens=self._reserved,
                kv_tokens_limit=self.options.max_total_tokens,
                tokens_per_s=recent / _RATE_WINDOW_S,
                num_generated_tokens=self._num_generated,
                num_prompt_tokens=self._num_prompt,
                running_adapters=dict(running),
                waiting_adapters=dict(waiting),
                adapters_ram=in_ram,
                adapters_device=on_device,
                max_batch=self.options.max_batch,
                static_reason=self.static_reason,
            )

    def _new_row(self, request: GenerateRequest, on_event: OnEvent) -> Row:
        num_prompt, options = len(request.prompt_ids), request.sampling
        room = options.max_tokens
        if not num_prompt:
            raise RequestError("the prompt has no tokens", where=request.id)
        if self.context is not None:
            if num_prompt >= self.context:
                raise RequestError(
                    "the prompt does not fit into the model's context",
                    expected=f"at most {self.context - 1} tokens",
                    found=f"{num_prompt} tokens",
                    remedy="shorten the prompt",
                )
            taken = 1 if self._model.config.is_encoder_decoder else num_prompt
            room = min(room, self.context - taken)
        width = self._model.config.get_text_config(decoder=True).vocab_size
        if not all(0 <= token < width for token in request.prompt_ids):
            raise RequestError(
                "the prompt has tokens that the model does not know",
                expected=f"ids from 0 to {width - 1}",
                found=str(next(t for t in request.prompt_ids if not 0 <= t < width)),
            )
        if any(token >= width for token in options.logit_bias):
            raise RequestError(
                "logit_bias names a token that the model does not know",
                expected=f"ids from 0 to {width - 1}",
                found=str(max(options.logit_bias)),
            )
        schema = options.json_schema
        constraint = None if schema is None else self._constrainer.constraint(schema)
        row = Row(
            request=request,
            wanted=self.pool.resolve(request.adapter),
            on_event=on_event,
            sampler=RowSampler(options, constraint, prompt=request.prompt_ids),
            tokenizer=self._tokenizer,
            limit=room,
        )
        if row.reserved_tokens > self.options.max_total_tokens:
            raise RequestError(
                "prompt and answer do not fit into the cache",
                expected=f"at most {self.options.max_total_tokens} tokens",
                found=f"{num_prompt} of the prompt and {room} of the answer, rounded up",
                remedy="shorten the prompt, or ask for fewer tokens",
            )
        return row

    # In the engine's thread.

    def _run(self) -> None:
        try:
            with torch.inference_mode(), self._batch.mode():
                while not self._stopping:
                    self._turn()
        except Exception as error:
            # A defect of the engine itself: nobody may wait for it for ever.
            _log.exception("the engine has stopped")
            self.failure = _failed_pass(error)
        self._end_all(self.failure)

    def _end_all(self, failure: LorakitError | None) -> None:
        with self._lock:
            self._draining = True
            left = list(self._rows.values())
        for row in left:
            self._finish(row, "abort" if failure is None else "error", failure)

    def _turn(self) -> None:
        self._take_news()
        self._queue.take(self._attempt)
        self.pool.settle(row.wanted for row in self._queue.rows() if row.wanted)
        if self._batch.rows():
            self._step()
        else:
            self._news.wait()
            self._news.clear()

    def _take_news(self) -> None:
        """Queue what has arrived, and let go what was cancelled."""
        with self._lock:
            arrived, cancelled = list(self._arrived), self._cancelled
            self._arrived.clear()
            self._cancelled = set()
            gone = [self._rows[name] for name in cancelled if name in self._rows]
            gone += [row for row in self._rows.values() if not row.listening]
        for row in arrived:
            self._queue.add(row)
        for row in gone if not self._stopping else list(self._batch.rows()):
            if row.state != "finished":
                self._finish(row, "abort")

    def _attempt(self, row: Row) -> Outcome:
        """Start a row if there is room and its adapter is there."""
        fits = self._reserved + row.reserved_tokens <= self.options.max_total_tokens
        if not fits or not self._batch.has_place():
            if row.wanted is not None:
                # It is next: its adapter comes from disk while the others go on.
                self.pool.prepare(row.wanted)
            return "full"
        served = None
        try:
            if row.wanted is not None:
                served = self.pool.acquire(row.wanted)
                if served is None:
                    return "later"
            row.start(served)
            self._batch.add(row)
        except LorakitError as error:
            # The queue lets go of this one; those behind it want the same and fail with it.
            for other in self._queue.rows():
                if other is not row and other.wanted == row.wanted:
                    self._finish(other, "error", error)
            self._end(row, "error", error)
            return "taken"
        self._reserved += row.reserved_tokens
        self._num_prompt += len(row.prompt)
        return "taken"

    def _step(self) -> None:
        before = self._num_generated
        try:
            self._batch.step(self._deliver)
        except Exception as error:
            _log.exception("a forward pass failed")
            for row in self._batch.rows():
                self._finish(row, "error", _failed_pass(error))
        with self._lock:
            now = time.monotonic()
            self._recent.append((now, self._num_generated - before))
            while self._recent[0][0] < now - _RATE_WINDOW_S:
                self._recent.popleft()

    def _deliver(self, row: Row, choice: Chosen | LorakitError) -> None:
        if isinstance(choice, LorakitError):
            self._finish(row, "error", choice)
            return
        self._num_generated += 1
        self._queue.charge(row, generated=1)
        reason = row.accept(choice, self._ends)
        if reason is not None:
            self._finish(row, reason)

    def _finish(self, row: Row, reason: FinishReason, error: LorakitError | None = None) -> None:
        """Take a row out of wherever it is, and send its last event."""
        if row.state == "running":
            self._batch.drop(row)
            self._queue.leave(row)
            self._reserved -= row.reserved_tokens
            if row.served is not None:
                self.pool.release(row.served)
        elif row in self._queue.rows():
            self._queue.remove(row)
        self._end(row, reason, error)

    def _end(self, row: Row, reason: FinishReason, error: LorakitError | None) -> None:
        row.finish(reason, error)
        with self._lock:
            self._rows.pop(row.id, None)
            self._lock.notify_all()


def _failed_pass(error: Exception) -> LorakitError:
    if isinstance(error, LorakitError):
        return error
    return ServeError(
        "the forward pass of this batch failed",
        found=f"{type(error).__name__}: {error}".splitlines()[0],
        remedy="send the request again; the server's log has the whole error",
    )
