"""The usual names of the parts of a data set."""

from __future__ import annotations

import re
from pathlib import Path

DEFAULT_SPLIT = "train"
_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval"),
}


def split_aliases(split: str) -> tuple[str, ...]:
    """The usual names of a split, itself included."""
    return next((names for names in _NAMES.values() if split in names), (split,))


def split_of(file: Path) -> str | None:
    """The split that a file is named after, or None."""
    return next((name for name, stems in _NAMES.items() if stem_is(file, stems)), None)


def stem_is(file: Path, stems: tuple[str, ...]) -> bool:
    """Whether a file's name begins with one of these words, in any case."""
    first = re.split(r"[._-]", file.name.lower(), maxsplit=1)[0]
    return first in {stem.lower() for stem in stems}
