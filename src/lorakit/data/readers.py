"""One reader per file type; each yields (origin, row) and says exactly where a file is broken."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow
import pyarrow.parquet

from lorakit.data.rows import Origin, Row, without_fillers
from lorakit.errors import DataError
from lorakit.files import parse_json

Reader: TypeAlias = Callable[[Path], Iterator[tuple[Origin, Row]]]

# The csv module refuses fields beyond 128 KiB unless told otherwise; documents are longer.
CSV_FIELD_BYTES = 2**31 - 1
# A packed file of megabytes can hold a line of any length: what is longer is refused, not read.
MOST_LINE_BYTES = 2**28
MOST_FILE_BYTES = 2**31

_MAGIC = {
    b"PAR1": "a Parquet file",
    b"\x1f\x8b": "a gzip file",
    b"PK\x03\x04": "a zip archive (or an Excel or Word file)",
    b"SQLite format": "an SQLite database",
    b"%PDF": "a PDF",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}


def read_jsonl(path: Path) -> Iterator[tuple[Origin, Row]]:
    """One JSON object per line; blank lines are skipped.

    Raises:
        DataError: a line is not UTF-8, not JSON or not an object.
    """
    place = f"{path.name} line"
    with _opened(path) as stream:
        for number in itertools.count(1):
            line = stream.readline(MOST_LINE_BYTES + 1)
            if not line:
                return
            if len(line) > MOST_LINE_BYTES:
                raise _too_long(path, f"line {number}", MOST_LINE_BYTES)
            text = _decode_line(line, path, number)
            if text.strip():
                yield Origin(place, number), _json_row(text, path, number)


def read_json(path: Path) -> Iterator[tuple[Origin, Row]]:
    """A JSON list of objects; JSON lines under this name are read as such.

    Raises:
        DataError: the file is not UTF-8, not JSON, or not a list of objects.
    """
    with _opened(path) as stream:
        content = stream.read(MOST_FILE_BYTES + 1)
    if len(content) > MOST_FILE_BYTES:
        raise _too_long(path, "the whole", MOST_FILE_BYTES)
    try:
        value = _parsed(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _not_utf8(path, content, f"byte {error.start}") from error
    except ValueError as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            yield from read_jsonl(path)
            return
        raise DataError(
            "malformed JSON",
            where=str(path),
            expected="a list of objects: [{...}, {...}]",
            found=str(error),
            remedy="repair the file; one object per line belongs in a .jsonl file",
        ) from error
    if not isinstance(value, list):
        raise DataError(
            "a JSON data file must hold a list of objects",
            where=str(path),
            expected="[{...}, {...}]",
            found=_describe(value),
            remedy="write the rows as one list, or one object per line in a .jsonl file",
        )
    for number, row in enumerate(value, start=1):
        if not isinstance(row, dict):
            raise _not_an_object(row, f"{path}, row {number}")
        yield Origin(f"{path.name} row", number), row


def read_csv(path: Path) -> Iterator[tuple[Origin, Row]]:
    """Comma separated text with a header line; every value is a string.

    Raises:
        DataError: no usable header, a row with too many or too few fields, not UTF-8.
    """
    return _read_separated(path, ",")


def read_tsv(path: Path) -> Iterator[tuple[Origin, Row]]:
    """Tab separated text with a header line; every value is a string.

    Raises:
        DataError: no usable header, a row with too many or too few fields, not UTF-8.
    """
    return _read_separated(path, "\t")


def read_parquet(path: Path) -> Iterator[tuple[Origin, Row]]:
    """A Parquet file, read batch by batch.

    Raises:
        DataError: the file is not Parquet, truncated or damaged.
    """
    place = f"{path.name} row"
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            for batch in table.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield Origin(place, number), without_fillers(row)
    except (pyarrow.ArrowException, OSError, ValueError, ArithmeticError) as error:
        # The last two: text that is not UTF-8, dates that Python does not have.
        raise DataError(
            "cannot read this Parquet file",
            where=f"{path}, after row {number}",
            expected="a whole Parquet file",
            found=str(error).splitlines()[0],
            remedy="write or download the file again",
        ) from error


READERS: dict[str, Reader] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
}


def reader_for(path: Path) -> Reader | None:
    """The reader for a file's name (".gz" may follow any text format), or None."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"] and suffixes[-2:-1] != [".parquet"]:
        suffixes.pop()
    return READERS.get(suffixes[-1]) if suffixes else None


