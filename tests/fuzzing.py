"""What the fuzz tests share: spoiled files, odd JSON, and a watch over what is opened."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.internal.conjecture import providers
from hypothesis.internal.constants_ast import Constants

from lorakit.errors import LorakitError, LorakitWarning

# One example may compute this long, and the process may grow by so much: a claim in a header that
# is believed would take more of either.
SECONDS = 5.0
MOST_BYTES = 400 * 1024**2

# No deadline of its own: a busy machine would miss it.
QUICK = settings(max_examples=25, deadline=None, derandomize=True, database=None)
THOROUGH = settings(QUICK, max_examples=1500, derandomize=False)

EXTREMES = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)

# Hypothesis would first look for constants in every module that is loaded: with transformers that
# takes 15 s, and what is loaded by then decides what is tried.
providers._get_local_constants = Constants

_scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**40, -1, 0, 2**63])
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(["../../secret", "/etc/passwd", "lora", "(" * 30, "\x00", "(a+)+$"])
)
odd_json = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


@st.composite
def spoiled(draw: st.DrawFn, whole: bytes) -> bytes:
    """A file with one to four wounds, most of them where the header is."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        last = max(len(data) - 1, 0)
        at = draw(st.integers(0, min(last, 800)) | st.integers(0, last))
        wound = draw(st.sampled_from(["flip", "cut", "insert", "remove", "number"]))
        if wound == "flip" and data:
            data[at] ^= draw(st.integers(1, 255))
        elif wound == "cut":
            del data[at:]
        elif wound == "insert":
            data[at:at] = draw(st.binary(max_size=20))
        elif wound == "remove":
            del data[at : at + draw(st.integers(1, 20))]
        else:
            data[at : at + 8] = draw(st.sampled_from(EXTREMES)).to_bytes(8, "little")
    return bytes(data)


def any_bytes(whole: bytes) -> st.SearchStrategy[bytes]:
    """The file itself spoiled, or bytes that have nothing to do with it."""
    return spoiled(whole) | st.binary(max_size=200)


@st.composite
def changed(draw: st.DrawFn, document: Any) -> Any:
    """A JSON document with one value somewhere in it replaced, taken away or added."""
    if isinstance(document, dict) and document and draw(st.integers(0, 3)):
        key = draw(st.sampled_from(sorted(document)))
        return {**document, key: draw(changed(document[key]))}
    if isinstance(document, list) and document and draw(st.integers(0, 3)):
        at = draw(st.integers(0, len(document) - 1))
        return [*document[:at], draw(changed(document[at])), *document[at + 1 :]]
    if isinstance(document, dict) and document:
        key = draw(st.sampled_from(sorted(document)))
        kept = {k: v for k, v in document.items() if k != key}
        return draw(st.just(kept) | odd_json.map(lambda value: {**document, "odd": value}))
    return draw(odd_json)


_opened: list[str] | None = None


def _note(event: str, args: tuple[Any, ...]) -> None:
    if _opened is not None and event == "open" and isinstance(args[0], str | bytes | os.PathLike):
        _opened.append(os.fsdecode(args[0]))


sys.addaudithook(_note)  # for good: Python takes no hook away
# Code that is imported for the first time, and the system's tables.
_OURS = (sys.prefix, sys.base_prefix, str(Path(__file__).parents[1]), "/proc", "/dev", "/sys")


def refuses_or_reads(read: Callable[[], object], directory: Path) -> bool:
    """Whether it was read; anything but a LorakitError, and any file elsewhere, is a failure.

    Python's own `open` is watched; what a library opens in C or Rust is not seen.
    """
    global _opened
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    _opened = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LorakitWarning)
            with contextlib.suppress(LorakitError):
                read()
                return True
            return False
    finally:
        opened, _opened = _opened, None
        took = time.process_time() - started
        assert took < SECONDS, f"computed for {took:.1f} s"
        inside = (*_OURS, str(directory.resolve()), str(directory))
        outside = [path for path in opened if Path(path).is_absolute()]
        outside = [path for path in outside if not path.startswith(inside)]
        assert not outside, f"opened {outside}"
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        assert grown < MOST_BYTES, f"grew by {grown:,} bytes"
