"""Builds the examples of a data set and counts what it meets."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from lorakit.data.encode import IGNORED, Encoded, Encoder, Example, eos_id, token_text
from lorakit.data.examples import ExampleList
from lorakit.data.fit import fit
from lorakit.data.formats import Format, answer_of, detect_format, read_content
from lorakit.data.hashes import template_hash, tokenizer_hash
from lorakit.data.options import SftOptions
from lorakit.data.render import Renderer, Script
from lorakit.data.report import SftReport
from lorakit.data.rows import Rows
from lorakit.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Examples = ExampleList[Example, SftReport]


class LossMaskError(DataError):
    """Nothing is learned, or no answer's end is.

    Attributes:
        rows: what was read.
        examples: what was made of them all the same, to be looked at; None after a pickle.
    """

    rows: Rows | None = None
    examples: Examples | None = None


class ExampleBuilder:
    """Collects the examples of one data set chunk by chunk, and counts.

    Args:
        rows: all of one format, found from the columns of the first row.
        tokenizer: not changed.
        options: how to render, what to learn, how long.

    Raises:
        DataError: no rows, columns that fit no format, a template that is missing.
    """

    def __init__(self, rows: Rows, tokenizer: PreTrainedTokenizerBase, options: SftOptions) -> None:
        if not len(rows):
            raise DataError("the data is empty", where=rows.source, found="0 rows")
        self._rows = rows
        self._tokenizer = tokenizer
        self._options = options
        self._format: Format = detect_format(list(rows[0]), options, where=rows.origin(0))
        self._renderer = Renderer(tokenizer, options)
        self._encoder = Encoder(tokenizer, add_eos=options.add_eos)
        self._chat = self._renderer.chat and self._format != "text"
        self._examples: list[Example] = []
        self._count: Counter[str] = Counter()
        self._lead: str | None = None
        self._end: int | None = None

    def add(self, indices: range) -> None:
        """Turn the rows at these indices into examples."""
        owners: list[int] = []
        scripts: list[Script] = []
        for index in indices:
            new = self._scripts(index)
            scripts += new
            owners += [index] * len(new)
        encoded = self._encoder.encode(scripts, chat=self._chat)
        for index, script, one in zip(owners, scripts, encoded, strict=True):
            self._count["eos_added"] += one.ended and not script.ended
            self._keep(index, one)

    def _scripts(self, index: int) -> list[Script]:
        where = self._rows.origin(index)
        content = read_content(self._rows[index], self._format, self._options, where=where)
        scripts = self._renderer.scripts(content, where)
        answer = answer_of(content)
        text = (answer or "").strip()
        self._count["empty_answers"] += answer is not None and not text
        self._count["nothing"] += not scripts
        self._count["split"] += len(scripts) > 1
        if self._chat and self._options.completion_only and scripts and text:
            self._see_lead(scripts[-1].segments[-1].text, text)
        return scripts

    def _see_lead(self, learned: str, answer: str) -> None:
        """Narrow down the text of the template with which every answer begins."""
        lead, found, _ = learned.partition(answer)
        lead = lead.rstrip(" ") if found and lead.strip() else ""
        self._lead = lead if self._lead in (None, lead) else ""

    def _keep(self, index: int, encoded: Encoded) -> None:
        where = self._rows.origin(index)
        example = fit(encoded, index, options=self._options, count=self._count, where=where)
        if example is None:
            return
        whole = len(example) == len(encoded.input_ids)
        if encoded.ended and whole and example.labels[-1] != IGNORED:
            self._count["ends"] += 1
            self._end = example.input_ids[-1]
        self._examples.append(example)

    def finish(self) -> Examples:
        """The examples with their report.

        Raises:
            LossMaskError: nothing is learned, or no answer's end is.
        """
        examples = Examples(self._examples, self._report())
        problem = self._problem()
        if problem is not None:
            problem.rows, problem.examples = self._rows, examples
            raise problem
        return examples

    def _problem(self) -> LossMaskError | None:
        if not self._examples:
            return self._all_masked()
        ends_matter = self._format != "text" and self._options.add_eos
        if ends_matter and not self._count["ends"]:
            return LossMaskError(
                "the end of an answer is never learned, so the model would never stop",
                where=self._rows.source,
                expected="an end marker or EOS inside the loss in at least one row",
                found=f"{self._count['cut']} of {len(self._examples)} examples cut at "
                f"max_length {self._options.max_length}",
                remedy="raise max_length, or set on_too_long: drop; add_eos: false if it is meant",
            )
        return None

    def _report(self) -> SftReport:
        eos = eos_id(self._tokenizer)
        examples, count = self._examples, self._count
        end = None if self._end is None else token_text(self._tokenizer, self._end)
        eos_learned = 0 if eos is None else sum(e.labels.count(eos) for e in examples)
        return SftReport(
            format=self._format,
            template="chat" if self._chat else "none",
            num_rows=len(self._rows),
            num_examples=len(examples),
            num_tokens=sum(map(len, examples)),
            num_learned_tokens=sum(example.num_learned for example in examples),
            num_ends_learned=count["ends"],
            num_eos_learned=eos_learned,
            num_eos_added=count["eos_added"],
            num_cut=count["cut"],
            num_dropped=count["dropped"],
            num_nothing_learned=count["nothing"],
            num_empty_answers=count["empty_answers"],
            num_rows_split=count["split"],
            longest=max(map(len, examples), default=0),
            end_token=end,
            eos_token=None if eos is None else token_text(self._tokenizer, eos),
            answer_lead=self._lead or "",
            tokenizer_sha256=tokenizer_hash(self._tokenizer),
            template_sha256=template_hash(self._tokenizer, self._options.chat_template),
        )

    def _all_masked(self) -> LossMaskError:
        limit = self._options.max_length
        reasons = [
            f"{self._count['nothing']} rows without a learned token",
            f"{self._count['cut']} cut and {self._count['dropped']} dropped at max_length {limit}",
        ]
        return LossMaskError(
            "all labels are masked: no row has a token to learn",
            where=self._rows.source,
            expected="answers (assistant turns, completions) within max_length",
            found="; ".join(reasons if limit else reasons[:1]),
            remedy="raise max_length" if limit else "give rows with answers to learn",
        )
