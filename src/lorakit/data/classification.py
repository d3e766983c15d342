"""Classification and regression of a sentence or a pair, as in GLUE: rows to examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lorakit.data.classify_options import ClassifyOptions, Columns, find_columns
from lorakit.data.examples import ExampleList
from lorakit.data.hashes import tokenizer_hash
from lorakit.data.rows import Rows
from lorakit.data.targets import Targets
from lorakit.errors import ConfigError, DataError
from lorakit.progress import progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK_ROWS = 256
# What a tokenizer without a limit of its own says its limit is.
_NO_LIMIT = 1_000_000


@dataclass(frozen=True, slots=True)
class ClassifyExample:
    """One row as tokens.

    Args:
        input_ids: token ids, special tokens included.
        token_type_ids: which sentence a token belongs to; None where the model takes none.
        label: the class id, or the number.
        row: the index of its row in the data set.
    """

    input_ids: list[int]
    token_type_ids: list[int] | None
    label: int | float
    row: int

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, kw_only=True)
class ClassifyReport:
    """Counts over one data set; lengths and tokens after cutting.

    Args:
        columns: role -> column.
        targets: see `Targets.to_json`.
        num_rows: rows that were read.
        num_examples: rows that are used.
        num_tokens: tokens in all examples.
        num_cut: rows cut at the limit.
        num_dropped: rows left out because they were longer.
        longest: tokens in the longest example.
        limit: the limit in tokens, None without one.
        class_counts: class name -> rows; empty for regression.
        label_mean: mean of the numbers; None for classes.
        joined: whether the two sentences are joined by a line break.
        tokenizer_sha256: see `lorakit.data.hashes`.
        template_sha256: None; there is no template.
    """

    columns: dict[str, str]
    targets: dict[str, Any]
    num_rows: int
    num_examples: int
    num_tokens: int
    num_cut: int
    num_dropped: int
    longest: int
    limit: int | None
    class_counts: dict[str, int]
    label_mean: float | None
    joined: bool
    tokenizer_sha256: str
    template_sha256: str | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know about the examples, in sentences."""
        notes: list[str] = []
        if self.num_cut:
            notes.append(f"{self.num_cut} of {self.num_rows} rows are cut at {self.limit} tokens")
        if self.num_dropped:
            notes.append(f"{self.num_dropped} rows longer than {self.limit} tokens are left out")
        if self.joined:
            notes.append(
                "the tokenizer has no separator: the two sentences are joined by a line break"
            )
        empty = [name for name, count in self.class_counts.items() if not count]
        if empty:
            notes.append(f"no row has the label {', '.join(empty)}")
        return tuple(notes)

    def to_json(self) -> dict[str, Any]:
        """Plain values, notes included."""
        return asdict(self) | {"notes": list(self.notes)}


class ClassifyExamples(ExampleList[ClassifyExample, ClassifyReport]):
    """The examples with what their labels mean.

    Args:
        examples: the rows as tokens.
        targets: what a label stands for.
        report: what tokenising found.
    """

    def __init__(
        self, examples: list[ClassifyExample], targets: Targets, report: ClassifyReport
    ) -> None:
        super().__init__(examples, report)
        self.targets = targets


def build_classification(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    options: ClassifyOptions,
    targets: Targets,
    *,
    context: int | None = None,
    label: str = "tokenising",
) -> ClassifyExamples:
    """Tokenise rows and read their labels.

    Args:
        rows: all with the columns of the first row.
        tokenizer: not changed.
        options: columns, limit.
        targets: of the training rows; labels of other rows must fit.
        context: the most tokens the model can read.
        label: of the progress bar.

    Raises:
        DataError: with the row's place: text that is missing or empty, a label that does not fit,
            a row beyond max_length under on_too_long: error.
    """
    columns = find_columns(rows, options)
    labels = [
        targets.read(
            rows[i].get(columns.label), where=f"{rows.origin(i)}, column {columns.label!r}"
        )
        for i in range(len(rows))
    ]
    encoder = _Encoder(tokenizer, columns, length_limit(tokenizer, options, context))
    count: Counter[str] = Counter()
    examples: list[ClassifyExample] = []
    with progress(label, len(rows)) as bar:
        for start in range(0, len(rows), _CHUNK_ROWS):
            chunk = range(start, min(start + _CHUNK_ROWS, len(rows)))
            texts = [encoder.texts(rows, index) for index in chunk]
            for index, encoded in zip(chunk, encoder.encode(texts), strict=True):
                kept = _within(encoded, encoder, rows, index, options, count)
                if kept is not None:
                    ids, types, _ = kept
                    examples.append(ClassifyExample(ids, types, labels[index], index))
            bar.advance(len(chunk))
    if not examples:
        raise DataError(
            "no row is left",
            where=rows.source,
            found=f"all {len(rows)} rows are longer than {encoder.limit} tokens",
            remedy="raise max_length, or set on_too_long: cut",
        )
    report = _report(rows, examples, targets, encoder, count)
    return ClassifyExamples(examples, targets, report)


