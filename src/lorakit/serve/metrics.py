"""Numbers for Prometheus: our own names, and the ones of vLLM that LoRA-aware gateways read."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lorakit.serve.engine import Engine
from lorakit.serve.request import FinishedEvent

BASE = "base"
# Weighted sums of adapters, all of them; no adapter's name has brackets.
COMPOSED = "(composed)"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class Metrics:
    """Counts what is finished, and reads from the engine what is under way.

    Args:
        engine: asked for its statistics whenever the numbers are read.
    """

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        registry = self._registry
        registry.register(_EngineNumbers(engine))
        self._requests = Counter(
            "lorakit_requests",
            "Finished generation requests.",
            ["adapter", "outcome"],
            registry=registry,
        )
        self._tokens = Counter(
            "lorakit_tokens", "Tokens read and written.", ["adapter", "kind"], registry=registry
        )
        self._responses = Counter(
            "lorakit_http_responses", "HTTP responses.", ["path", "status"], registry=registry
        )
        self._first = Histogram(
            "lorakit_time_to_first_token_seconds",
            "From submission to the first token.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._each = Histogram(
            "lorakit_time_per_output_token_seconds",
            "Per token after the first, averaged over a request.",
            buckets=_TOKEN_SECONDS,
            registry=registry,
        )
        self._whole = Histogram(
            "lorakit_request_seconds",
            "From submission to the last token.",
            buckets=_SECONDS,
            registry=registry,
        )

    def finished(self, adapter: str, end: FinishedEvent) -> None:
        """Count one answer.

        Args:
            adapter: the name of what answered; "" for the base.
            end: its last event.
        """
        name = adapter or BASE
        self._requests.labels(name, end.reason).inc()
        self._tokens.labels(name, "prompt").inc(end.num_prompt_tokens)
        self._tokens.labels(name, "generated").inc(end.num_generated_tokens)
        if end.reason not in ("stop", "length"):
            return
        first, total = end.timings.first_token_s, end.timings.total_s
        self._whole.observe(total)
        if first is not None:
            self._first.observe(first)
            if end.num_generated_tokens > 1:
                self._each.observe((total - first) / (end.num_generated_tokens - 1))

    def responded(self, path: str, status: int) -> None:
        """Count one HTTP response; the path must be one of the server's own."""
        self._responses.labels(path, str(status)).inc()

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self._registry)


class _EngineNumbers(Collector):
    """The engine's statistics as gauges."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def describe(self) -> Iterable[Metric]:
        """Nothing: the registry would otherwise collect once to learn the names."""
        return []

    def collect(self) -> Iterator[Metric]:
        """One gauge per number."""
        stats = self._engine.stats()
        kv_share = stats.kv_tokens / max(stats.kv_tokens_limit, 1)
        numbers = {
            "lorakit_requests_running": ("Requests in the batch.", stats.running),
            "lorakit_requests_waiting": ("Requests in the queue.", stats.waiting),
            "lorakit_kv_tokens": ("Tokens the cache is reserved for.", stats.kv_tokens),
            "lorakit_kv_tokens_limit": ("The most it may be.", stats.kv_tokens_limit),
            "lorakit_tokens_per_second": (
                "Generated tokens, over ten seconds.",
                stats.tokens_per_s,
            ),
            "lorakit_adapters_ram": ("Adapters in memory.", stats.adapters_ram),
            "lorakit_adapters_device": ("Adapters on the device.", stats.adapters_device),
            "vllm:num_requests_running": ("As vLLM names it.", stats.running),
            "vllm:num_requests_waiting": ("As vLLM names it.", stats.waiting),
            "vllm:kv_cache_usage_perc": ("As vLLM names it: 1 is full.", kv_share),
        }
        for name, (meaning, value) in numbers.items():
            yield GaugeMetricFamily(name, meaning, value=float(value))
        info = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters with running and waiting requests; the value is the time of reading.",
            labels=["running_lora_adapters", "waiting_lora_adapters", "max_lora"],
        )
        running = ",".join(sorted(name for name in stats.running_adapters if name))
        waiting = ",".join(sorted(name for name in stats.waiting_adapters if name))
        info.add_metric([running, waiting, str(stats.max_batch)], time.time())
        yield info
