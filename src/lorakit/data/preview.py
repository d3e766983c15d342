"""What `lorakit doctor` shows: tokens by whether they are learned, counts, and findings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Literal

from rich.text import Text

from lorakit.data.encode import IGNORED, Example, eos_id
from lorakit.data.options import SftOptions
from lorakit.data.report import SftReport
from lorakit.data.rows import Rows, canonical

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEARNED = "green"
CONTEXT = "dim"
SPECIAL = "bold"
ELIDED = "yellow"
# Beyond this share of rows a cut is no accident at the edge.
MANY_CUT = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that was checked: an error, a warning, or in order."""

    level: Literal["error", "warning", "ok"]
    text: str
    remedy: str = ""

    def to_json(self) -> dict[str, str]:
        """Plain values."""
        return asdict(self)


def token_view(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int = 240,
    brackets: bool = False,
) -> Text:
    """The tokens as coloured text: learned ones green, the rest dim, special tokens bold.

    Args:
        example: ids and labels.
        tokenizer: decodes.
        max_tokens: of a longer example the middle is left out, and said so.
        brackets: also put learned text between [[ and ]], for where there are no colours.
    """
    special = set(tokenizer.all_special_ids) | {
        index for index, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    pairs = list(zip(example.input_ids, example.labels, strict=True))
    num_hidden = max(0, len(pairs) - max_tokens)
    head = (len(pairs) - num_hidden) // 2 if num_hidden else len(pairs)
    view = _runs(pairs[:head], tokenizer, special, brackets)
    if num_hidden:
        view.append(f" [... {num_hidden} tokens ...] ", style=ELIDED)
        view.append_text(_runs(pairs[head + num_hidden :], tokenizer, special, brackets))
    return view


def _runs(
    pairs: Sequence[tuple[int, int]],
    tokenizer: PreTrainedTokenizerBase,
    special: set[int],
    brackets: bool,
) -> Text:
    view = Text()
    for learned, stretch in groupby(pairs, key=lambda pair: pair[1] != IGNORED):
        colour = LEARNED if learned else CONTEXT
        view.append("[[" if brackets and learned else "", style=colour)
        # Runs, not single tokens: one character may be spread over several tokens.
        for is_special, run in groupby(stretch, key=lambda pair: pair[0] in special):
            text = str(tokenizer.decode([token for token, _ in run], skip_special_tokens=False))
            view.append(text, style=f"{SPECIAL} {colour}" if is_special else colour)
        view.append("]]" if brackets and learned else "", style=colour)
    return view


def count_facts(report: SftReport) -> dict[str, str]:
    """The counts in words, name to value, in reading order."""
    # No example is left where every row was dropped or has nothing to learn.
    share = report.num_learned_tokens / max(report.num_tokens, 1)
    mean = report.num_tokens / max(report.num_examples, 1)
    facts = {
        "format": report.format,
        "rendered with": "the chat template" if report.template == "chat" else "plain text",
        "rows": f"{report.num_rows:,}",
        "examples": f"{report.num_examples:,}",
        "tokens": f"{report.num_tokens:,}, {mean:.0f} per example, longest {report.longest}",
        "learned tokens": f"{report.num_learned_tokens:,} ({share:.1%})",
        "ends learned": f"{report.num_ends_learned:,} x {report.end_token}"
        if report.end_token
        else "0",
    }
    left_out = {
        "cut at max_length": report.num_cut,
        "dropped at max_length": report.num_dropped,
        "nothing to learn": report.num_nothing_learned,
        "empty answers": report.num_empty_answers,
    }
    return facts | {name: f"{count:,}" for name, count in left_out.items() if count}


def data_findings(
    report: SftReport, tokenizer: PreTrainedTokenizerBase, options: SftOptions
) -> list[Finding]:
    """What the examples, the tokenizer and the template say about training."""
    return [
        *_ends(report),
        *_end_marker(report),
        *_pad(tokenizer),
        *_cut(report, options),
        *_empty(report),
        *_template(report, options.chat_template or str(tokenizer.chat_template)),
    ]


def _ends(report: SftReport) -> list[Finding]:
    learned, total = report.num_ends_learned, report.num_examples
    if not total:
        return []
    if learned == total:
        text = f"the end of every answer is learned ({report.end_token})"
        return [Finding(level="ok", text=text)]
    text = f"the end of the answer is learned in {learned:,} of {total:,} examples"
    if learned == 0:
        remedy = "set add_eos: true, or the model may never stop"
    else:
        remedy = "raise max_length, or leave the others out: on_too_long: drop"
    return [Finding(level="warning", text=text, remedy=remedy)]


def _end_marker(report: SftReport) -> list[Finding]:
    findings: list[Finding] = []
    if report.template == "chat" and report.num_eos_added:
        findings.append(
            Finding(
                level="warning",
                text="the chat template writes no end marker that the tokenizer knows; "
                f"{report.eos_token} is added in its place",
                remedy="use the chat template that belongs to this tokenizer, if there is one",
            )
        )
    if report.end_token is not None and report.end_token != report.eos_token:
        findings.append(
            Finding(
                level="warning",
                text=f"answers end with {report.end_token}, but the tokenizer's EOS is "
                f"{report.eos_token}",
                remedy=f"generation must stop at {report.end_token} too (lorakit's own does)",
            )
        )
    return findings


def _pad(tokenizer: PreTrainedTokenizerBase) -> list[Finding]:
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id != eos_id(tokenizer):
        return []
    text = f"pad and EOS are the same token ({tokenizer.eos_token})"
    return [
        Finding(level="ok", text=f"{text}; EOS is learned all the same, padding has its own mask")
    ]


def _cut(report: SftReport, options: SftOptions) -> list[Finding]:
    share = report.num_cut / max(report.num_examples, 1)
    if not report.num_cut and not report.num_dropped:
        return []
    verb, count = ("cut", report.num_cut) if report.num_cut else ("left out", report.num_dropped)
    return [
        Finding(
            level="warning",
            text=f"{count:,} examples are {verb} at max_length {options.max_length}"
            + (f" ({share:.0%})" if share > MANY_CUT else ""),
            remedy="raise max_length",
        )
    ]


def _empty(report: SftReport) -> list[Finding]:
    findings: list[Finding] = []
    if report.num_nothing_learned:
        findings.append(
            Finding(
                level="warning",
                text=f"{report.num_nothing_learned:,} rows have no token to learn; left out",
                remedy="give them answers, or raise max_length",
            )
        )
    if report.num_empty_answers:
        findings.append(
            Finding(
                level="warning",
                text=f"{report.num_empty_answers:,} rows have an empty answer: "
                "the model learns to say nothing",
                remedy="remove these rows, unless that is meant",
            )
        )
    return findings


def _template(report: SftReport, template: str) -> list[Finding]:
    findings: list[Finding] = []
    if report.num_rows_split:
        findings.append(
            Finding(
                level="ok",
                text=f"the template rewrites earlier turns: {report.num_rows_split:,} rows became "
                "one example per answer",
            )
        )
    if report.answer_lead:
        findings.append(
            Finding(
                level="ok",
                text=f"every answer begins with {report.answer_lead!r}, which the template writes "
                "and the model learns",
            )
        )
    if report.template == "chat" and "strftime_now" in template:
        findings.append(
            Finding(
                level="warning",
                text="the chat template may write today's date into every prompt",
                remedy="fix it, if the template has a variable for it: "
                "template_options: {date_string: ...}",
            )
        )
    return findings


def duplicate_finding(train: Rows, validation: Rows) -> Finding:
    """Whether rows of the validation data are also trained on."""
    known = {canonical(row) for row in train}
    count = sum(canonical(row) in known for row in validation)
    if not count:
        return Finding(level="ok", text="no validation row is also a training row")
    return Finding(
        level="warning",
        text=f"{count:,} of {len(validation):,} validation rows are also training rows",
        remedy="remove them from one side: the validation loss would be too good",
    )
