"""A configuration on the command line: its words, and the table of its keys."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lorakit.cli import console
from lorakit.errors import RequestError
from lorakit.train.schema import FieldHelp, plain


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The files and the overrides of "CONFIG.yaml key=value ..."."""
    # A path may have "=" in it too: runs/lr=0.1/config.yaml.
    is_file = [
        "=" not in word or (word.endswith((".yaml", ".yml")) and Path(word).is_file())
        for word in words
    ]
    pairs = list(zip(words, is_file, strict=True))
    return [word for word, yes in pairs if yes], [word for word, yes in pairs if not yes]


def at_most_one_file(words: Sequence[str], *, verb: str) -> tuple[str | None, list[str]]:
    """The file, if there is one, and the overrides.

    Raises:
        RequestError: more than one file, or no word at all.
    """
    files, overrides = split_words(words)
    if not words or len(files) > 1:
        raise _one_config(files, verb)
    return (files[0] if files else None), overrides


def one_file(words: Sequence[str], *, verb: str) -> tuple[str, list[str]]:
    """The file and the overrides.

    Raises:
        RequestError: not exactly one file.
    """
    files, overrides = split_words(words)
    if len(files) != 1:
        raise _one_config(files, verb)
    return files[0], overrides


def _one_config(files: Sequence[str], verb: str) -> RequestError:
    return RequestError(
        "one config is needed",
        where="the command line",
        expected="CONFIG.yaml, then key=value for what should differ",
        found=", ".join(files) or "nothing",
        remedy=f"list all keys with: lorakit {verb} --fields",
    )


def show_fields(title: str, fields: Sequence[FieldHelp], *, as_json: bool) -> None:
    """Print every key with its type, default and meaning."""
    if as_json:
        console.print_json(
            [
                {
                    "name": field.name,
                    "type": field.type,
                    "required": field.required,
                    "default": None if field.required else plain(field.default),
                    "help": field.help,
                }
                for field in fields
            ]
        )
        return
    table = console.table(title, ["key", "type", "default", "meaning"])
    for field in fields:
        default = "required" if field.required else str(plain(field.default))
        table.add_row(field.name, field.type, default, field.help)
    console.stdout().print(table)
