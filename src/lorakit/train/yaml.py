"""Read YAML as people mean it: 1e-4 is a number, a key given twice is an error."""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from lorakit.errors import ConfigError, nearest

# The key "<<": the keys of its mapping, where they are not given beside it.
_MERGE = "tag:yaml.org,2002:merge"


class _DuplicateKeyError(yaml.MarkedYAMLError):
    pass


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 floats and without silently overwritten keys."""

    # As the file has it: construction unfolds "<<", whose keys may be given again beside it.
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == _MERGE:
                continue
            key = self.construct_object(key_node)
            if key in seen:
                raise _DuplicateKeyError(
                    problem=f"the key {key!r} is given twice", problem_mark=key_node.start_mark
                )
            seen.add(key)
        return node


# YAML 1.1 asks for a dot in a float, so PyYAML reads 1e-4 as the text "1e-4".
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def parse_value(text: str, *, where: str) -> Any:
    """The YAML value of an override's right-hand side.

    Raises:
        ConfigError: the text is not YAML.
    """
    return _load(text, where=where)


def read_mapping(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: the file is missing, is not text, is not YAML or is not a mapping.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(
            "the config file does not exist", where=str(path), remedy=_nearest_file(path)
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            "the config file cannot be read",
            where=str(path),
            expected="a YAML text file",
            found=str(error),
        ) from error
    value = _load(text, where=str(path))
    if not isinstance(value, dict):
        raise ConfigError(
            "the config file is not a mapping",
            where=str(path),
            expected="lines of `key: value`",
            found="an empty file" if value is None else type(value).__name__,
        )
    return value


def _nearest_file(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"there is no directory {folder}"
    files = [file.name for file in folder.iterdir() if file.suffix in (".yaml", ".yml")]
    close = nearest(path.name, files)
    if close:
        return "did you mean " + " or ".join(str(folder / name) for name in close) + "?"
    listed = ", ".join(sorted(files)[:4])
    return f"the YAML files there: {listed}" if listed else f"there is no YAML file in {folder}"


def dump(value: dict[str, Any]) -> str:
    """YAML text that `read_mapping` reads back, in the order of the mapping."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)


def _load(text: str, *, where: str) -> Any:
    try:
        value = yaml.load(text, Loader=_Loader)
        _require_finite(value)
    except _BROKEN as error:
        raise ConfigError(
            "this YAML has a value that cannot be", where=where, found=_first_line(error)
        ) from error
    except yaml.YAMLError as error:
        mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
        problem = error.problem if isinstance(error, yaml.MarkedYAMLError) else str(error)
        raise ConfigError(
            "this is not YAML",
            where=where if mark is None else f"{where}, line {mark.line + 1}",
            found=problem,
        ) from error
    return value


# What PyYAML lets through: dates that do not exist, numbers of thousands of digits, deep nesting.
_BROKEN = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
_MOST_VALUES = 100_000


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _require_finite(value: Any) -> None:
    """Refuse aliases that unfold without end, or to more than any config is.

    Raises:
        ValueError: too many values.
    """
    waiting, count = [value], 0
    while waiting:
        found = waiting.pop()
        count += 1
        if count > _MOST_VALUES:
            raise ValueError(f"its aliases unfold to more than {_MOST_VALUES:,} values")
        if isinstance(found, dict):
            waiting += [*found.keys(), *found.values()]
        elif isinstance(found, (list, tuple, set)):
            waiting += found
