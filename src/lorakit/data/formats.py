"""The shapes that rows come in, found from their columns and read into one of three types."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from lorakit.data.options import SftOptions
from lorakit.data.rows import Row
from lorakit.errors import DataError, nearest
from lorakit.files import parse_json

Format = Literal["messages", "conversations", "prompt-completion", "instruction-output", "text"]
Message: TypeAlias = dict[str, Any]

# Which roles a format needs, and the role that only training needs (a prompt file has no answer).
_NEEDS: dict[Format, tuple[tuple[str, ...], str | None]] = {
    "messages": (("messages",), None),
    "conversations": (("conversations",), None),
    "prompt-completion": (("prompt",), "completion"),
    "instruction-output": (("instruction",), "output"),
    "text": (("text",), None),
}
_TOOLS = "a list of functions, each an object, or such a list as JSON text"
# What data sets call a speaker, in lower case -> what chat templates call it.
_ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
# Stanford Alpaca's own wording, for base models without a chat template
# (github.com/tatsu-lab/stanford_alpaca, train.py).
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
_ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


@dataclass(frozen=True, slots=True)
class Dialogue:
    """Turns. Assistant turns from `first_learned` on are answers; those before are context."""

    messages: list[Message]
    first_learned: int = 0
    tools: list[Any] | None = None


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt and its answer; `plain_prompt` is the prompt where there is no chat template."""

    prompt: str
    plain_prompt: str
    completion: str | None
    system: str | None = None


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text, learned as a whole."""

    text: str


Content: TypeAlias = Dialogue | Pair | Text


def detect_format(
    columns: Collection[str], options: SftOptions, *, need_answer: bool = True, where: str = ""
) -> Format:
    """The format of rows with these columns; named roles (`options.columns`) go first.

    Args:
        columns: the column names of a row.
        options: names the user's own columns.
        need_answer: whether a prompt without its completion is too little.
        where: the row or file, for the message.

    Raises:
        DataError: the columns fit no format, or a named column is not there.
    """
    for role, name in options.columns.items():
        if name not in columns:
            close = nearest(name, columns, n=1)
            raise DataError(
                f"no column {name!r} for the role {role!r}",
                where=where,
                expected=f"the column {name!r}",
                found=f"columns: {', '.join(columns) or 'none'}",
                remedy=f"did you mean {close[0]!r}?" if close else "correct `columns`",
            )
    fitting: list[Format] = [kind for kind in _NEEDS if _fits(kind, columns, options, need_answer)]
    named: list[Format] = [kind for kind in fitting if set(_roles(kind)) & set(options.columns)]
    if fitting:
        return named[0] if named else fitting[0]
    raise DataError(
        "the columns fit no format",
        where=where,
        expected="messages | conversations | prompt + completion | instruction (+ input) + output"
        " | text",
        found=f"columns: {', '.join(columns) or 'none'}",
        remedy="name your columns: columns: {prompt: <your column>, completion: <your column>}",
    )


def _roles(kind: Format) -> tuple[str, ...]:
    needed, answer = _NEEDS[kind]
    return (*needed, answer) if answer else needed


def _fits(kind: Format, columns: Collection[str], options: SftOptions, need_answer: bool) -> bool:
    needed = _roles(kind) if need_answer else _NEEDS[kind][0]
    return all(options.column(role) in columns for role in needed)


def read_content(
    row: Row, kind: Format, options: SftOptions, *, where: str, need_answer: bool = True
) -> Content:
    """A row as turns, a pair or text.

    Raises:
        DataError: a column is missing or holds something else than the format asks for.
    """
    for role in _roles(kind) if need_answer else _NEEDS[kind][0]:
        if options.column(role) not in row:
            raise DataError(
                f"a row without the column {options.column(role)!r}",
                where=where,
                expected=f"{' and '.join(map(options.column, _roles(kind)))}, as in the first row",
                found=f"columns: {', '.join(row) or 'none'}",
                remedy="all rows of a data set must have one format; repair or remove this row",
            )
    if kind == "text":
        return Text(_text(row, options.column("text"), where))
    if kind == "prompt-completion":
        return _read_pair(row, options, where)
    if kind == "instruction-output":
        return read_alpaca(row, options, where)
    column = options.column(kind)
    messages = read_messages(row[column], f"{where}, column {column!r}")
    return Dialogue(with_system(messages, row, options), tools=tools_of(row, where))


def answer_of(content: Content) -> str | None:
    """The answer as written: a completion, or the assistant turn that closes the messages."""
    if isinstance(content, Pair):
        return content.completion
    if isinstance(content, Dialogue) and content.messages[-1]["role"] == "assistant":
        return content.messages[-1]["content"]
    return None


def question_of(content: Content) -> str:
    """What is asked last, as written: a prompt, or the turn before the answer; "" of plain text."""
    if isinstance(content, Pair):
        return content.prompt
    if isinstance(content, Text):
        return ""
    turns = content.messages
    asked = turns[:-1] if turns[-1]["role"] == "assistant" else turns
    return asked[-1]["content"] if asked else ""


def _read_pair(row: Row, options: SftOptions, where: str) -> Content:
    names = (options.column("prompt"), options.column("completion"))
    prompt, completion = (row.get(name) for name in names)
    if isinstance(prompt, str):
        answer = None if names[1] not in row else _text(row, names[1], where)
        _text(row, names[0], where)
        return Pair(prompt, prompt, answer, system_of(row, options))
    messages = read_messages(prompt, f"{where}, column {names[0]!r}")
    answers: list[Message] = []
    if names[1] in row:
        answers = read_messages(completion, f"{where}, column {names[1]!r}")
    messages = with_system(messages, row, options)
    tools = tools_of(row, where)
    return Dialogue(messages + answers, first_learned=len(messages), tools=tools)


def read_alpaca(row: Row, options: SftOptions, where: str) -> Pair:
    """An instruction with its input as a prompt, and its output, if there is one.

    Raises:
        DataError: a column holds something else than text.
    """
    instruction = _text(row, options.column("instruction"), where)
    extra = row.get(options.column("input")) or ""
    if extra:
        extra = _text(row, options.column("input"), where)
    prompt = f"{instruction}\n\n{extra}" if extra else instruction
    plain = _ALPACA_WITH_INPUT if extra else _ALPACA
    answer = None
    if options.column("output") in row:
        answer = _text(row, options.column("output"), where)
    filled = plain.format(instruction=instruction, input=extra)
    return Pair(prompt, filled, answer, system_of(row, options))


def read_messages(value: Any, where: str) -> list[Message]:
    """A list of turns: objects with "role" and "content", or ShareGPT's "from" and "value".

    Raises:
        DataError: it is something else, or empty.
    """
    if not isinstance(value, Iterable) or isinstance(value, (str, bytes, Mapping)):
        raise wrong_kind(where, "a list of messages", value)
    messages = [
        _read_message(item, f"{where}, message {number}")
        for number, item in enumerate(value, start=1)
    ]
    if not messages:
        raise wrong_kind(where, "at least one message", value)
    return messages


def is_answer(turn: Mapping[str, Any]) -> bool:
    """Whether the assistant says this turn, in whichever of the two notations."""
    return _role_of(turn) == "assistant"


def _role_of(item: Mapping[str, Any]) -> str | None:
    """The role as templates name it; None for one that is not known."""
    named = item.get("role", item.get("from"))
    return _ROLES.get(named.lower()) if isinstance(named, str) else None


def _read_message(item: Any, where: str) -> Message:
    if not isinstance(item, Mapping) or not ("role" in item or {"from", "value"} <= item.keys()):
        raise wrong_kind(where, 'an object with "role" and "content", or "from" and "value"', item)
    key, text = ("role", "content") if "role" in item else ("from", "value")
    role = _role_of(item)
    if role is None:
        raise wrong_kind(f"{where}, {key}", f"one of {', '.join(_ROLES)}", item[key])
    # A Parquet table fills the keys that other messages have with None.
    rest = {k: v for k, v in item.items() if v is not None and k not in (key, text)}
    content = _joined(item.get(text))
    if content is None and "tool_calls" in rest:
        content = ""
    if not isinstance(content, str):
        raise wrong_kind(f"{where}, {text}", "text", content)
    _check_unicode(content, where)
    message = {"role": role, "content": content}
    return {**rest, **message} if key == "role" else message


def _joined(content: Any) -> Any:
    """OpenAI's list of text parts as one text; anything else as it is."""
    if not isinstance(content, list) or not content:
        return content
    texts = [p.get("text") for p in content if isinstance(p, Mapping) and p.get("type") == "text"]
    if len(texts) < len(content) or not all(isinstance(text, str) for text in texts):
        return content
    return "".join(map(str, texts))


