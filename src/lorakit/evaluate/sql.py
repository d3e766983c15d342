"""SQL that a model wrote: cut it out of the text, run it safely, compare what it returns.

The SQL comes from a language model, so it is hostile until shown otherwise: it runs read-only, with
a bounded number of virtual-machine steps, rows and bytes per value. The bound is in steps and not
in seconds so that the verdict on a query does not depend on how busy the machine is.
"""

from __future__ import annotations

import math
import re
import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from lorakit.errors import DataError, WorkError

Row = tuple[Any, ...]

MAX_STEPS = 20_000_000
MAX_ROWS = 10_000
MAX_VALUE_BYTES = 4_000_000
_HANDLER_EVERY_STEPS = 1_000

_RELATIVE_TOLERANCE = 1e-6
_ABSOLUTE_TOLERANCE = 1e-9

_FENCE = re.compile(r"```[ \t]*\w*[ \t]*\n?(.*?)(?:```|\Z)", re.DOTALL)
# WITH is also an English word: only `WITH name AS` and `WITH name (columns) AS` start a query.
_NAME = r"(?:\w+|\"[^\"]+\"|`[^`]+`|\[[^\]]+\])"
_START = re.compile(
    rf"\b(?:SELECT\b|WITH\s+(?:RECURSIVE\s+)?{_NAME}\s*(?:\([^()]*\)\s*)?AS\b)", re.IGNORECASE
)
_TOKEN = re.compile(
    r"""'(?:[^']|'')*'      # a string
      | "(?:[^"]|"")*"      # a quoted name
      | `[^`]*`
      | \[[^\]]*\]
      | --[^\n]*            # comments
      | /\*.*?(?:\*/|\Z)
      | \w+
      | \s+
      | .""",
    re.VERBOSE | re.DOTALL,
)

_ALLOWED_ACTIONS = frozenset(
    {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
)
_FORBIDDEN_FUNCTIONS = frozenset({"load_extension", "readfile", "writefile", "edit"})


class SqlError(WorkError):
    """A query that could not be run to its end."""


def extract_sql(text: str) -> str:
    """The first query in a model's answer.

    Code fences are stripped (a fence that holds a query wins over the text around it), so is
    everything before the first SELECT or WITH, and the query ends before the first `;` that is not
    in a string, a quoted name or a comment. Text without a query comes back stripped.
    """
    for fenced in _FENCE.finditer(text):
        if _START.search(fenced.group(1)):
            text = fenced.group(1)
            break
    start = _START.search(text)
    if start is None:
        return text.replace("```", "").strip()
    kept: list[str] = []
    for token in _tokens(text[start.start() :].replace("```", "")):
        if token == ";":
            break
        kept.append(token)
    return "".join(kept).strip()


def is_ordered(sql: str) -> bool:
    """Whether the outermost query says ORDER BY: only then does the order of its rows count."""
    depth = 0
    previous = ""
    for token in _tokens(sql):
        if token.isspace() or token.startswith(("--", "/*")):
            continue
        depth += (token == "(") - (token == ")")
        word = token.upper()
        if depth == 0 and previous == "ORDER" and word == "BY":
            return True
        previous = word
    return False


def run_sql(
    database: sqlite3.Connection | str | Path,
    sql: str,
    *,
    max_steps: int = MAX_STEPS,
    max_rows: int = MAX_ROWS,
) -> list[Row]:
    """The rows of one SELECT, run so that it can read but not change anything.

    Args:
        database: an open connection (its authorizer and progress handler are replaced for the call
            and cleared after it), or the path of an SQLite file, which is opened read-only.
        sql: one statement.
        max_steps: instructions of SQLite's virtual machine after which the query is stopped.
        max_rows: a result with more rows than this is an error.

    Raises:
        SqlError: the query is wrong, writes, attaches, or exceeds a limit.
        DataError: the database file is not there or is no SQLite database.
    """
    if isinstance(database, sqlite3.Connection):
        return _run(database, sql, max_steps, max_rows)
    with closing(_open(Path(database))) as connection:
        return _run(connection, sql, max_steps, max_rows)


def same_result(pred_rows: Sequence[Row], gold_rows: Sequence[Row], ordered: bool) -> bool:
    """Whether two results are the same: row by row if `ordered`, else as multisets of rows.

    Numbers agree within 1e-6 (relative) or 1e-9 (absolute), integers exactly; a number never equals
    a text; the names of the columns do not count, their order does.
    """
    if len(pred_rows) != len(gold_rows):
        return False
    if ordered:
        return all(_same_row(a, b) for a, b in zip(pred_rows, gold_rows, strict=True))
    left, right = _buckets(pred_rows), _buckets(gold_rows)
    return left.keys() == right.keys() and all(_same_bag(left[k], right[k]) for k in left)


def _tokens(sql: str) -> Iterator[str]:
    return (match.group() for match in _TOKEN.finditer(sql))


def _open(path: Path) -> sqlite3.Connection:
    if not path.is_file():
        raise DataError(
            "there is no database file here",
            where=str(path),
            expected="an SQLite file",
            remedy="correct the row's `database`, which is relative to the data file",
        )
    try:
        connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
    except sqlite3.Error as error:
        raise DataError(
            "cannot open the database", where=str(path), found=str(error), remedy="check the file"
        ) from error
    try:
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.DatabaseError as error:
        connection.close()
        raise DataError(
            "this file is not an SQLite database",
            where=str(path),
            found=str(error),
            remedy="point the row's `database` at an SQLite file",
        ) from error
    return connection


def _authorize(action: int, _first: str | None, second: str | None, *_: str | None) -> int:
    if action not in _ALLOWED_ACTIONS:
        return sqlite3.SQLITE_DENY
    if action == sqlite3.SQLITE_FUNCTION and second and second.lower() in _FORBIDDEN_FUNCTIONS:
        return sqlite3.SQLITE_DENY
    return sqlite3.SQLITE_OK


@contextmanager
def _guarded(connection: sqlite3.Connection, max_steps: int) -> Iterator[None]:
    calls_left = max(1, max_steps // _HANDLER_EVERY_STEPS)

    def stop() -> bool:
        nonlocal calls_left
        calls_left -= 1
        return calls_left < 0

    old_length = connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_VALUE_BYTES)
    connection.set_progress_handler(stop, _HANDLER_EVERY_STEPS)
    connection.set_authorizer(_authorize)
    try:
        yield
    finally:
        connection.set_authorizer(None)
        connection.set_progress_handler(None, 0)
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, old_length)


