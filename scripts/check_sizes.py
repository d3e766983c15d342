"""Hold the house limits: a source file of at most 400 lines, a function of at most 50."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 50
ROOT = Path(__file__).parent.parent


def too_long(file: Path) -> Iterator[str]:
    """What in a file is over a limit, one line each.

    A function is counted from `def` to its last line without its docstring: explaining more must
    never be a reason to split.
    """
    text = file.read_text(encoding="utf-8")
    num_lines = len(text.splitlines())
    if num_lines > MAX_FILE_LINES:
        yield f"{file}: {num_lines} lines, at most {MAX_FILE_LINES}"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1 - _docstring_lines(node)
            if length > MAX_FUNCTION_LINES:
                yield (
                    f"{file}:{node.lineno}: {node.name} has {length} lines, "
                    f"at most {MAX_FUNCTION_LINES}"
                )


def _docstring_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    if ast.get_docstring(node, clean=False) is None:
        return 0
    first = node.body[0]
    return (first.end_lineno or first.lineno) - first.lineno + 1


def main(folders: list[str]) -> int:
    """Check every Python file below the folders; returns the exit code."""
    found = [
        line
        for folder in folders
        for file in sorted((ROOT / folder).rglob("*.py"))
        for line in too_long(file)
    ]
    print("\n".join(found) if found else "sizes: all files and functions within the limits")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["src"]))
