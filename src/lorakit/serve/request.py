"""What goes into the engine and what comes out: requests, options, events, statistics."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lorakit.errors import LorakitError, RequestError

FinishReason = Literal["stop", "length", "abort", "error"]
# None: the base. A name: that adapter. A mapping: the weighted sum of those adapters.
AdapterChoice = str | Mapping[str, float] | None
MAX_LOGPROBS = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingOptions:
    """How the next token is chosen, and when the answer ends.

    Attributes:
        max_tokens: the longest answer, in tokens.
        temperature: 0 takes the most likely token; else logits are divided by it.
        top_p: the smallest set of tokens whose probabilities reach this sum is kept.
        top_k: this many most likely tokens are kept; 0 keeps all.
        min_p: tokens are kept whose probability is at least this share of the likeliest one's.
        frequency_penalty: taken from a token's logit for each time the answer holds it.
        presence_penalty: taken from a token's logit once the answer holds it.
        repetition_penalty: logits of what prompt or answer hold are divided (above zero) or
            multiplied (below) by it.
        logit_bias: token id -> what is added to its logit.
        seed: two requests of one seed draw the same numbers, in whatever batch; None draws one.
        stop: the answer ends in front of the first of these texts.
        stop_token_ids: the answer ends in front of any of these tokens.
        logprobs: None for none; 0 for the chosen token's alone; n for the n most likely beside it.
        json_schema: the answer is a JSON document of this schema.
        ignore_eos: go on to max_tokens whatever the model says (for measurements).

    Raises:
        RequestError: a value that cannot be; the message names the field.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict[int, float])
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    json_schema: Mapping[str, Any] | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _check("max_tokens", self.max_tokens, "at least 1", self.max_tokens >= 1)
        finite = math.isfinite(self.temperature)
        in_range = finite and 0 <= self.temperature <= 10
        _check("temperature", self.temperature, "from 0 to 10", in_range)
        _check("top_p", self.top_p, "above 0, at most 1", 0 < self.top_p <= 1)
        _check("top_k", self.top_k, "0 (all) or more", self.top_k >= 0)
        self._check_penalties()
        in_range = self.seed is None or -(2**63) <= self.seed < 2**63
        _check("seed", self.seed, "a number of 64 bits", in_range)
        _check("stop", self.stop, "texts that are not empty", all(self.stop))
        in_range = self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS
        _check("logprobs", self.logprobs, f"from 0 to {MAX_LOGPROBS}", in_range)
        both = self.json_schema is not None and self.ignore_eos
        _check("ignore_eos", self.ignore_eos, "False beside a json_schema", not both)

    def _check_penalties(self) -> None:
        _check("min_p", self.min_p, "from 0 to 1", 0 <= self.min_p <= 1)
        value = self.frequency_penalty
        _check("frequency_penalty", value, "from -2 to 2", -2 <= value <= 2)
        value = self.presence_penalty
        _check("presence_penalty", value, "from -2 to 2", -2 <= value <= 2)
        value = self.repetition_penalty
        # Less would make logits infinite.
        _check("repetition_penalty", value, "from 0.01 to 10", 0.01 <= value <= 10)
        good = all(abs(bias) <= 100 and token >= 0 for token, bias in self.logit_bias.items())
        _check("logit_bias", self.logit_bias, "token ids with numbers from -100 to 100", good)


