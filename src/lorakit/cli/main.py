"""The entry point: find the verb, parse, run, and turn every outcome into an exit code.

Exit codes: 0 done, 1 the work failed, 2 the request was wrong, 130 interrupted.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import importlib.metadata
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Protocol, TextIO, cast

from lorakit.cli import console
from lorakit.cli.parser import make_parser
from lorakit.cli.verbs import EXAMPLES, GROUPS, VERBS
from lorakit.errors import LorakitError, LorakitWarning, RequestError, WorkError, nearest
from lorakit.launcher import FailedElsewhereError, failed_elsewhere, leave, num_launched, speaks
from lorakit.pages import use_huge_pages

INTERRUPTED = 130
# Verbs that a launcher may start in several processes.
_IN_PROCESSES = ("train",)
# Set before torch is imported; see `lorakit.pages`.
_TRAINING = ("compare", "demo", "paper", "sweep", "train")
# Of what is printed; files say so themselves.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Verb(Protocol):
    """What the module of a verb offers."""

    SUMMARY: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the verb's arguments; --json is already there."""
        ...

    def run(self, args: argparse.Namespace) -> int:
        """Do the work and print the result; returns the exit code."""
        ...


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code.

    Args:
        argv: the arguments without the program's name; by default the process's own, which ends
            here where a launcher started several.
    """
    if argv is not None:
        return _exit_code(list(argv))
    code = _exit_code(sys.argv[1:])
    leave(code)
    return code


def _exit_code(words: list[str]) -> int:
    as_json = "--json" in words
    try:
        return _dispatch(words, as_json)
    except LorakitError as error:
        return _failed(error, as_json)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (head, less) has gone. Without this, Python complains again when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        found = f"{os.strerror(error.errno)}: {error.filename or 'stdout'}"
        return _failed(WorkError("what is written has no room", found=found), as_json=False)
    except SystemExit as leaving:
        # argparse leaves like this after --help.
        return leaving.code if isinstance(leaving.code, int) else 0


def _dispatch(words: list[str], as_json: bool) -> int:
    if words[:1] == ["help"]:
        words = [*words[1:], "--help"]
    if not words:
        print(_overview(), file=sys.stderr)
        return RequestError.exit_code
    if words[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if words[0] in ("-V", "--version"):
        print(f"lorakit {importlib.metadata.version('lorakit')}")
        return 0
    return _run_verb(words[0], words[1:], as_json)


def _run_verb(name: str, words: list[str], as_json: bool) -> int:
    _require_processes(name)
    if name in _TRAINING:
        use_huge_pages()
    parser = build_parser(name)
    # Intermixed: `train config.yaml lr=1e-3 --resume epochs=2` is natural and must work.
    args = parser.parse_intermixed_args(words)
    verb = _module_of(name)
    with _warnings_in_style(), console.only_json() if as_json else nullcontext():
        return verb.run(args)


def _require_processes(name: str) -> None:
    """Refuse a verb that several processes would each do whole, over each other's files."""
    if name not in VERBS or name in _IN_PROCESSES or num_launched() == 1:
        return
    if not speaks():
        raise failed_elsewhere(0, RequestError.exit_code)
    raise RequestError(
        f"{name} is the work of one process",
        where="the environment, WORLD_SIZE",
        expected=f"one process; in several: {', '.join(_IN_PROCESSES)}",
        found=str(num_launched()),
        remedy=f"start it without torchrun or accelerate launch: lorakit {name}",
    )


def build_parser(verb: str) -> argparse.ArgumentParser:
    """The parser of one verb, with --json; a wrong command line is a RequestError.

    Raises:
        RequestError: there is no such verb.
    """
    module = _module_of(verb)
    parser = make_parser(verb, VERBS[verb][1], EXAMPLES.get(verb, ()))
    module.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
    return parser


def _module_of(name: str) -> Verb:
    if name not in VERBS:
        close = nearest(name, VERBS)
        raise RequestError(
            f"there is no verb {name!r}",
            where="the command line",
            expected=", ".join(VERBS),
            remedy=f"did you mean: lorakit {close[0]}" if close else "see: lorakit --help",
        )
    return cast(Verb, importlib.import_module(VERBS[name][0]))


@contextmanager
def _warnings_in_style() -> Iterator[None]:
    """Show our own warnings as one clear line each; the others as Python does."""
    with warnings.catch_warnings():
        original = warnings.showwarning
        said: set[str] = set()

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if issubclass(category, LorakitWarning):
                # A verb may bind the same adapter several times: once said is enough.
                if str(message) not in said:
                    said.add(str(message))
                    console.warn(str(message))
            else:
                original(message, category, filename, lineno, file, line)

        warnings.showwarning = show
        yield


def _failed(error: LorakitError, as_json: bool) -> int:
    if isinstance(error, FailedElsewhereError):
        return error.exit_code
    if as_json:
        fields = {"type": type(error).__name__, **console.error_fields(error)}
        console.print_json({"error": fields})
    console.print_error(error)
    return error.exit_code


def _overview() -> str:
    width = max(map(len, VERBS))
    groups = [
        line
        for title, verbs in GROUPS.items()
        for line in ("", title, *(f"  {verb:<{width}}  {VERBS[verb][1]}" for verb in verbs))
    ]
    lines = [
        "usage: lorakit VERB [ARGUMENTS] [--json]",
        "",
        "LoRA adapters for language models: train, measure, merge, combine, serve.",
        *groups,
        "",
        "  lorakit VERB --help   arguments and examples of a verb",
        "  lorakit --version     the version",
        "",
        "For a first try: lorakit demo. With --json the result is JSON on stdout.",
        "Exit codes: 0 done, 1 work failed, 2 wrong request, 130 interrupted.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
