"""What the help says: every verb in a group, every option explained, examples that parse."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator

import pytest

from lorakit.cli import main
from lorakit.cli.verbs import EXAMPLES, GROUPS, VERBS

WIDTHS = (80, 120)


def options(verb: str) -> Iterator[argparse.Action]:
    """Every argument of a verb but --help."""
    for action in main.build_parser(verb)._actions:
        if action.dest != "help":
            yield action


def test_every_verb_stands_in_one_group():
    grouped = [verb for verbs in GROUPS.values() for verb in verbs]
    assert sorted(grouped) == sorted(VERBS)


def test_the_overview_names_the_groups_and_the_way_on(capsys):
    assert main.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line in GROUPS] == list(GROUPS), out
    assert "lorakit demo" in out
    assert "Exit codes" in out
    assert max(map(len, out.splitlines())) <= min(WIDTHS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_argument_says_what_it_is(verb):
    for action in options(verb):
        name = "/".join(action.option_strings) or action.dest
        assert action.help, f"{verb} {name}: no help"
        if action.option_strings and action.nargs != 0 and action.choices is None:
            assert action.metavar, f"{verb} {name}: no metavar"


@pytest.mark.parametrize("verb", VERBS)
def test_a_default_is_said(verb, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    parser = main.build_parser(verb)
    for action in options(verb):
        unset = action.default is None or action.default is False or action.default == []
        if action.option_strings and action.dest != "help" and not unset:
            formatter = parser._get_formatter()
            formatter.add_argument(action)
            told = formatter.format_help()
            assert "default" in told, told
            assert str(action.default) in told or "%" not in (action.help or ""), told


@pytest.mark.parametrize("verb", VERBS)
def test_examples_stand_in_the_help_and_parse(verb, capsys):
    assert main.main([verb, "--help"]) == 0
    out = capsys.readouterr().out
    assert EXAMPLES[verb]
    for example in EXAMPLES[verb]:
        assert f"  {example}\n" in out
        words = shlex.split(example)
        assert words[:2] == ["lorakit", verb]
        main.build_parser(verb).parse_intermixed_args(words[2:])
    assert f"docs/{verb}.md" in out


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("verb", VERBS)
def test_the_help_keeps_to_the_width(verb, width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    lines = main.build_parser(verb).format_help().splitlines()
    # A list of choices cannot be broken.
    assert [line for line in lines if len(line) > width and "{" not in line] == []