def with_system(messages: list[Message], row: Row, options: SftOptions) -> list[Message]:
    """The turns behind the row's own system prompt, or the options'; one that is there stays."""
    system = system_of(row, options)
    if system is None or messages[0]["role"] in ("system", "developer"):
        return messages
    return [{"role": "system", "content": system}, *messages]


def system_of(row: Row, options: SftOptions) -> str | None:
    """The row's own system prompt, or the options'."""
    own = row.get(options.column("system"))
    return own if isinstance(own, str) and own else options.system


def tools_of(row: Row, where: str) -> list[Any] | None:
    """The functions that a row's turns may call: a list, or one written as JSON text.

    Raises:
        DataError: the column `tools` holds something else.
    """
    given = tools = row.get("tools")
    if isinstance(given, str):
        try:
            tools = parse_json(given) if given.strip() else None
        except ValueError as error:
            raise wrong_kind(f"{where}, column 'tools'", _TOOLS, given) from error
    if tools is None:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise wrong_kind(f"{where}, column 'tools'", _TOOLS, given)
    return tools or None


def _text(row: Row, column: str, where: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise wrong_kind(f"{where}, column {column!r}", "text", value)
    _check_unicode(value, f"{where}, column {column!r}")
    return value


def _check_unicode(text: str, where: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            "text with half of a surrogate pair",
            where=where,
            expected="valid Unicode",
            found=f"{text[error.start : error.end]!r} at character {error.start}",
            remedy="write the data again; an emoji was cut in two",
        ) from error


def wrong_kind(where: str, expected: str, found: Any) -> DataError:
    """The error of a value that is not what its column asks for."""
    described = repr(found)
    return DataError(
        "a value of the wrong kind",
        where=where,
        expected=expected,
        found=described if len(described) <= 80 else f"{described[:80]}...",
        remedy="repair or remove this row",
    )
