"""Rows as things to ask a model: questions with their references, and choices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lorakit.data.encode import Example
from lorakit.data.formats import detect_format, is_answer
from lorakit.data.options import SftOptions
from lorakit.data.rows import Origin, Row, Rows
from lorakit.data.sft import build_examples, question_text, reference_text, render_prompt
from lorakit.errors import DataError
from lorakit.evaluate import sql
from lorakit.evaluate.options import EvalOptions


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt and everything that counts as a right answer to it.

    Attributes:
        rows: the indices of its rows in the data.
        origin: where the first of them was read.
        prompt_ids: what the model continues.
        references: right answers, at least one.
        database: the SQLite file that a query is run on, if the task has one.
        reference_results: the rows that each reference returns from it.
        text: what is asked, without the template.
    """

    rows: tuple[int, ...]
    origin: str
    prompt_ids: tuple[int, ...]
    references: tuple[str, ...]
    database: Path | None = None
    reference_results: tuple[list[sql.Row], ...] = ()
    text: str = ""


@dataclass(frozen=True, slots=True)
class Choices:
    """The alternatives of all rows, as examples to score, row after row.

    Attributes:
        examples: one per alternative.
        origins: where each example's row was read.
        texts: the alternatives of each row.
        right: the index of each row's right alternative.
    """

    examples: list[Example]
    origins: list[str]
    texts: list[tuple[str, ...]]
    right: list[int]


def build_questions(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, options: EvalOptions
) -> list[Question]:
    """The questions of a data set, in order of first appearance, at most `options.limit`.

    A row's references are its column `references` (a list of texts) or its answer. For
    sql_execution a row names its `database`, relative to the data file, and its references are run.

    Raises:
        DataError: no rows; a row without a prompt, an answer or a database; a reference query that
            cannot be run.
    """
    _require_rows(rows)
    with_sql = "sql_execution" in options.metrics
    groups: dict[object, list[int]] = {}
    prompts: dict[object, tuple[int, ...]] = {}
    for index, row in enumerate(rows):
        ids = tuple(render_prompt(row, tokenizer, options.sft, where=rows.origin(index)))
        key: object = (ids, row.get("database")) if options.grouped else index
        if key not in groups:
            if options.limit is not None and len(groups) == options.limit:
                if options.grouped:
                    continue  # a later row may still belong to a question that was taken
                break
            groups[key], prompts[key] = [], ids
        groups[key].append(index)
    questions = [_question(rows, chosen, prompts[key], options) for key, chosen in groups.items()]
    return [_with_results(q, rows) for q in questions] if with_sql else questions


def build_choices(rows: Rows, tokenizer: PreTrainedTokenizerBase, options: SftOptions) -> Choices:
    """Every row once for each of its `choices`, with that choice as the answer.

    A choice is scored as training would learn it: behind the rendered prompt, with the end marker,
    so that a choice which is the beginning of another one is not favoured.

    Raises:
        DataError: no rows; a row without `choices`, or whose answer is not one of them.
    """
    _require_rows(rows)
    texts = [_choices_of(row, rows.origin(i)) for i, row in enumerate(rows)]
    right = [_right_choice(row, texts[i], options, rows.origin(i)) for i, row in enumerate(rows)]
    variants: list[Row] = []
    origins: list[Origin] = []
    for index, row in enumerate(rows):
        for number, text in enumerate(texts[index], start=1):
            variants.append(with_answer(row, text, options, where=rows.origin(index)))
            origins.append(Origin(f"{rows.origin(index)}, choice", number))
    # Cutting would score the choices by something else than their text.
    whole = replace(options, completion_only=True, last_turn_only=True, max_length=None)
    data = Rows(variants, origins, rows.source)
    examples = list(build_examples(data, tokenizer, whole, label="tokenising choices"))
    if [example.row for example in examples] != list(range(len(variants))):
        seen = {example.row for example in examples}
        missing = next(i for i in range(len(variants)) if i not in seen)
        raise DataError("a choice has no token to score", where=data.origin(missing))
    return Choices(examples, [data.origin(i) for i in range(len(data))], texts, right)


