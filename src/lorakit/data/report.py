"""What building the examples found: the numbers that `doctor` shows and the run record keeps."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class SftReport:
    """Counts over one data set. Lengths and tokens after cutting.

    Args:
        format: the format that the columns gave.
        template: "chat" or "none".
        num_rows: rows that were read.
        num_examples: sequences that are trained on; more than rows where a template rewrites
            earlier turns, fewer where rows were left out.
        num_tokens: tokens in all examples.
        num_learned_tokens: tokens that enter the loss.
        num_ends_learned: examples whose last answer's end (end marker or EOS) is learned.
        num_eos_learned: tokens equal to the tokenizer's EOS that enter the loss.
        num_eos_added: examples that were closed with EOS since the template writes no end marker.
        num_cut: examples cut at max_length.
        num_dropped: examples left out because they were longer than max_length.
        num_nothing_learned: rows or examples left out because nothing in them is learned.
        num_empty_answers: rows whose answer is blank.
        num_rows_split: rows that became several examples.
        longest: tokens in the longest example.
        end_token: what closes a learned answer: the template's end marker, or EOS; None if nothing.
        eos_token: the tokenizer's EOS.
        answer_lead: text of the template that every answer begins with ("" if none).
        tokenizer_sha256: see `lorakit.data.hashes`.
        template_sha256: see `lorakit.data.hashes`.
    """

    format: str
    template: str
    num_rows: int
    num_examples: int
    num_tokens: int
    num_learned_tokens: int
    num_ends_learned: int
    num_eos_learned: int
    num_eos_added: int
    num_cut: int
    num_dropped: int
    num_nothing_learned: int
    num_empty_answers: int
    num_rows_split: int
    longest: int
    end_token: str | None
    eos_token: str | None
    answer_lead: str
    tokenizer_sha256: str
    template_sha256: str | None

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know about the examples, in sentences; empty when all is plain."""
        notes: list[str] = []
        if self.num_cut:
            notes.append(f"{self.num_cut} examples are cut at max_length; their end is not learned")
        if self.num_dropped:
            notes.append(f"{self.num_dropped} examples longer than max_length are left out")
        if self.num_nothing_learned:
            notes.append(f"{self.num_nothing_learned} rows have no token to learn and are left out")
        if self.num_empty_answers:
            notes.append(f"{self.num_empty_answers} rows have an empty answer")
        if self.num_rows_split:
            notes.append(
                f"{self.num_rows_split} rows become one example per answer, because the template "
                "rewrites earlier turns"
            )
        if self.num_eos_added and self.template == "chat":
            notes.append(
                "the chat template writes no end marker that the tokenizer knows; "
                f"{self.eos_token} is added at the end of {self.num_eos_added} examples"
            )
        if self.answer_lead:
            notes.append(f"the template begins every answer with {self.answer_lead!r}")
        return tuple(notes)

    def to_json(self) -> dict[str, Any]:
        """Plain values, notes included."""
        return asdict(self) | {"notes": list(self.notes)}
