"""What the command line prints: results on stdout, everything else on stderr, one look."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lorakit.errors import LorakitError

# Wide enough for a table in a log file, where there is no terminal to ask.
_PLAIN_WIDTH = 110

_json_stream: TextIO | None = None


def stdout() -> Console:
    """The console for results."""
    return _console(sys.stdout)


def stderr() -> Console:
    """The console for progress, notes, warnings and errors."""
    return _console(sys.stderr)


def note(text: str) -> None:
    """One plain line to stderr about what is going on."""
    _say(f"[dim]{escape(text)}[/dim]")


def warn(text: str) -> None:
    """One warning to stderr."""
    _say(f"[bold yellow]warning:[/] {escape(text)}")


def _say(markup: str) -> None:
    # A log that takes no more (a full disk, a closed pipe) does not end the work.
    with suppress(OSError):
        stderr().print(markup, highlight=False)


def print_error(error: LorakitError) -> None:
    """An error to stderr: what is wrong, then where, expected, found and the remedy in a column."""
    console = stderr()
    console.print(f"[bold red]error:[/] [bold]{escape(error.what)}[/]", highlight=False)
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, value in error_fields(error).items():
        if label != "what":
            style = "green" if label == "remedy" else ""
            grid.add_row(f"  {label}", Text(value, style=style))
    if grid.row_count:
        console.print(grid, highlight=False)


def error_fields(error: LorakitError) -> dict[str, str]:
    """The fields of an error that are set, in reading order."""
    fields = {
        "what": error.what,
        "where": error.where,
        "expected": error.expected,
        "found": error.found,
        "remedy": error.remedy,
    }
    return {label: value for label, value in fields.items() if value}


def table(title: str | None, columns: Sequence[str], *, numbers: Iterable[str] = ()) -> Table:
    """An empty table in the house style; the columns named in `numbers` are set flush right."""
    right = set(numbers)
    made = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        header_style="dim",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made


def print_facts(title: str | None, facts: Mapping[str, object]) -> None:
    """Names and values in two columns, under a title."""
    console = stdout()
    if title:
        console.print(f"[bold]{escape(title)}[/]", highlight=False)
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, value in facts.items():
        grid.add_row(f"  {label}", Text(str(value)))
    console.print(grid, highlight=False)


def print_text(text: str) -> None:
    """A result as it is: no markup, no colours, no wrapping."""
    print(text, file=sys.stdout, flush=True)


def print_json(value: Any) -> None:
    """A result object as JSON on stdout."""
    stream = _json_stream or sys.stdout
    print(json.dumps(value, indent=2, ensure_ascii=False), file=stream, flush=True)


@contextmanager
def only_json() -> Iterator[None]:
    """In this block stdout carries what `print_json` writes; all other prints go to stderr."""
    global _json_stream
    before, _json_stream = _json_stream, sys.stdout
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _json_stream = before


def _console(stream: TextIO) -> Console:
    # Made when needed: tests and only_json() exchange the streams.
    console = Console(file=stream)
    return console if console.is_terminal else Console(file=stream, width=_PLAIN_WIDTH)
