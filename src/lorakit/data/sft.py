"""Supervised fine-tuning: rows to examples, and the same rendering for generation.

rows -> formats.read_content -> render.Renderer -> encode.Encoder -> Example
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorakit.data.builder import ExampleBuilder, Examples
from lorakit.data.encode import IGNORED, Encoder, Example, eos_id
from lorakit.data.formats import Content, Pair, answer_of, detect_format, question_of, read_content
from lorakit.data.options import SftOptions
from lorakit.data.render import Renderer
from lorakit.data.report import SftReport
from lorakit.data.rows import Row, Rows
from lorakit.errors import DataError
from lorakit.progress import progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "IGNORED",
    "Example",
    "Examples",
    "SftOptions",
    "SftReport",
    "build_examples",
    "question_text",
    "reference_text",
    "render_prompt",
    "stop_token_ids",
]

CHUNK_ROWS = 256


def build_examples(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    options: SftOptions | None = None,
    *,
    label: str = "tokenising",
) -> Examples:
    """Tokenise rows and mark what is learned.

    Args:
        rows: all of one format, found from the columns of the first row.
        tokenizer: not changed.
        options: how to render, what to learn, how long.
        label: of the progress bar.

    Returns:
        The examples and their report. Rows in which nothing is learned are left out and counted.

    Raises:
        DataError: a row that does not fit the format or the template, all labels masked, or no
            answer whose end is learned.
    """
    options = options or SftOptions()
    builder = ExampleBuilder(rows, tokenizer, options)
    with progress(label, len(rows)) as bar:
        for start in range(0, len(rows), CHUNK_ROWS):
            chunk = range(start, min(start + CHUNK_ROWS, len(rows)))
            builder.add(chunk)
            bar.advance(len(chunk))
    return builder.finish()


def render_prompt(
    row: Row,
    tokenizer: PreTrainedTokenizerBase,
    options: SftOptions | None = None,
    *,
    where: str = "the row",
) -> list[int]:
    """The ids that generation starts from: everything before the row's last answer.

    The answer may be missing. The ids are the ones that training put before that answer.

    Raises:
        DataError: the row fits no format, is plain text, or the template refuses it.
    """
    options = options or SftOptions()
    content = _content(row, options, where)
    renderer = Renderer(tokenizer, options)
    text = renderer.prompt(content, where)
    encoder = Encoder(tokenizer, add_eos=options.add_eos)
    return encoder.prompt(text, chat=renderer.uses_chat(content))


def reference_text(row: Row, options: SftOptions | None = None, *, where: str = "the row") -> str:
    """The row's own answer: its completion, output, or last assistant turn, as it is written.

    Raises:
        DataError: the row has no answer.
    """
    answer = answer_of(_content(row, options or SftOptions(), where))
    if answer is None:
        raise DataError(
            "a row without an answer to compare with",
            where=where,
            expected="a completion, an output, or an assistant turn at the end",
            remedy="evaluate on rows that have answers",
        )
    return answer


def question_text(row: Row, options: SftOptions | None = None, *, where: str = "the row") -> str:
    """What the row asks last, as it is written: to be shown, without template and system turn.

    Raises:
        DataError: the row fits no format.
    """
    return question_of(_content(row, options or SftOptions(), where)).strip()


def stop_token_ids(
    tokenizer: PreTrainedTokenizerBase, options: SftOptions | None = None
) -> list[int]:
    """The tokens at which generation should stop: EOS, and the chat template's end marker.

    Raises:
        DataError: the template refuses a user turn and an answer.
    """
    options = options or SftOptions()
    eos = eos_id(tokenizer)
    ids = [] if eos is None else [eos]
    plain = SftOptions(
        template=options.template,
        chat_template=options.chat_template,
        template_options=options.template_options,
    )
    renderer = Renderer(tokenizer, plain)
    if renderer.chat:
        probe = Pair("a", "a", "b")
        encoder = Encoder(tokenizer, add_eos=False)
        encoded = encoder.encode(renderer.scripts(probe, "a probe"), chat=True)[-1]
        if encoded.ended and encoded.input_ids[-1] not in ids:
            ids.append(encoded.input_ids[-1])
    return ids


def _content(row: Row, options: SftOptions, where: str) -> Content:
    kind = detect_format(list(row), options, need_answer=False, where=where)
    return read_content(row, kind, options, where=where, need_answer=False)
