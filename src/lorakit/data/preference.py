"""Rows with preferred and dispreferred answers, as examples for DPO, ORPO and KTO."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from lorakit.data.encode import Encoded, Encoder, Example
from lorakit.data.examples import ExampleList
from lorakit.data.fit import fit
from lorakit.data.formats import Content, wrong_kind
from lorakit.data.hashes import template_hash, tokenizer_hash
from lorakit.data.options import SftOptions
from lorakit.data.preference_formats import (
    CHOSEN,
    LABEL,
    REJECTED,
    has_pairs,
    read_pair,
    read_single,
    read_verdict,
)
from lorakit.data.render import Renderer, Script
from lorakit.data.rows import Row, Rows
from lorakit.errors import DataError
from lorakit.progress import progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK_ROWS = 256


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer to a prompt, with a verdict.

    Args:
        example: prompt and answer; the labels are the answer's tokens.
        desirable: whether it is a good one.
        reference: its log-probability under the reference, in nats, where that is known already.
    """

    example: Example
    desirable: bool
    reference: float | None = None


@dataclass(frozen=True, slots=True)
class Judged:
    """What is compared or judged at once: a chosen and a rejected answer, or one answer alone.

    Args:
        answers: chosen, then rejected; or a single one.
        row: the index of their row in the data set.
    """

    answers: tuple[Answer, ...]
    row: int

    def __len__(self) -> int:
        """Tokens of all answers with their prompts."""
        return sum(len(answer.example) for answer in self.answers)


