"""A tokenised row as an example that is no longer than it may be."""

from __future__ import annotations

from collections import Counter

from lorakit.data.encode import IGNORED, Encoded, Example
from lorakit.data.options import SftOptions
from lorakit.errors import DataError


def fit(
    encoded: Encoded, row: int, *, options: SftOptions, count: Counter[str], where: str
) -> Example | None:
    """The example of a row, or None where it is dropped or nothing of it is learned.

    Args:
        encoded: the row's tokens.
        row: its index in the data set.
        options: how long it may be, and what happens to a longer one.
        count: "dropped", "cut" and "nothing" are counted; mutated.
        where: the row, for the error.

    Raises:
        DataError: it is too long, and that is an error.
    """
    ids, learned = encoded.input_ids, encoded.learned
    limit = options.max_length
    if limit is not None and len(ids) > limit:
        if options.on_too_long == "error":
            raise DataError(
                "a row is longer than max_length",
                where=where,
                expected=f"at most {limit} tokens",
                found=f"{len(ids)} tokens",
                remedy="raise max_length, shorten the row, or set on_too_long: cut or drop",
            )
        if options.on_too_long == "drop":
            count["dropped"] += 1
            return None
        count["cut"] += 1
        # The end goes, never the start: the prompt stays what generation will see, and what is
        # left of the answer is a true beginning of it. No EOS is put where none was.
        ids, learned = ids[:limit], learned[:limit]
    labels = [token if counts else IGNORED for token, counts in zip(ids, learned, strict=True)]
    if labels:
        labels[0] = IGNORED
    example = Example(ids, labels, row)
    if not example.num_learned:
        count["nothing"] += 1
        return None
    return example
