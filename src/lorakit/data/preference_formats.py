"""The shapes that preferences come in: pairs of answers, and answers with a verdict.

A prompt is a text, turns, or an instruction; an answer is a text, a turn, or turns. Where there is
no prompt column, `chosen` and `rejected` are whole conversations, and the turns that both begin
with are the prompt: turns, or one text in which "Human:" and "Assistant:" begin paragraphs, as in
Anthropic's hh-rlhf.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lorakit.data.formats import (
    Content,
    Dialogue,
    Message,
    Pair,
    detect_format,
    read_alpaca,
    read_content,
    read_messages,
    system_of,
    tools_of,
    with_system,
    wrong_kind,
)
from lorakit.data.options import SftOptions
from lorakit.data.rows import Row
from lorakit.errors import DataError

CHOSEN, REJECTED, LABEL = "chosen", "rejected", "label"
# A table without types (csv) has its verdicts as text.
_VERDICTS = {"true": True, "1": True, "false": False, "0": False}
_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_PROMPTS = ("prompt", "messages", "conversations", "instruction")


def has_pairs(row: Row, options: SftOptions) -> bool:
    """Whether rows like this one have a chosen and a rejected answer."""
    return options.column(CHOSEN) in row and options.column(REJECTED) in row


def read_pair(row: Row, options: SftOptions, where: str) -> tuple[Content, Content]:
    """A row's prompt with its chosen and with its rejected answer.

    Raises:
        DataError: a column is missing or holds something else than it should.
    """
    for role in (CHOSEN, REJECTED):
        if options.column(role) not in row:
            raise _missing(row, options.column(role), where)
    chosen, rejected = row[options.column(CHOSEN)], row[options.column(REJECTED)]
    prompt = next((role for role in _PROMPTS if options.column(role) in row), None)
    if prompt is None:
        pair = _implicit_prompt(row, options, where)
    else:
        read = _read_prompt(row, prompt, options, where)
        pair = (
            _answered(read, chosen, row, options, f"{where}, column {options.column(CHOSEN)!r}"),
            _answered(
                read, rejected, row, options, f"{where}, column {options.column(REJECTED)!r}"
            ),
        )
    tools = tools_of(row, where)
    one, other = (
        replace(content, tools=tools) if isinstance(content, Dialogue) else content
        for content in pair
    )
    return one, other


def read_single(row: Row, options: SftOptions, where: str) -> Content:
    """A row's prompt with its answer, in any format of supervised fine-tuning but plain text.

    Raises:
        DataError: the row fits no format, or is plain text.
    """
    kind = detect_format(list(row), options, where=where)
    if kind == "text":
        raise wrong_kind(where, "a prompt and an answer", "plain text")
    return read_content(row, kind, options, where=where)


def read_verdict(
    row: Row, options: SftOptions, where: str, *, desirable_from: float | None = None
) -> bool:
    """Whether a row's answer is desirable.

    Args:
        row: says so with true or false, or 1 or 0.
        options: they name the column.
        where: the row's place.
        desirable_from: the row has a number instead; this one and larger ones are desirable.

    Raises:
        DataError: it says neither.
    """
    column = options.column(LABEL)
    if column not in row:
        raise _missing(row, column, where)
    value = row[column]
    if desirable_from is not None:
        rating = _as_number(value)
        is_number = isinstance(rating, int | float) and not isinstance(rating, bool)
        if is_number and math.isfinite(rating):
            return rating >= desirable_from
        raise wrong_kind(f"{where}, column {column!r}", "a number, to be rated by", value)
    if isinstance(value, str):
        value = _VERDICTS.get(value.strip().lower(), value)
    if isinstance(value, bool) or value in (0, 1):
        return bool(value)
    error = wrong_kind(f"{where}, column {column!r}", "true or false", value)
    if isinstance(_as_number(value), int | float):
        error.remedy = "a rating: say from which on an answer is good, preference.desirable_from"
    raise error


def _as_number(value: Any) -> Any:
    """A number that a file without types (csv) gives as text; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def _read_prompt(row: Row, role: str, options: SftOptions, where: str) -> Pair | list[Message]:
    column = options.column(role)
    value = row[column]
    if role == "instruction":
        return replace(read_alpaca(row, options, where), completion=None)
    if role == "prompt" and isinstance(value, str):
        return Pair(value, value, None, system_of(row, options))
    messages = read_messages(value, f"{where}, column {column!r}")
    return with_system(messages, row, options)


