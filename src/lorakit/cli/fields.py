"""The table of a configuration's keys."""

from __future__ import annotations

from collections.abc import Sequence

from lorakit.cli import console
from lorakit.train.schema import FieldHelp, plain


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
