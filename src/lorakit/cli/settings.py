"""How rows are read and rendered: the flags, and what an adapter was trained with."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from lorakit.cli.console import note
from lorakit.data.options import SftOptions
from lorakit.data.trained import trained_data
from lorakit.errors import AdapterFileError, RequestError
from lorakit.formats.passport import PASSPORT_NAME

# What decides the prompt; the rest of the data section is about what is learned.
_KEYS = ("columns", "template", "chat_template", "template_options", "system")


def add_row_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare --split, --column and --system."""
    parser.add_argument(
        "--split", metavar="NAME", help="which split of a directory or a hub data set"
    )
    parser.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="ROLE=NAME",
        help="which column plays which role, as in --column prompt=question; may be repeated; by "
        "default as the adapter was trained",
    )
    parser.add_argument(
        "--system",
        metavar="TEXT",
        help="a system turn for rows that have none; by default as the adapter was trained; "
        "'' for none",
    )


def sft_options(args: argparse.Namespace, *, template: str | None, file: bool = True) -> SftOptions:
    """The flags, and where one is not given the value the adapter was trained with.

    Args:
        args: what `add_row_arguments` and `add_model_arguments` declared.
        template: the flag's value; None where it is not given.
        file: whether the rows come from a file, so that columns have a meaning.

    Raises:
        RequestError: a --column that is not ROLE=NAME.
        ConfigError: an unknown role or template.
        AdapterFileError: the adapter's passport cannot be read.
    """
    given: dict[str, Any] = {}
    if args.column:
        given["columns"] = named_columns(args.column)
    if template is not None:
        given["template"] = template
    if args.system is not None:
        given["system"] = args.system or None
    trained = {} if args.adapter is None else trained_settings(args.adapter)
    if not file:
        trained.pop("columns", None)
    if given.get("template") == "none":
        trained.pop("chat_template", None)
    used = {key: value for key, value in trained.items() if key not in given}
    if used:
        shown = ", ".join(
            "a chat template of its own" if key == "chat_template" else f"{key} {_shown(value)}"
            for key, value in used.items()
        )
        note(f"as the adapter was trained: {shown}")
    return SftOptions(**used, **given)


def trained_settings(adapter: str) -> dict[str, Any]:
    """The settings of the prompt in an adapter's passport that are not the defaults.

    Empty for an adapter without a passport, or one that says nothing about its data.

    Raises:
        AdapterFileError: the passport is not JSON.
    """
    path = Path(adapter) / PASSPORT_NAME
    if not path.is_file():
        return {}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterFileError(
            "the passport cannot be understood",
            where=str(path),
            found=str(error),
            remedy="delete the file to load the adapter without its passport",
        ) from error
    data = trained_data(document if isinstance(document, Mapping) else {})
    plain = SftOptions()
    defaults = {field.name: getattr(plain, field.name) for field in fields(plain)}
    return {key: data[key] for key in _KEYS if key in data and data[key] != defaults[key]}


def _shown(value: object) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {item}" for key, item in value.items()) + "}"
    return repr(value)


def named_columns(given: list[str]) -> dict[str, str]:
    """Role -> column of the --column flags.

    Raises:
        RequestError: one that is not ROLE=NAME.
    """
    pairs = [text.partition("=") for text in given]
    for (role, equals, name), text in zip(pairs, given, strict=True):
        if not (role and equals and name):
            raise RequestError(
                "--column needs a role and a name",
                where="the command line",
                expected="ROLE=NAME, as in prompt=question",
                found=text,
            )
    return {role: name for role, _, name in pairs}
