"""Events as OpenAI's bodies: whole answers and stream chunks, of chats and of plain completions."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from lorakit.serve.openai_errors import ApiError, from_lorakit
from lorakit.serve.request import Event, FinishedEvent, TokenEvent, TokenLogprob, TopToken


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """What all bodies of one answer share.

    Attributes:
        id: of the answer.
        model: as the request named it.
        created: seconds since 1970.
        kind: chat turns or plain text.
        logprobs: whether they were asked for.
        with_usage: a stream ends with its usage.
    """

    id: str
    model: str
    kind: Literal["chat", "text"]
    logprobs: bool
    with_usage: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    def envelope(self, object_name: str) -> dict[str, Any]:
        """The keys around the choices."""
        return {"id": self.id, "object": object_name, "created": self.created, "model": self.model}


@dataclass(slots=True)
class Choice:
    """One answer as it grows."""

    text: list[str] = field(default_factory=list[str])
    logprobs: list[TokenLogprob] = field(default_factory=list[TokenLogprob])
    end: FinishedEvent | None = None

    def add(self, event: Event) -> None:
        """Take in an event."""
        if isinstance(event, TokenEvent):
            self.text.append(event.text)
            self.logprobs.extend(event.logprobs)
        else:
            self.end = event


def failure(end: FinishedEvent) -> ApiError | None:
    """Why an answer is none, or None for one that is."""
    if end.reason == "error" and end.error is not None:
        return from_lorakit(end.error, code="generation_failed")
    if end.reason in ("abort", "error"):
        return ApiError(503, "the answer was cut off: the server is stopping", code="aborted")
    return None


def usage_of(ends: Sequence[FinishedEvent], num_prompt_tokens: int) -> dict[str, int]:
    """Tokens of all choices; the prompt counts once per prompt, not per choice."""
    generated = sum(end.num_generated_tokens for end in ends)
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": num_prompt_tokens + generated,
    }


def timings_of(ends: Sequence[FinishedEvent]) -> list[dict[str, float | None]]:
    """Ours, beside OpenAI's keys: seconds from submission to start, first token and end."""
    return [
        {k: None if v is None else round(v, 5) for k, v in asdict(end.timings).items()}
        for end in ends
    ]


def whole_body(head: Head, choices: Sequence[Choice], num_prompt_tokens: int) -> dict[str, Any]:
    """The body of an answer that is not streamed."""
    ends = [choice.end for choice in choices if choice.end is not None]
    name = "chat.completion" if head.kind == "chat" else "text_completion"
    return {
        **head.envelope(name),
        "choices": [_whole_choice(head, i, choice) for i, choice in enumerate(choices)],
        "usage": usage_of(ends, num_prompt_tokens),
        "timings": timings_of(ends),
    }


def _whole_choice(head: Head, index: int, choice: Choice) -> dict[str, Any]:
    text = "".join(choice.text)
    reason = choice.end.reason if choice.end is not None else None
    body: dict[str, Any] = {
        "index": index,
        "finish_reason": reason,
        "stop_reason": choice.end.stop_text if choice.end is not None else None,
        "logprobs": None,
    }
    if head.kind == "chat":
        body["message"] = {"role": "assistant", "content": text, "refusal": None}
    else:
        body["text"] = text
    if head.logprobs:
        body["logprobs"] = _logprobs(head, choice.logprobs, 0)
    return body


class StreamShape:
    """Chunks of one streamed answer; remembers what the last chunk needs.

    Args:
        head: what the chunks share.
        num_choices: how many answers there are.
        num_prompt_tokens: for the usage.
    """

    def __init__(self, head: Head, *, num_choices: int, num_prompt_tokens: int) -> None:
        self._head = head
        self._num_prompt_tokens = num_prompt_tokens
        self._offsets = [0] * num_choices
        self._ends: list[FinishedEvent] = []

    def opening(self) -> Iterable[dict[str, Any]]:
        """A chat says first who speaks."""
        if self._head.kind == "chat":
            for index in range(len(self._offsets)):
                yield self._chunk(index, {"delta": {"role": "assistant", "content": ""}})

    def chunks(self, index: int, event: Event) -> Iterable[dict[str, Any]]:
        """New text, or the reason why it ends; an error is a chunk of its own."""
        if isinstance(event, TokenEvent):
            if event.text or event.logprobs:
                yield self._token_chunk(index, event)
            return
        self._ends.append(event)
        error = failure(event)
        if error is not None:
            yield error.body()
            return
        last: dict[str, Any] = {"delta": {}} if self._head.kind == "chat" else {"text": ""}
        yield self._chunk(index, {**last, "stop_reason": event.stop_text}, reason=event.reason)

    def closing(self) -> Iterable[dict[str, Any]]:
        """The usage, if it was asked for."""
        if self._head.with_usage:
            usage = usage_of(self._ends, self._num_prompt_tokens)
            yield {
                **self._head.envelope(self._object()),
                "choices": [],
                "usage": usage,
                "timings": timings_of(self._ends),
            }

    def _token_chunk(self, index: int, event: TokenEvent) -> dict[str, Any]:
        chat = self._head.kind == "chat"
        content = {"delta": {"content": event.text}} if chat else {"text": event.text}
        logprobs = None
        if self._head.logprobs:
            logprobs = _logprobs(self._head, event.logprobs, self._offsets[index])
        self._offsets[index] += len(event.text)
        return self._chunk(index, content, logprobs=logprobs)

    def _chunk(
        self,
        index: int,
        content: Mapping[str, Any],
        *,
        reason: str | None = None,
        logprobs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": reason}
        body = {**self._head.envelope(self._object()), "choices": [choice]}
        return {**body, "usage": None} if self._head.with_usage else body

    def _object(self) -> str:
        return "chat.completion.chunk" if self._head.kind == "chat" else "text_completion"


def _logprobs(head: Head, tokens: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
    if head.kind == "chat":
        return {"content": [_chat_logprob(token) for token in tokens], "refusal": None}
    offsets: list[int] = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text)
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [_top_of_text(token) for token in tokens],
        "text_offset": offsets,
    }


def _top_of_text(token: TokenLogprob) -> dict[str, float]:
    """The most likely tokens and, as OpenAI's API has it, the chosen one among them."""
    return {**{top.text: top.logprob for top in token.top}, token.text: token.logprob}


def _chat_logprob(token: TokenLogprob) -> dict[str, Any]:
    return {**_one(token), "top_logprobs": [_one(top) for top in token.top]}


def _one(token: TokenLogprob | TopToken) -> dict[str, Any]:
    # Half a character is U+FFFD as text: its bytes say what it is half of.
    raw = None if token.raw is None else list(token.raw)
    return {"token": token.text, "logprob": token.logprob, "bytes": raw}