def _check(name: str, value: object, expected: str, good: bool) -> None:
    if not good:
        raise RequestError(
            "a sampling option cannot be", where=name, expected=expected, found=repr(value)
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateRequest:
    """One prompt to be continued.

    Attributes:
        id: unique among the requests that are under way.
        prompt_ids: the prompt's tokens, chat template and all.
        adapter: None for the base, an adapter's name, or names with weights: their exact sum.
        sampling: how the answer is chosen and when it ends.
        continues: the answer's text goes on where the prompt's ends: a space that it begins with
            is kept by tokenizers that drop it at the start of a text.
    """

    id: str
    prompt_ids: tuple[int, ...]
    adapter: AdapterChoice = None
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    continues: bool = False


@dataclass(frozen=True, slots=True)
class TopToken:
    """One of the most likely tokens at a place, log p of it, and its bytes if they are known."""

    token_id: int
    text: str
    logprob: float
    raw: bytes | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The chosen token, log p of it before temperature and cuts, and the most likely ones.

    Attributes:
        token_id: the chosen token.
        text: it alone, as it reads inside a text; half a character becomes U+FFFD.
        logprob: natural logarithm of its probability.
        raw: its bytes, where half a character too has its own; None where they are not known.
        top: the most likely tokens, best first, as many as were asked for.
    """

    token_id: int
    text: str
    logprob: float
    raw: bytes | None = None
    top: tuple[TopToken, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """New text of an answer.

    Attributes:
        text: what can be shown; whole characters, and never a part of a stop string. May be empty.
        token_ids: the tokens generated since the last event.
        logprobs: one per token, where they were asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds from the submission: to the start of work, to the first token, to the end."""

    queue_s: float
    first_token_s: float | None
    total_s: float


@dataclass(frozen=True, slots=True)
class FinishedEvent:
    """The last event of a request.

    Attributes:
        reason: "stop" by the model or a stop string, "length" at the limit, "abort" when it was
            cancelled or the engine stopped, "error" with `error`.
        num_prompt_tokens: of the request.
        num_generated_tokens: the end-of-sequence token included.
        error: why it failed, or None.
        timings: how long it took.
        stop_text: the stop string that ended it, or None.
    """

    reason: FinishReason
    num_prompt_tokens: int
    num_generated_tokens: int
    error: LorakitError | None
    timings: Timings
    stop_text: str | None = None


Event = TokenEvent | FinishedEvent
OnEvent = Callable[[Event], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineOptions:
    """The engine's limits.

    Attributes:
        max_batch: requests that are answered together.
        max_queue: requests that may wait; one more is refused.
        max_total_tokens: tokens of all running requests, prompts and answers, that the cache may
            hold.
        prefill_chunk: prompt tokens per step while others are being answered; None: 64 on a CPU,
            512 on a GPU.
        adapters_dir: every directory in it with an adapter is served under its name; adapters are
            loaded from nowhere else. None: `load` takes any path.
        max_adapters_ram: adapters kept in memory.
        max_adapters_device: adapters kept on the model's device, where that is not the CPU.
        max_rank: adapters of a higher rank (parts of a fused layer added up) are refused.
        any_base: serve adapters whose passport names another base.
        prepack: on a CPU, keep a second copy of the large weights in the layout that products of a
            few rows are fast in, if memory is there for it.
    """

    max_batch: int = 16
    max_queue: int = 256
    max_total_tokens: int = 65536
    prefill_chunk: int | None = None
    adapters_dir: Path | None = None
    max_adapters_ram: int = 64
    max_adapters_device: int = 32
    max_rank: int = 512
    any_base: bool = False
    prepack: bool = True


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What the engine does now.

    Attributes:
        running: requests in the batch.
        waiting: requests in the queue.
        kv_tokens: tokens the cache is reserved for.
        kv_tokens_limit: the most it may be.
        tokens_per_s: generated tokens per second, over the last ten seconds.
        num_generated_tokens: since the start.
        num_prompt_tokens: since the start.
        running_adapters: adapter -> running requests; "" is the base.
        waiting_adapters: adapter -> waiting requests.
        adapters_ram: adapters in memory.
        adapters_device: adapters on the device.
        max_batch: as in the options.
        static_reason: why this architecture runs in static batches, or None.
    """

    running: int
    waiting: int
    kv_tokens: int
    kv_tokens_limit: int
    tokens_per_s: float
    num_generated_tokens: int
    num_prompt_tokens: int
    running_adapters: Mapping[str, int]
    waiting_adapters: Mapping[str, int]
    adapters_ram: int
    adapters_device: int
    max_batch: int
    static_reason: str | None


AdapterState = Literal["disk", "ram", "device"]


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """One adapter that can be asked for.

    Attributes:
        name: what requests call it.
        path: its directory.
        state: the nearest tier that holds it.
        pinned: it is never evicted.
        key: the hash of its files' content; None until it was read for the first time.
        r: the rank its configuration names.
        passport: base, data, metrics, versions, without the bulky parts; empty without one.
        problem: why it cannot be served, or None.
    """

    name: str
    path: Path
    state: AdapterState
    pinned: bool
    key: str | None
    r: int | None
    passport: Mapping[str, Any]
    problem: str | None = None


def adapter_label(choice: AdapterChoice) -> str:
    """An adapter choice in words, for statistics and messages: "", "sql", "0.7*sql+0.3*chat"."""
    if choice is None:
        return ""
    if isinstance(choice, str):
        return choice
    return "+".join(f"{weight:g}*{name}" for name, weight in sorted(choice.items()))
