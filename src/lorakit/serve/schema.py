"""The bodies of OpenAI's interface that this server reads; what it does not do is refused by name.

Fields and limits as in OpenAI's API reference; `adapters` is ours; `top_k`, `min_p`,
`repetition_penalty`, `stop_token_ids` and `ignore_eos` are vLLM's. A key
that nobody knows is an error, because a misspelt option would otherwise be ignored in silence.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

MAX_STOPS = 16
MAX_CHOICES = 16
MAX_TOP_LOGPROBS = 20
MAX_PROMPTS = 64
_MAX_SEED = 2**63 - 1

Finite = Annotated[float, Field(allow_inf_nan=False)]
TokenId = Annotated[int, Field(ge=0)]
Bias = Annotated[float, Field(allow_inf_nan=False, ge=-100, le=100)]


class Body(BaseModel):
    """A request's body: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _whole_characters(cls, data: Any) -> Any:
        """JSON can write half of a surrogate pair; no tokenizer can read it."""
        left = [data]
        while left:
            value = left.pop()
            if isinstance(value, dict):
                left += [*value, *value.values()]
            elif isinstance(value, list):
                left += value
            elif isinstance(value, str) and not value.isascii():
                try:
                    value.encode()
                except UnicodeEncodeError:
                    raise ValueError("a text holds half of a surrogate pair") from None
        return data


class StreamOptions(Body):
    """What a stream carries besides the text."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class JsonSchema(Body):
    """A named JSON schema; `strict` may be given and is always on."""

    name: str = "answer"
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """Plain text, any JSON object, or JSON that fits a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_asked(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema is given exactly when type is json_schema")
        return self

    def schema_to_follow(self) -> dict[str, Any] | None:
        """The JSON schema of the answer, or None for free text."""
        if self.json_schema is not None:
            return self.json_schema.schema_
        return {"type": "object"} if self.type == "json_object" else None


class TextPart(Body):
    """A piece of a message; text is all this server reads."""

    type: Literal["text"]
    text: str


class Message(Body):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    refusal: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[dict[str, Any]] | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _text_alone(cls, value: Any) -> Any:
        parts = value if isinstance(value, list) else []
        kinds = {str(part.get("type"))[:40] for part in parts if isinstance(part, dict)}
        odd = sorted(kinds - {"text"})
        if odd:
            raise ValueError(f"parts of type {', '.join(odd)} are not read by this server: text is")
        return value

    def as_turn(self) -> dict[str, Any]:
        """The turn as a chat template takes it: parts joined, empty keys left out."""
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        if content is None and not self.tool_calls:
            content = ""
        turn = {"role": self.role, "content": content, "tool_call_id": self.tool_call_id}
        turn |= {"tool_calls": self.tool_calls, "name": self.name}
        return {key: value for key, value in turn.items() if value is not None}


class GenerationBody(Body):
    """What both kinds of completions share."""

    model: str
    adapters: dict[str, Finite] | None = Field(default=None, min_length=1, max_length=16)
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: Finite | None = Field(default=None, ge=0, le=2)
    top_p: Finite | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(default=None, ge=-_MAX_SEED, le=_MAX_SEED)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    ignore_eos: bool = False
    min_p: Finite | None = Field(default=None, ge=0, le=1)
    frequency_penalty: Finite | None = Field(default=None, ge=-2, le=2)
    presence_penalty: Finite | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: Finite | None = Field(default=None, ge=0.01, le=10)
    logit_bias: dict[TokenId, Bias] | None = Field(default=None, max_length=1024)
    stop_token_ids: list[TokenId] | None = Field(default=None, max_length=128)
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @field_validator("stop")
    @classmethod
    def _few_and_not_empty(cls, value: str | list[str] | None) -> str | list[str] | None:
        stops = [value] if isinstance(value, str) else value or []
        if len(stops) > MAX_STOPS or not all(stops):
            raise ValueError(f"at most {MAX_STOPS} stop strings, none of them empty")
        return value

    @model_validator(mode="after")
    def _only_what_is_done(self) -> GenerationBody:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self

    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings, whichever way they came."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def with_usage(self) -> bool:
        """Whether the stream ends with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _chat_only(self) -> ChatBody:
        if self.tools:
            raise ValueError("tools is not supported by this server: it would not parse the calls")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    def token_limit(self) -> int | None:
        """How many tokens at most, by either name."""
        return self.max_completion_tokens or self.max_tokens

    def num_logprobs(self) -> int | None:
        """How many alternatives per token; None where no logprobs are asked for."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None

    @model_validator(mode="after")
    def _completions_only(self) -> CompletionBody:
        if self.echo or self.suffix:
            raise ValueError("echo and suffix are not supported by this server")
        if self.best_of not in (None, 1, self.n):
            raise ValueError("best_of is not supported by this server; ask for n answers")
        if not 1 <= len(self.prompts()) <= MAX_PROMPTS or not all(self.prompts()):
            raise ValueError(f"prompt takes 1 to {MAX_PROMPTS} prompts, none of them empty")
        return self

    def prompts(self) -> list[str | list[int]]:
        """The prompts as a list: texts, or token ids."""
        given = self.prompt
        if isinstance(given, str):
            return [given]
        if given and all(isinstance(item, int) for item in given):
            return [[item for item in given if isinstance(item, int)]]
        return [item for item in given if not isinstance(item, int)]

    def token_limit(self) -> int:
        """How many tokens at most; OpenAI's default for this endpoint is 16."""
        return self.max_tokens or 16

    def num_logprobs(self) -> int | None:
        """How many alternatives per token; None where no logprobs are asked for."""
        return self.logprobs


class LoadBody(Body):
    """POST /v1/load_lora_adapter, with vLLM's names."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False


class UnloadBody(Body):
    """POST /v1/unload_lora_adapter, with vLLM's names."""

    lora_name: str
    lora_int_id: int | None = None