@dataclass(frozen=True, kw_only=True)
class PreferenceReport:
    """Counts over one data set, lengths and tokens after cutting.

    Args:
        num_rows: rows that were read.
        num_examples: pairs, or single answers.
        num_desirable: desirable answers, the chosen ones of pairs included.
        num_undesirable: the others.
        num_tokens: tokens in all answers with their prompts.
        num_answer_tokens: tokens of the answers alone.
        num_cut: answers cut at max_length.
        num_dropped: rows left out because an answer is longer than max_length.
        num_same: pairs left out because both answers are the same.
        num_nothing: rows left out because no token of an answer is left.
        longest: tokens in the longest prompt with its answer.
        tokenizer_sha256: see `lorakit.data.hashes`.
        template_sha256: see `lorakit.data.hashes`.
    """

    num_rows: int
    num_examples: int
    num_desirable: int
    num_undesirable: int
    num_tokens: int
    num_answer_tokens: int
    num_cut: int
    num_dropped: int
    num_same: int
    num_nothing: int
    longest: int
    tokenizer_sha256: str
    template_sha256: str | None

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know, in sentences."""
        said = {
            "answers are cut at max_length": self.num_cut,
            "rows longer than max_length are left out": self.num_dropped,
            "pairs whose two answers are the same are left out": self.num_same,
            "rows have no token of an answer to learn and are left out": self.num_nothing,
        }
        return tuple(f"{count} {what}" for what, count in said.items() if count)

    def to_json(self) -> dict[str, Any]:
        """Plain values, notes included."""
        return asdict(self) | {"notes": list(self.notes)}


PreferenceExamples = ExampleList[Judged, PreferenceReport]


def build_preferences(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    options: SftOptions,
    *,
    paired: bool,
    desirable_from: float | None = None,
    label: str = "tokenising",
) -> PreferenceExamples:
    """Tokenise rows of preferences.

    Args:
        rows: all with a chosen and a rejected answer, or all with one answer and a verdict.
        tokenizer: not changed.
        options: how to render and how long.
        paired: keep chosen and rejected together; else every answer is an example of its own.
        desirable_from: a verdict is a number, and this one and larger ones are good.
        label: of the progress bar.

    Raises:
        DataError: a row that does not fit, nothing left, or verdicts where pairs are needed.
    """
    if not len(rows):
        raise DataError("the data is empty", where=rows.source, found="0 rows")
    builder = _Builder(rows, tokenizer, options, paired=paired, desirable_from=desirable_from)
    with progress(label, len(rows)) as bar:
        for start in range(0, len(rows), _CHUNK_ROWS):
            chunk = range(start, min(start + _CHUNK_ROWS, len(rows)))
            builder.add(chunk)
            bar.advance(len(chunk))
    return builder.finish()


class _Builder:
    def __init__(
        self,
        rows: Rows,
        tokenizer: PreTrainedTokenizerBase,
        options: SftOptions,
        *,
        paired: bool,
        desirable_from: float | None,
    ) -> None:
        self._rows = rows
        self._tokenizer = tokenizer
        self._options = replace(options, last_turn_only=True)
        self._paired = paired
        self._desirable_from = desirable_from
        self._has_pairs = has_pairs(rows[0], options)
        if paired and not self._has_pairs:
            raise DataError(
                "pairs of answers are needed",
                where=rows.origin(0),
                expected=f"the columns {options.column(CHOSEN)!r} and {options.column(REJECTED)!r}",
                found=f"columns: {', '.join(rows[0]) or 'none'}",
                remedy="name your columns: columns: {chosen: ..., rejected: ...}; single answers "
                "with a verdict are learned with task: kto",
            )
        if desirable_from is not None and self._has_pairs:
            raise DataError(
                "pairs have no ratings",
                where=rows.origin(0),
                expected=f"one answer and a number in the column {options.column(LABEL)!r}",
                found=f"columns: {', '.join(rows[0])}",
                remedy="remove preference.desirable_from",
            )
        self._renderer = Renderer(tokenizer, self._options)
        self._encoder = Encoder(tokenizer, add_eos=options.add_eos)
        self._examples: list[Judged] = []
        self._count: Counter[str] = Counter()

    def add(self, indices: range) -> None:
        """Turn the rows at these indices into examples."""
        owners: list[tuple[int, tuple[bool, ...]]] = []
        scripts: list[Script] = []
        chat = self._renderer.chat
        for index in indices:
            where = self._rows.origin(index)
            contents = self._contents(self._rows[index], where)
            for content, _ in contents:
                found = self._renderer.scripts(content, where)
                if len(found) != 1:
                    raise wrong_kind(where, "an answer: an assistant's turn at the end", found)
                scripts += found
            owners.append((index, tuple(desirable for _, desirable in contents)))
        encoded = iter(self._encoder.encode(scripts, chat=chat))
        for index, verdicts in owners:
            self._keep(index, verdicts, [next(encoded) for _ in verdicts])

    def _contents(self, row: Row, where: str) -> list[tuple[Content, bool]]:
        if self._has_pairs:
            chosen, rejected = read_pair(row, self._options, where)
            return [(chosen, True), (rejected, False)]
        verdict = read_verdict(row, self._options, where, desirable_from=self._desirable_from)
        return [(read_single(row, self._options, where), verdict)]

    def _keep(self, index: int, verdicts: tuple[bool, ...], encoded: list[Encoded]) -> None:
        answers: list[Answer] = []
        where = self._rows.origin(index)
        if len(encoded) == 2 and encoded[0].input_ids == encoded[1].input_ids:
            self._count["same"] += 1
            return
        for desirable, one in zip(verdicts, encoded, strict=True):
            example = fit(one, index, options=self._options, count=self._count, where=where)
            if example is None:
                return
            answers.append(Answer(example, desirable))
        groups = [tuple(answers)] if self._paired else [(answer,) for answer in answers]
        self._examples += [Judged(group, index) for group in groups]

    def finish(self) -> PreferenceExamples:
        """The examples with their report.

        Raises:
            DataError: none is left.
        """
        report = self._report()
        if not self._examples:
            raise DataError(
                "no preference is left to learn from",
                where=self._rows.source,
                expected="rows with two different answers, or a verdict, within max_length",
                found="; ".join(report.notes),
                remedy="raise max_length, or look at the rows",
            )
        return PreferenceExamples(self._examples, report)

    def _report(self) -> PreferenceReport:
        answers = [answer for example in self._examples for answer in example.answers]
        num_desirable = sum(answer.desirable for answer in answers)
        return PreferenceReport(
            num_rows=len(self._rows),
            num_examples=len(self._examples),
            num_desirable=num_desirable,
            num_undesirable=len(answers) - num_desirable,
            num_tokens=sum(len(answer.example) for answer in answers),
            num_answer_tokens=sum(answer.example.num_learned for answer in answers),
            num_cut=self._count["cut"],
            num_dropped=self._count["dropped"],
            num_same=self._count["same"],
            num_nothing=self._count["nothing"],
            longest=max((len(answer.example) for answer in answers), default=0),
            tokenizer_sha256=tokenizer_hash(self._tokenizer),
            template_sha256=template_hash(self._tokenizer, self._options.chat_template),
        )
