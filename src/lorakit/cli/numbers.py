"""Numbers on the command line that are out of range, refused where they are read."""

from __future__ import annotations

import argparse


def count(text: str) -> int:
    """A whole number from 0 on.

    Raises:
        argparse.ArgumentTypeError: it is none; argparse says so and exits with 2.
    """
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on")
    return int(text)
