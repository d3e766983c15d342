"""What the routes share: which model a name means, the limits, the way into the engine and out."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from weakref import WeakSet

from starlette.types import Receive

from lorakit.errors import AdapterFileError, BaseMismatchError, QueueFullError, UnknownAdapterError
from lorakit.serve.answers import Choice, Head, failure
from lorakit.serve.auth import Keys
from lorakit.serve.engine import Engine
from lorakit.serve.metrics import BASE, COMPOSED, Metrics
from lorakit.serve.openai_errors import ApiError, from_lorakit
from lorakit.serve.prompts import Prompts
from lorakit.serve.request import (
    AdapterChoice,
    AdapterInfo,
    FinishedEvent,
    GenerateRequest,
    SamplingOptions,
    adapter_label,
)
from lorakit.serve.schema import ChatBody, CompletionBody
from lorakit.serve.streams import Answers, watching

# The base's second name, for requests that do not care which base it is.
ALIAS = "base"
_SEED_BITS = 63


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeOptions:
    """What the HTTP side needs to know.

    Attributes:
        name: the base's name in requests and lists.
        adapters_dir: where adapters lie; None serves the base alone.
        keys: who may ask.
        max_body_bytes: of one request.
        max_tokens: the longest answer a request may ask for.
        max_context: tokens of prompt and answer together that the model takes; None: no limit.
        host_names: names this server answers to; None for all.
    """

    name: str
    adapters_dir: Path | None = None
    keys: Keys = field(default_factory=Keys)
    max_body_bytes: int = 1 << 20
    max_tokens: int = 4096
    max_context: int | None = None
    host_names: frozenset[str] | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """What answers: the name in the request, the engine's choice, the adapter's passport."""

    model: str
    choice: AdapterChoice
    passport: Mapping[str, Any]


class Service:
    """The engine behind the routes.

    Args:
        engine: started; stopped by whoever made it.
        prompts: turns text into tokens.
        options: names and limits.
    """

    def __init__(self, engine: Engine, prompts: Prompts, *, options: ServeOptions) -> None:
        self.engine = engine
        self.prompts = prompts
        self.options = options
        self.metrics = Metrics(engine)
        self.draining = False
        self.num_cut_off = 0
        self._under_way: WeakSet[Answers] = WeakSet()
        self.started_at = int(time.time())

    async def target(self, body: ChatBody | CompletionBody) -> Target:
        """What a request's `model` and `adapters` mean.

        Raises:
            ApiError: 404 for a name that is not served, 400 for both a name and weights.
        """
        name = self.adapter_name(body.model)
        if body.adapters is None:
            info = None if name is None else await self.info(name)
            return Target(body.model, name, {} if info is None else info.passport)
        if name is not None:
            raise ApiError(
                400,
                f"model names the adapter {name!r} and adapters names others; with adapters, model "
                f"is the base: {self.options.name}",
                param="adapters",
            )
        for part in body.adapters:
            await self.info(part)
        return Target(body.model, dict(body.adapters), {})

    def adapter_name(self, model: str) -> str | None:
        """The adapter in "sql", "BASE:sql" or "base:sql"; None for the base itself."""
        base = self.options.name
        if model in (base, ALIAS):
            return None
        for prefix in (f"{base}:", f"{ALIAS}:"):
            if model.startswith(prefix):
                return model.removeprefix(prefix)
        return model

    async def info(self, name: str) -> AdapterInfo:
        """What is known of an adapter.

        Raises:
            ApiError: 404 where there is none.
        """
        try:
            return await asyncio.to_thread(self.engine.pool.info, name)
        except UnknownAdapterError as error:
            raise self.no_such_model(name, error) from error

    def no_such_model(self, name: str, error: UnknownAdapterError | None = None) -> ApiError:
        """The 404 of a name that is not served."""
        near = f"; near it: {error.found}" if error is not None and error.found else ""
        return ApiError(
            404,
            f"there is no model {name[:200]!r}; GET /v1/models lists them{near}",
            code="model_not_found",
            param="model",
        )

    def sampling(self, body: ChatBody | CompletionBody, num_prompt_tokens: int) -> SamplingOptions:
        """A request's options as the engine takes them; OpenAI's defaults where it says nothing.

        Raises:
            ApiError: 400 where the answer would be longer than the server or the model allows.
        """
        form = body.response_format
        top_k = body.top_k if body.top_k is not None and body.top_k > 0 else 0
        return SamplingOptions(
            max_tokens=self._max_tokens(body.token_limit(), num_prompt_tokens),
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            top_k=top_k,
            min_p=body.min_p or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            presence_penalty=body.presence_penalty or 0.0,
            repetition_penalty=body.repetition_penalty or 1.0,
            logit_bias=body.logit_bias or {},
            seed=body.seed,
            stop=body.stop_strings(),
            stop_token_ids=tuple(body.stop_token_ids or ()),
            logprobs=body.num_logprobs(),
            json_schema=None if form is None else form.schema_to_follow(),
            ignore_eos=body.ignore_eos,
        )

    def _max_tokens(self, asked: int | None, num_prompt_tokens: int) -> int:
        limit, context = self.options.max_tokens, self.options.max_context
        room = limit if context is None else context - num_prompt_tokens
        if room < 1 or (asked is not None and asked > room and context is not None):
            raise ApiError(
                400,
                f"the model's context is {context} tokens; the prompt has {num_prompt_tokens} "
                f"and the answer may have {asked or 'at least 1'}",
                code="context_length_exceeded",
                param="max_tokens" if asked is not None and room > 0 else "messages",
            )
        if asked is not None and asked > limit:
            raise ApiError(
                400, f"this server answers with at most {limit} tokens", param="max_tokens"
            )
        return min(limit, room) if asked is None else asked

    async def answers(
        self,
        body: ChatBody | CompletionBody,
        target: Target,
        prompts: Sequence[tuple[int, ...]],
        *,
        head: Head,
        facts: dict[str, Any],
    ) -> Answers:
        """Submit every choice of a request.

        Args:
            body: the request.
            target: what answers.
            prompts: token ids; each gets `body.n` answers.
            head: names the answer.
            facts: of the request's log line; the end of every answer is added.

        Raises:
            ApiError: the queue is full, the adapter cannot be served, an option cannot be.
        """
        if self.draining:
            raise _draining()
        num_answers, places = len(prompts) * (body.n or 1), self.engine.options.max_queue
        if num_answers > places:
            raise ApiError(
                400, f"{num_answers} answers are asked for at once; {places} may wait", param="n"
            )
        requests: list[GenerateRequest] = []
        for prompt in prompts:
            sampling = self.sampling(body, len(prompt))
            for number in range(body.n or 1):
                requests.append(
                    GenerateRequest(
                        id=f"{head.id}-{len(requests)}",
                        prompt_ids=prompt,
                        adapter=target.choice,
                        sampling=_of_choice(sampling, number),
                        continues=isinstance(body, CompletionBody),
                    )
                )
        label = adapter_label(target.choice)
        # Weights are the client's: a label of its own for each would grow without end.
        counted = COMPOSED if isinstance(target.choice, Mapping) else label

        def finished(end: FinishedEvent) -> None:
            self.metrics.finished(counted, end)
            facts.update(_facts_of_end(label, end))

        answers = Answers(self.engine, requests, finished)
        self._under_way.add(answers)
        try:
            await answers.start()
        except QueueFullError as error:
            raise self._busy(error) from error
        except UnknownAdapterError as error:
            raise self.no_such_model(target.model, error) from error
        except (AdapterFileError, BaseMismatchError) as error:
            raise from_lorakit(error, code="adapter_refused") from error
        return answers

    def cut_off(self) -> None:
        """End every answer under way: its client is told that it was cut off."""
        for answers in list(self._under_way):
            self.num_cut_off += answers.cancel()

    def _busy(self, error: QueueFullError) -> ApiError:
        if self.draining:
            return _draining()
        return ApiError(
            429,
            f"{error.what}; try again",
            code="queue_full",
            headers={"Retry-After": str(self.retry_after_s())},
        )

    def retry_after_s(self) -> int:
        """A guess at when a place in the queue is free: a share of the tokens before it."""
        stats = self.engine.stats()
        if stats.tokens_per_s <= 0:
            return 1
        ahead = stats.kv_tokens / max(stats.running, 1) / stats.tokens_per_s
        return max(1, min(60, round(ahead)))


def _draining() -> ApiError:
    return ApiError(503, "the server is stopping", code="draining", headers={"Retry-After": "5"})


def _of_choice(sampling: SamplingOptions, number: int) -> SamplingOptions:
    """Choices of one request must differ: each has a seed of its own."""
    if sampling.seed is None or number == 0:
        return sampling
    return replace(sampling, seed=(sampling.seed + number) % (1 << _SEED_BITS))


def _facts_of_end(adapter: str, end: FinishedEvent) -> dict[str, Any]:
    first = end.timings.first_token_s
    return {
        "adapter": adapter or BASE,
        "finish": end.reason,
        "prompt_tokens": end.num_prompt_tokens,
        "generated_tokens": end.num_generated_tokens,
        "queue_s": round(end.timings.queue_s, 4),
        "first_token_s": None if first is None else round(first, 4),
    }


async def collect(answers: Answers, num_choices: int, receive: Receive) -> list[Choice] | None:
    """Wait for whole answers; None if the client went away, which cancels them.

    Raises:
        ApiError: an answer failed.
    """
    choices = [Choice() for _ in range(num_choices)]
    async with watching(receive) as gone:
        gathering = asyncio.create_task(_gather(answers, choices))
        try:
            await asyncio.wait({gathering, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not gathering.done():
                return None
            await gathering
        finally:
            gathering.cancel()
            answers.cancel()
    return choices


async def _gather(answers: Answers, choices: list[Choice]) -> None:
    while events := await answers.next_events():
        for index, event in events:
            choices[index].add(event)
            error = failure(event) if isinstance(event, FinishedEvent) else None
            if error is not None:
                raise error


def new_id(prefix: str) -> str:
    """An id nobody else has."""
    return f"{prefix}-{uuid.uuid4().hex}"