@contextmanager
def _opened(path: Path) -> Iterator[io.BufferedReader]:
    """The file's bytes, unpacked if its name ends in .gz; read errors become DataErrors."""
    packed = path.suffix.lower() == ".gz"
    try:
        with path.open("rb") as raw:
            yield io.BufferedReader(gzip.GzipFile(fileobj=raw)) if packed else raw
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            "cannot unpack this file",
            where=str(path),
            expected="a whole gzip file",
            found=str(error),
            remedy="pack or download the file again; without compression, drop .gz from its name",
        ) from error
    except OSError as error:
        raise DataError(
            "cannot read this file", where=str(path), found=str(error), remedy="check the file"
        ) from error


def _decode_line(line: bytes, path: Path, number: int) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, line if number == 1 else b"", f"line {number}") from error


def _parsed(text: str) -> Any:
    """The JSON value, with nothing in it that is no text: half of a surrogate pair can be escaped.

    Raises:
        ValueError: see `lorakit.files.parse_json`.
    """
    value = parse_json(text)
    if "\\ud" in text or "\\uD" in text:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def _json_row(text: str, path: Path, number: int) -> Row:
    where = f"{path}, line {number}"
    try:
        value = _parsed(text)
    except ValueError as error:
        is_list = number == 1 and text.lstrip().startswith("[")
        found = str(error)
        if isinstance(error, json.JSONDecodeError):
            found = f"{_excerpt(text)} ({error.msg}, column {error.colno})"
        raise DataError(
            "malformed JSON line",
            where=where,
            expected="one JSON object per line",
            found=found,
            remedy="a JSON list belongs in a .json file" if is_list else "repair this line",
        ) from error
    if not isinstance(value, dict):
        raise _not_an_object(value, where)
    return value


def _read_separated(path: Path, delimiter: str) -> Iterator[tuple[Origin, Row]]:
    number = 0
    limit = csv.field_size_limit(CSV_FIELD_BYTES)
    try:
        with _opened(path) as stream:
            lines = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
            header = next(reader, None)
            if header is None:
                return
            _check_header(header, path)
            for fields in reader:
                if not fields:
                    continue
                number += 1
                _check_width(fields, header, f"{path}, row {number} (line {reader.line_num})")
                yield (
                    Origin(f"{path.name} row", number),
                    dict(zip(header, fields, strict=True)),
                )
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error.object[:16], f"after row {number}") from error
    except csv.Error as error:
        raise DataError(
            "malformed table",
            where=f"{path}, after row {number}",
            expected=f"fields separated by {delimiter!r}, quoted with double quotes",
            found=str(error),
            remedy="repair the quotes of this row",
        ) from error
    finally:
        csv.field_size_limit(limit)


def _check_header(header: list[str], path: Path) -> None:
    # A first column without a name is an index, as pandas writes it; it plays no role.
    named = header[1:] or header
    if not all(name.strip() for name in named) or len(set(header)) < len(header):
        raise DataError(
            "the header line does not name every column once",
            where=f"{path}, line 1",
            expected="one distinct name per column",
            found=", ".join(repr(name) for name in header),
            remedy="give the file a header line with the names of its columns",
        )


def _check_width(fields: list[str], header: list[str], where: str) -> None:
    if len(fields) != len(header):
        few = len(fields) < len(header)
        raise DataError(
            f"a row with too {'few' if few else 'many'} fields",
            where=where,
            expected=f"{len(header)} fields: {', '.join(header)}",
            found=f"{len(fields)} fields: {_excerpt(', '.join(fields))}",
            remedy="put text that holds the separator or a line break in double quotes",
        )


def _too_long(path: Path, what: str, limit: int) -> DataError:
    return DataError(
        "this JSON is too long to be read at once",
        where=f"{path}, {what}",
        expected=f"at most {limit:,} bytes",
        remedy="write one row per line, or Parquet",
    )


def _not_utf8(path: Path, head: bytes, place: str) -> DataError:
    kind = next((name for magic, name in _MAGIC.items() if head.startswith(magic)), None)
    return DataError(
        "the file is not UTF-8 text",
        where=f"{path}, {place}",
        expected="UTF-8",
        found=kind or "bytes that are not UTF-8",
        remedy="give the file the name of what it is" if kind else "save the file as UTF-8",
    )


def _not_an_object(value: Any, where: str) -> DataError:
    return DataError(
        "a row must be a JSON object",
        where=where,
        expected='an object such as {"prompt": "...", "completion": "..."}',
        found=_describe(value),
        remedy="write each row as an object whose keys are the columns",
    )


def _describe(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    kind = kinds.get(type(value), "null" if value is None else "a number")
    return f"{kind}: {_excerpt(json.dumps(value, ensure_ascii=False))}"


def _excerpt(text: str, length: int = 60) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[:length]}..."