def _run(connection: sqlite3.Connection, sql: str, max_steps: int, max_rows: int) -> list[Row]:
    if not sql.strip():
        raise SqlError("the query is empty", expected="one SELECT statement")
    with _guarded(connection, max_steps):
        try:
            with closing(connection.cursor()) as cursor:
                cursor.row_factory = None
                rows: list[Row] = cursor.execute(sql).fetchmany(max_rows + 1)
        # sqlite3.Warning (two statements in one string) is no sqlite3.Error before Python 3.12.
        except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError) as error:
            raise _sql_error(sql, error, max_steps) from error
    if len(rows) > max_rows:
        raise SqlError(
            "the query returns too many rows", where=_shown(sql), expected=f"at most {max_rows:,}"
        )
    return rows


def _sql_error(sql: str, error: BaseException, max_steps: int) -> SqlError:
    text = str(error)
    if text == "interrupted":
        return SqlError(
            "the query was stopped: it takes too long",
            where=_shown(sql),
            expected=f"at most {max_steps:,} steps of SQLite's virtual machine",
        )
    if "not authorized" in text or "prohibited" in text:
        return SqlError(
            "the query was refused: only reading is allowed", where=_shown(sql), found=text
        )
    return SqlError("the query cannot be run", where=_shown(sql), found=text)


def _shown(sql: str) -> str:
    line = " ".join(sql.split())
    return line if len(line) <= 200 else line[:197] + "..."


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _same_value(a: Any, b: Any) -> bool:
    if _is_number(a) and _is_number(b):
        if isinstance(a, int) and isinstance(b, int):
            return a == b
        return math.isclose(a, b, rel_tol=_RELATIVE_TOLERANCE, abs_tol=_ABSOLUTE_TOLERANCE)
    return type(a) is type(b) and a == b


def _same_row(a: Row, b: Row) -> bool:
    return len(a) == len(b) and all(_same_value(x, y) for x, y in zip(a, b, strict=True))


def _buckets(rows: Iterable[Row]) -> dict[Row, list[Row]]:
    """Rows grouped by everything that must agree exactly; numbers are compared inside a group."""
    groups: dict[Row, list[Row]] = defaultdict(list)
    for row in rows:
        # The type is part of the key: in Python b"" != "" already, but a text may read "number".
        key = tuple((0, None) if _is_number(v) else (type(v).__name__, v) for v in row)
        groups[key].append(row)
    return groups


def _same_bag(left: list[Row], right: list[Row]) -> bool:
    if len(left) != len(right):
        return False

    def numbers(row: Row) -> Row:
        return tuple(v for v in row if _is_number(v))

    left, right = sorted(left, key=numbers), sorted(right, key=numbers)
    if all(_same_row(a, b) for a, b in zip(left, right, strict=True)):
        return True
    # Sorting can part rows whose first numbers differ by rounding only: match them one by one.
    rest = list(right)
    for row in left:
        found = next((i for i, other in enumerate(rest) if _same_row(row, other)), None)
        if found is None:
            return False
        rest.pop(found)
    return True