def with_answer(row: Row, text: str, options: SftOptions, *, where: str) -> Row:
    """A copy of the row that has `text` as its answer.

    Raises:
        DataError: the row fits no format, or is plain text, which has no answer.
    """
    kind = detect_format(list(row), options, where=where)
    if kind == "text":
        raise DataError(
            "plain text has no answer to replace", where=where, expected="rows with a prompt"
        )
    if kind == "prompt-completion":
        plain = isinstance(row[options.column("prompt")], str)
        answer: Any = text if plain else [{"role": "assistant", "content": text}]
        return {**row, options.column("completion"): answer}
    if kind == "instruction-output":
        return {**row, options.column("output"): text}
    column = options.column(kind)
    turns = list(row[column])
    turn = {"role": "assistant", "content": text}
    if "value" in turns[-1]:
        turn = {"from": "gpt", "value": text}
    return {**row, column: [*_without_answer(turns), turn]}


def _without_answer(turns: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return list(turns[:-1] if is_answer(turns[-1]) else turns)


def _question(
    rows: Rows, chosen: list[int], prompt_ids: tuple[int, ...], options: EvalOptions
) -> Question:
    references: list[str] = []
    for index in chosen:
        references += _references_of(rows[index], options.sft, rows.origin(index))
    unique = tuple(dict.fromkeys(references))
    first = chosen[0]
    database = rows[first].get("database")
    path = None if database is None else _database_path(database, rows, first)
    text = question_text(rows[first], options.sft, where=rows.origin(first))
    return Question(tuple(chosen), rows.origin(first), prompt_ids, unique, path, text=text)


def _references_of(row: Row, options: SftOptions, where: str) -> list[str]:
    given = row.get("references")
    if given is None:
        return [reference_text(row, options, where=where)]
    if not isinstance(given, list) or not given or not all(isinstance(r, str) for r in given):
        raise DataError(
            "a row's references are not texts",
            where=f"{where}, column 'references'",
            expected="a list of at least one text",
            found=repr(given)[:80],
        )
    return given


def _database_path(database: Any, rows: Rows, index: int) -> Path:
    if not isinstance(database, str) or not database:
        raise DataError(
            "a row's database is not a path",
            where=f"{rows.origin(index)}, column 'database'",
            expected="the path of an SQLite file, relative to the data file",
            found=repr(database)[:80],
        )
    source = Path(rows.source)
    beside = source if source.is_dir() else source.parent
    return beside / database


def _with_results(question: Question, rows: Rows) -> Question:
    if question.database is None:
        raise DataError(
            "a row without the column 'database'",
            where=question.origin,
            expected="database: the path of an SQLite file, relative to the data file",
            found=f"columns: {', '.join(rows[question.rows[0]])}",
            remedy="add the column, or do not ask for sql_execution",
        )
    results: list[list[sql.Row]] = []
    for reference in question.references:
        try:
            results.append(sql.run_sql(question.database, reference.strip().rstrip(";")))
        except (sql.SqlError, DataError) as error:
            raise DataError(
                f"a reference query cannot be run: {error.what}",
                where=question.origin,
                expected="references that run on the row's database",
                found=error.found or error.where,
                remedy="repair or remove this row",
            ) from error
    return replace(question, reference_results=tuple(results))


def _choices_of(row: Row, where: str) -> tuple[str, ...]:
    given = row.get("choices")
    texts = isinstance(given, list) and all(isinstance(c, str) and c.strip() for c in given)
    if not texts or given is None or len(set(given)) < 2 or len(set(given)) < len(given):
        raise DataError(
            "a row without the column 'choices'" if given is None else "choices that cannot be",
            where=f"{where}, column 'choices'",
            expected="a list of at least two different texts",
            found=f"columns: {', '.join(row)}" if given is None else repr(given)[:80],
            remedy="add the column, or do not ask for choice" if given is None else None,
        )
    return tuple(given)


def _right_choice(row: Row, choices: tuple[str, ...], options: SftOptions, where: str) -> int:
    answer = reference_text(row, options, where=where).strip()
    for index, choice in enumerate(choices):
        if choice.strip() == answer:
            return index
    raise DataError(
        "a row's answer is not one of its choices",
        where=where,
        expected=" | ".join(choices)[:200],
        found=repr(answer[:80]),
    )


def _require_rows(rows: Rows) -> None:
    if not len(rows):
        raise DataError(
            "the data is empty",
            where=rows.source,
            expected="at least one row",
            remedy="check the file, its split and the limit",
        )
