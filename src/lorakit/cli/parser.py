"""The parser of a verb: wrong command lines in house style, defaults said, examples below."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Mapping
from typing import NoReturn

from lorakit.errors import RequestError

# As wide as a terminal is at least.
_LIST_WIDTH = 80


class Formatter(argparse.HelpFormatter):
    """Says the default of every option that has one, and leaves the lines of the examples."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        is_set = action.default is not None and action.default is not False
        if not action.option_strings or not is_set or "default" in text:
            return text
        return (
            text if action.default in ([], argparse.SUPPRESS) else f"{text} (default: %(default)s)"
        )

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(indent + line for line in text.splitlines())


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line as a RequestError, like every other wrong request."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line.

        Raises:
            RequestError: always.
        """
        raise RequestError(
            message,
            where="the command line",
            expected=" ".join(self.format_usage().removeprefix("usage: ").split()),
            remedy=f"see: {self.prog} --help",
        )


def make_parser(verb: str, summary: str, examples: tuple[str, ...]) -> Parser:
    """An empty parser for a verb.

    Args:
        verb: its name.
        summary: what it does, in one line without a full stop.
        examples: command lines that the help ends with; the verb's page is named below them.
    """
    below = ["examples:", *(f"  {line}" for line in examples), "", f"more: docs/{verb}.md"]
    return Parser(
        prog=f"lorakit {verb}",
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog="\n".join(below),
        formatter_class=Formatter,
    )


def add_list_below(parser: argparse.ArgumentParser, title: str, abouts: Mapping[str, str]) -> None:
    """List what an option can be named, one line each, above the examples.

    Args:
        parser: a parser of `make_parser`.
        title: the heading.
        abouts: name -> what it is.
    """
    width = max(map(len, abouts))
    lines = [
        textwrap.fill(
            f"{name:<{width}}  {about}",
            width=_LIST_WIDTH,
            initial_indent="  ",
            subsequent_indent=" " * (width + 4),
        )
        for name, about in abouts.items()
    ]
    parser.epilog = "\n".join([f"{title}:", *lines, "", parser.epilog or ""])