def length_limit(
    tokenizer: PreTrainedTokenizerBase, options: ClassifyOptions, context: int | None
) -> int | None:
    """The most tokens of a row: max_length, and what model and tokenizer can read.

    Raises:
        ConfigError: max_length is more than that.
    """
    own = int(tokenizer.model_max_length)
    limits = [n for n in (context, own if own < _NO_LIMIT else None) if n is not None]
    most = min(limits, default=None)
    wanted = options.max_length
    if wanted is not None and most is not None and wanted > most:
        raise ConfigError(
            "max_length is longer than what the model can read",
            where="data.max_length",
            expected=f"at most {most} tokens",
            found=str(wanted),
        )
    return most if wanted is None else wanted


_Texts = tuple[str, str | None]
# Token ids, token types, and the full length before cutting.
_Encoded = tuple[list[int], list[int] | None, int]


class _Encoder:
    """Tokenises texts and pairs of texts, with the tokenizer's own special tokens."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, columns: Columns, limit: int | None
    ) -> None:
        self.tokenizer = tokenizer
        self.columns = columns
        self.limit = limit
        self._with_types = "token_type_ids" in tokenizer.model_input_names
        self.joined = columns.text_pair is not None and not _separates(tokenizer)

    def texts(self, rows: Rows, index: int) -> _Texts:
        """The row's text and second text."""
        row, names = rows[index], self.columns
        found: list[str] = []
        for name in (names.text, names.text_pair):
            if name is None:
                continue
            value = row.get(name)
            if not isinstance(value, str) or not value.strip():
                raise DataError(
                    "a row without text",
                    where=f"{rows.origin(index)}, column {name!r}",
                    expected="text",
                    found="no such column" if name not in row else repr(value)[:80],
                    remedy="repair or remove this row",
                )
            found.append(value)
        if self.joined:
            return "\n".join(found), None
        return found[0], found[1] if len(found) > 1 else None

    def encode(self, texts: Sequence[_Texts]) -> list[_Encoded]:
        """The ids of each row, cut at the limit."""
        whole = self._call(texts, cut=False)
        lengths = [len(ids) for ids in whole["input_ids"]]
        if self.limit is not None and max(lengths) > self.limit:
            whole = self._call(texts, cut=True)
        types: list[list[int] | None] = [None] * len(texts)
        if self._with_types:
            types = [list(t) for t in whole["token_type_ids"]]
        return [
            (list(ids), t, n) for ids, t, n in zip(whole["input_ids"], types, lengths, strict=True)
        ]

    def _call(self, texts: Sequence[_Texts], *, cut: bool) -> Any:
        seconds = [pair for _, pair in texts if pair is not None]
        return self.tokenizer(
            [text for text, _ in texts],
            seconds or None,
            truncation="longest_first" if cut else False,
            max_length=self.limit if cut else None,
            return_attention_mask=False,
            return_token_type_ids=self._with_types,
            verbose=False,
        )


def _separates(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts something between two sentences."""
    first = tokenizer("a", add_special_tokens=False)["input_ids"]
    second = tokenizer("b", add_special_tokens=False)["input_ids"]
    both = tokenizer("a", "b")["input_ids"]
    alone = len(tokenizer("a")["input_ids"]) - len(first)
    return len(both) > alone + len(first) + len(second)


def _within(
    encoded: _Encoded,
    encoder: _Encoder,
    rows: Rows,
    index: int,
    options: ClassifyOptions,
    count: Counter[str],
) -> _Encoded | None:
    """The row as it is, or None where it is to be left out."""
    length, limit = encoded[2], encoder.limit
    if not length:
        raise DataError(
            "a row's text has no tokens",
            where=rows.origin(index),
            expected="at least one token",
            remedy="check the tokenizer, or remove this row",
        )
    if limit is None or length <= limit:
        return encoded
    if options.on_too_long == "error":
        raise DataError(
            "a row is longer than max_length",
            where=rows.origin(index),
            expected=f"at most {limit} tokens",
            found=f"{length} tokens",
            remedy="raise max_length, shorten the row, or set on_too_long: cut or drop",
        )
    if options.on_too_long == "drop":
        count["dropped"] += 1
        return None
    count["cut"] += 1
    return encoded


def _report(
    rows: Rows,
    examples: Sequence[ClassifyExample],
    targets: Targets,
    encoder: _Encoder,
    count: Counter[str],
) -> ClassifyReport:
    labels = [example.label for example in examples]
    by_class = Counter(labels)
    names = encoder.columns
    columns = {"text": names.text, "label": names.label}
    if names.text_pair is not None:
        columns["text_pair"] = names.text_pair
    return ClassifyReport(
        columns=columns,
        targets=targets.to_json(),
        num_rows=len(rows),
        num_examples=len(examples),
        num_tokens=sum(map(len, examples)),
        num_cut=count["cut"],
        num_dropped=count["dropped"],
        longest=max(map(len, examples)),
        limit=encoder.limit,
        class_counts={name: by_class[i] for i, name in enumerate(targets.names)},
        label_mean=sum(labels) / len(labels) if targets.regression else None,
        joined=encoder.joined,
        tokenizer_sha256=tokenizer_hash(encoder.tokenizer),
    )
