"""The engine: one thread owns the model; requests come by a queue, tokens go by callbacks."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorakit.serve.pool import AdapterPool
from lorakit.serve.request import EngineOptions, EngineStats, GenerateRequest, OnEvent


class Engine:
    """Continuous batches over one base, each row with its own adapter.

    Args:
        model: a base as `load_model` gives it, nothing attached; the engine's own until `stop`.
        tokenizer: its tokenizer.
        options: the limits.

    Attributes:
        pool: the adapters.
    """

    pool: AdapterPool

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        options: EngineOptions | None = None,
    ) -> None:
        raise NotImplementedError

    def start(self) -> None:
        """Start the engine's thread; afterwards requests are answered."""
        raise NotImplementedError

    def drain(self, timeout_s: float) -> bool:
        """Take no more requests, and wait until those under way are finished.

        Returns:
            Whether they were, within `timeout_s` seconds.
        """
        raise NotImplementedError

    def stop(self) -> None:
        """End the thread; whatever is under way ends with "abort". The model is given back."""
        raise NotImplementedError

    def submit(self, request: GenerateRequest, on_event: OnEvent) -> None:
        """Queue a request; from any thread, without waiting.

        Args:
            request: what to continue.
            on_event: called in the engine's thread with every event, the last a FinishedEvent;
                must not wait. An exception from it cancels the request.

        Raises:
            QueueFullError: max_queue requests wait already, or the engine is draining.
            UnknownAdapterError: no such adapter.
            RequestError: an empty prompt, one longer than the model's context or the cache, an id
                that is under way, a schema that cannot be compiled.
        """
        raise NotImplementedError

    def cancel(self, request_id: str) -> None:
        """End a request with "abort"; one that is finished or unknown is left alone."""
        raise NotImplementedError

    def stats(self) -> EngineStats:
        """What the engine does now; from any thread."""
        raise NotImplementedError