def _answered(
    prompt: Pair | list[Message], answer: Any, row: Row, options: SftOptions, where: str
) -> Content:
    if isinstance(prompt, Pair):
        if isinstance(answer, str):
            return replace(prompt, completion=answer)
        turns = _turns(answer, where)
        if _is_whole(turns):  # the whole conversation, prompt included
            return Dialogue(with_system(turns, row, options))
        first: Message = {"role": "user", "content": prompt.prompt}
        return Dialogue(with_system([first, *turns], row, options))
    turns = _turns(answer, where)
    if _is_whole(turns):
        turns = with_system(turns, row, options)
        if turns[: len(prompt)] != prompt:
            raise wrong_kind(where, "an answer, or the prompt's turns and an answer", answer)
        return Dialogue(turns, first_learned=len(prompt))
    return Dialogue([*prompt, *turns], first_learned=len(prompt))


def _is_whole(turns: list[Message]) -> bool:
    """Whether turns are a conversation from its beginning, and not an answer (with its tools)."""
    return turns[0]["role"] in ("system", "developer", "user")


def _implicit_prompt(row: Row, options: SftOptions, where: str) -> tuple[Content, Content]:
    conversations: list[list[Message]] = []
    for role in (CHOSEN, REJECTED):
        column = options.column(role)
        said = row[column]
        turns = _transcript(said) if isinstance(said, str) else said
        if turns is None:
            raise DataError(
                "answers without a prompt",
                where=where,
                expected=f"a column {', '.join(map(options.column, _PROMPTS))}, or whole "
                f"conversations in {options.column(CHOSEN)!r} and {options.column(REJECTED)!r}",
                found=f"columns: {', '.join(row)}",
                remedy="name your prompt's column: columns: {prompt: ...}",
            )
        conversations.append(_turns(turns, f"{where}, column {column!r}"))
    chosen, rejected = (with_system(turns, row, options) for turns in conversations)
    shared = 0
    for one, other in zip(chosen[:-1], rejected[:-1], strict=False):
        if one != other:
            break
        shared += 1
    return Dialogue(chosen, first_learned=shared), Dialogue(rejected, first_learned=shared)


def _transcript(text: str) -> list[Message] | None:
    """The turns of a conversation in one text; None where it does not begin with a speaker."""
    before, *rest = _SPEAKER.split(text.lstrip("\n"))
    if before or not rest:
        return None
    roles = {"Human": "user", "Assistant": "assistant"}
    pairs = zip(rest[::2], rest[1::2], strict=True)
    return [{"role": roles[speaker], "content": said.strip()} for speaker, said in pairs]


def _turns(answer: Any, where: str) -> list[Message]:
    """An answer as turns that end with the assistant's."""
    if isinstance(answer, str):
        return [{"role": "assistant", "content": answer}]
    if answer is None:
        raise wrong_kind(where, "an answer: a text, a turn or turns", answer)
    items = [answer] if isinstance(answer, Mapping) else answer
    turns = read_messages(items, where)
    if turns[-1]["role"] != "assistant":
        raise wrong_kind(where, "an answer: an assistant's turn at the end", turns[-1]["role"])
    return turns


def _missing(row: Row, column: str, where: str) -> DataError:
    return DataError(
        f"a row without the column {column!r}",
        where=where,
        expected=f"the column {column!r}",
        found=f"columns: {', '.join(row) or 'none'}",
        remedy="repair or remove this row, or name your columns: columns: {...}",
    )
