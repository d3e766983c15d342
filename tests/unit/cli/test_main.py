from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import types
import warnings

import pytest

from lorakit.cli import console, main
from lorakit.errors import LorakitWarning, TrainingError


@pytest.fixture
def verb(monkeypatch):
    """A verb whose run() is the test's own function."""

    def install(run):
        module = types.ModuleType("tests_fake_verb")
        module.add_arguments = lambda parser: parser.add_argument("words", nargs="*")
        module.run = run
        monkeypatch.setitem(sys.modules, "tests_fake_verb", module)
        monkeypatch.setitem(main.VERBS, "fake", ("tests_fake_verb", "a verb for the tests"))

    return install


def test_help_lists_every_verb_in_half_a_second_without_the_tensor_libraries():
    code = (
        "import sys; from lorakit.cli.main import main; code = main(['--help']);"
        "heavy = {'torch', 'transformers', 'datasets', 'matplotlib', 'numpy'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    before = os.times()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    after = os.times()
    assert done.returncode == 0, done.stderr
    for name in main.VERBS:
        assert f"  {name} " in done.stdout
    # Processor time: other work on the machine must not fail this.
    user_s = after.children_user - before.children_user
    assert user_s + after.children_system - before.children_system < 0.5


def test_version(capsys):
    assert main.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("lorakit ")


def test_no_arguments_show_the_overview_and_are_a_wrong_request(capsys):
    assert main.main([]) == 2
    assert "usage: lorakit VERB" in capsys.readouterr().err


def test_an_unknown_verb_names_the_nearest(capsys):
    assert main.main(["tarin"]) == 2
    assert "did you mean: lorakit train" in capsys.readouterr().err


def test_a_missing_argument_is_a_wrong_request_in_house_style(capsys):
    assert main.main(["report"]) == 2
    err = capsys.readouterr().err
    assert "error: the following arguments are required: directory" in err
    assert "see: lorakit report --help" in err


def test_an_unknown_option_is_a_wrong_request_also_in_json(capsys):
    assert main.main(["report", ".", "--colour", "--json"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["type"] == "RequestError"
    assert "--colour" in error["what"]


@pytest.mark.parametrize("words", [["help", "report"], ["report", "--help"]])
def test_help_of_a_verb(capsys, words):
    assert main.main(words) == 0
    assert "usage: lorakit report" in capsys.readouterr().out


def test_arguments_may_be_mixed_with_options(verb):
    seen = []
    verb(lambda args: seen.append(args.words) or 0)
    assert main.main(["fake", "a", "--json", "b"]) == 0
    assert seen == [["a", "b"]]


def fail(args):
    raise TrainingError(
        "the loss is [bold]nan[/]", where="step 7", expected="finite", remedy="lower lr"
    )


def test_an_error_is_printed_with_its_fields_and_its_exit_code(verb, capsys):
    verb(fail)
    assert main.main(["fake"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    # Markup in the text stays text.
    assert "error: the loss is [bold]nan[/]" in err
    for label, value in (("where", "step 7"), ("expected", "finite"), ("remedy", "lower lr")):
        assert any(label in line and value in line for line in err.splitlines())


def test_an_error_with_json_is_an_object_on_stdout(verb, capsys):
    verb(fail)
    assert main.main(["fake", "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == {
        "error": {
            "type": "TrainingError",
            "what": "the loss is [bold]nan[/]",
            "where": "step 7",
            "expected": "finite",
            "remedy": "lower lr",
        }
    }


def test_with_json_stdout_carries_the_result_and_nothing_else(verb, capsys):
    def run(args):
        print("a library that prints")
        console.print_text("a line for people")
        console.print_json({"n": 1, "text": "é"})
        return 0

    verb(run)
    assert main.main(["fake", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"n": 1, "text": "é"}
    assert "a library that prints" in err
    print("afterwards")
    assert capsys.readouterr().out == "afterwards\n"


def test_ctrl_c_is_one_line_and_130(verb, capsys):
    def run(args):
        raise KeyboardInterrupt

    verb(run)
    assert main.main(["fake"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_an_unexpected_error_keeps_its_traceback(verb):
    def run(args):
        raise ZeroDivisionError("a bug")

    verb(run)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        main.main(["fake"])


def test_our_warnings_are_one_line_and_others_stay_as_they_are(verb, capsys):
    def run(args):
        warnings.simplefilter("always")
        warnings.warn("r is large", LorakitWarning, stacklevel=1)
        warnings.warn("something else", UserWarning, stacklevel=1)
        return 0

    verb(run)
    # pytest records what reaches Python's own way of showing a warning.
    with pytest.warns(UserWarning, match="something else") as recorded:
        assert main.main(["fake"]) == 0
    assert [str(warning.message) for warning in recorded] == ["something else"]
    assert capsys.readouterr().err == "warning: r is large\n"


def test_a_reader_that_leaves_is_not_an_error_with_a_traceback():
    code = (
        "import sys, types; from lorakit.cli import main;"
        "module = types.ModuleType('fake'); module.add_arguments = lambda parser: None;"
        "module.run = lambda args: [print('x' * 80) for _ in range(100000)] and 0;"
        "sys.modules['fake'] = module; main.VERBS['fake'] = ('fake', 'fake');"
        "sys.exit(main.main(['fake']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 1


@pytest.mark.parametrize(("num", "code"), [("2", 2), ("1", -signal.SIGABRT)])
def test_one_of_several_processes_ends_before_a_thread_of_torch_can_take_it_down(num, code):
    # What a thread of gloo does in the middle of Python's shutdown: abort.
    program = """
import atexit, os, sys
class Late:
    def __del__(self): os.abort()
late = Late()
atexit.register(print, "what was registered for the end")
from lorakit.cli.main import main
sys.argv = ["lorakit", "--no-such-option"]
raise SystemExit(main())
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "WORLD_SIZE": num},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert "no-such-option" in done.stderr
    assert "what was registered for the end" in done.stdout
