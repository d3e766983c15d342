"""The documentation says what the code does: commands parse, keys exist, links resolve."""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import inspect
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import lorakit as lk
from lorakit.cli import main as cli
from lorakit.compare.config import CompareConfig
from lorakit.evaluate.options import EvalOptions
from lorakit.sweep.arms import make_arms
from lorakit.sweep.config import SweepConfig
from lorakit.train.config import TrainConfig
from lorakit.train.overrides import apply_overrides
from lorakit.train.yaml import parse_value

ROOT = Path(__file__).parents[2]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s#]*)(#[^)\s]*)?\)")
REQUIRED: dict[str, Any] = {"model": "m", "data": {"train": "rows.jsonl"}, "output": "out"}


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language ("" for those that name none)."""
    text = page.read_text(encoding="utf-8")
    return [body for name, body in FENCE.findall(text) if name == language]


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every `lorakit ...` line, without pipes and comments."""
    given = [
        block for language in ("", "sh", "bash", "console") for block in blocks(page, language)
    ]
    lines = "\n".join(given).replace("\\\n", " ").splitlines()
    lines += [
        line for block in blocks(page, "text") for line in block.splitlines() if line[:1] == "$"
    ]
    for line in lines:
        words = shlex.split(line.removeprefix("$ "), comments=True)
        stop = next((i for i, word in enumerate(words) if word in ("|", ">", "&&")), None)
        if words[:1] and words[0].endswith("lorakit"):
            yield words[1:stop]


def parsed(words: list[str]) -> argparse.Namespace:
    """A command line read by the verb's own parser; a wrong one is a RequestError."""
    parser = cli.build_parser(words[0])
    return parser.parse_intermixed_args(words[1:])


ALL_COMMANDS = [(page, words) for page in PAGES for words in commands(page)]
PYTHON = [(page, block) for page in PAGES for block in blocks(page, "python")]
YAML = [(page, block) for page in PAGES for block in blocks(page, "yaml")]


def name_of(value: object) -> str:
    return value.stem if isinstance(value, Path) else " ".join(str(value).split())[:40]


@pytest.mark.parametrize(("page", "words"), ALL_COMMANDS, ids=name_of)
def test_command_lines_parse(page: Path, words: list[str]) -> None:
    if words[0] in ("--version", "--help", "help"):
        return
    args = parsed(words)
    if words[0] in ("train", "doctor"):
        overrides = [word for word in args.config if "=" in word]
        TrainConfig.from_dict(apply_overrides(TrainConfig, REQUIRED, overrides))
    if words[0] == "eval" and args.metrics is not None:
        EvalOptions(metrics=tuple(args.metrics.split(",")))


@pytest.mark.parametrize(("page", "block"), YAML, ids=name_of)
def test_yaml_keys_are_keys_of_the_config(page: Path, block: str) -> None:
    values = parse_value(block, where=page.name)
    if "methods" in values:
        CompareConfig.from_dict(values)
        return
    if "sweep" in values:
        make_arms(SweepConfig.from_dict(values))
        return
    TrainConfig.from_dict({**REQUIRED, **values})


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_verbs_in_the_text_exist(page: Path) -> None:
    named = re.findall(r"`lorakit ([a-z]+)", page.read_text(encoding="utf-8"))
    assert set(named) <= {*cli.VERBS, "help"}


def test_every_verb_has_a_page_that_shows_it() -> None:
    for verb in cli.VERBS:
        page = ROOT / "docs" / f"{verb}.md"
        assert [w for w in commands(page) if w[0] == verb], page.name
        assert blocks(page, "python"), page.name


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_resolve(page: Path) -> None:
    for target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        if target.startswith(("http:", "https:", "mailto:")):
            continue
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor.removeprefix("#") in anchors(file), f"{page.name}: {target}{anchor}"


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


@pytest.mark.parametrize(("page", "block"), PYTHON, ids=name_of)
def test_python_names_exist(page: Path, block: str) -> None:
    tree = ast.parse(block)
    known: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lorakit"):
            module = importlib.import_module(str(node.module))
            known |= {alias.name: getattr(module, alias.name) for alias in node.names}
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "lk":
            assert node.attr in lk.__all__, f"{page.name}: lk.{node.attr}"
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        function = called(call.func, known)
        if function is not None:
            accepted = inspect.signature(function).parameters
            named = {keyword.arg for keyword in call.keywords if keyword.arg is not None}
            assert named <= set(accepted), f"{page.name}: {ast.unparse(call)}"


def called(function: ast.expr, known: dict[str, Any]) -> Callable[..., Any] | None:
    """The lorakit function behind `lk.name` or an imported name, else None."""
    if isinstance(function, ast.Name):
        return known.get(function.id)
    if isinstance(function, ast.Attribute) and ast.unparse(function.value) == "lk":
        return getattr(lk, function.attr)
    return None


def test_the_config_reference_is_current() -> None:
    script = ROOT / "scripts" / "write_config_reference.py"
    found = importlib.util.spec_from_file_location("write_config_reference", script)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    committed = (ROOT / "docs" / "training-config.md").read_text(encoding="utf-8")
    assert committed == module.page(), "run: python scripts/write_config_reference.py"


def test_the_reproduction_page_is_current() -> None:
    script = ROOT / "scripts" / "write_reproduction.py"
    found = importlib.util.spec_from_file_location("write_reproduction", script)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    committed = (ROOT / "docs" / "reproduction.md").read_text(encoding="utf-8")
    assert committed == module.page(), "run: python scripts/write_reproduction.py"


def test_there_is_something_to_check() -> None:
    assert len(ALL_COMMANDS) > 20
    assert len(YAML) >= 3
    assert len(PYTHON) > 10
