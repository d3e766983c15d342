"""Turns as text: what the model sees before each answer, and what it then has to write.

The boundary comes from rendering the turns before an answer as generation would
(`add_generation_prompt=True`) and the turns up to and with the answer: what the second adds to the
first is the answer. So every template works, with or without `{% generation %}` marks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jinja2

from lorakit.data.formats import Content, Dialogue, Message, Pair, Text
from lorakit.data.options import SftOptions
from lorakit.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of text that is learned, or not."""

    text: str
    learned: bool


@dataclass(frozen=True, slots=True)
class Turn:
    """One answer: all the text before it, the answer with its end marker, whether it has one."""

    prompt: str
    answer: str
    ended: bool


@dataclass(frozen=True, slots=True)
class Script:
    """One training sequence as text. `ended`: the last segment closes with an end marker."""

    segments: tuple[Segment, ...]
    ended: bool


class Renderer:
    """Renders contents with one tokenizer's template.

    Args:
        tokenizer: has the chat template and the special tokens; not changed.
        options: choose between the template and plain text.

    Raises:
        DataError: the options ask for a chat template and the tokenizer has none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: SftOptions) -> None:
        self._tokenizer = tokenizer
        self._options = options
        has_template = bool(options.chat_template or tokenizer.chat_template)
        if options.template == "chat" and not has_template:
            raise _no_template("template", "template: chat")
        self.chat = has_template and options.template != "none"
        if options.system is not None and not self.chat:
            raise DataError(
                "a system prompt needs a chat template",
                where="system",
                found="plain text" if has_template else "a tokenizer without chat template",
                remedy="write the system prompt into the prompts, or use the chat template",
            )
        special = {token for token in tokenizer.all_special_tokens if token}
        special |= {
            token.content for token in tokenizer.added_tokens_decoder.values() if token.special
        }
        alternatives = "|".join(map(re.escape, sorted(special, key=len, reverse=True)))
        # The special tokens at the very end: Phi-3 closes a turn with <|end|>, a conversation with
        # <|end|>\n<|endoftext|>; generation stops at the first.
        self._tail = re.compile(rf"({alternatives})(?:\s*(?:{alternatives}))*\s*\Z")
        self._has_special = bool(special)

    def uses_chat(self, content: Content) -> bool:
        """Whether this content goes through the chat template."""
        return self.chat and not isinstance(content, Text)

    def scripts(self, content: Content, where: str) -> list[Script]:
        """The training sequences of one row: one, or one per answer where history is rewritten.

        Raises:
            DataError: the template refuses the turns, or does not continue its own prompt.
        """
        options = self._options
        if isinstance(content, Text):
            if options.template == "chat":
                raise DataError(
                    "plain text has no turns for a chat template",
                    where=where,
                    remedy="template: auto, or give prompt and completion",
                )
            return [Script((Segment(content.text, True),), False)]
        if isinstance(content, Pair) and not self.chat:
            if content.completion is None:
                return []
            prompt = Segment(content.plain_prompt, not options.completion_only)
            return [Script((prompt, Segment(content.completion, True)), False)]
        dialogue = self._dialogue(content, where)
        if not options.completion_only:
            return [self._whole(dialogue, where)]
        turns = [self._turn(dialogue, i, where) for i in self._answers(dialogue)]
        return [_script(chain) for chain in _chains(turns)]

    def prompt(self, content: Content, where: str) -> str:
        """The text that generation starts from: all turns before the last answer.

        Raises:
            DataError: plain text, which has no prompt; or the template refuses the turns.
        """
        if isinstance(content, Text):
            raise DataError(
                "plain text has no prompt", where=where, expected="rows with a prompt or messages"
            )
        if isinstance(content, Pair) and not self.chat:
            return content.plain_prompt
        dialogue = self._dialogue(content, where)
        messages = dialogue.messages
        if messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        return self._render(messages, dialogue, where, generate=True)

    def _dialogue(self, content: Dialogue | Pair, where: str) -> Dialogue:
        if isinstance(content, Dialogue):
            if not self.chat:
                raise _no_template(where, "messages")
            return content
        messages: list[Message] = [{"role": "user", "content": content.prompt}]
        if content.system is not None:
            messages.insert(0, {"role": "system", "content": content.system})
        if content.completion is not None:
            messages.append({"role": "assistant", "content": content.completion})
        return Dialogue(messages)

    def _answers(self, dialogue: Dialogue) -> list[int]:
        answers = [
            i
            for i, message in enumerate(dialogue.messages)
            if message["role"] == "assistant" and i >= dialogue.first_learned
        ]
        return answers[-1:] if self._options.last_turn_only else answers

    def _whole(self, dialogue: Dialogue, where: str) -> Script:
        text = self._render(dialogue.messages, dialogue, where, generate=False)
        text, ended = self._close(text)
        return Script((Segment(text, True),), ended)

    def _turn(self, dialogue: Dialogue, index: int, where: str) -> Turn:
        messages = dialogue.messages
        prompt = self._render(messages[:index], dialogue, where, generate=True)
        whole = self._render(messages[: index + 1], dialogue, where, generate=False)
        if not whole.startswith(prompt):
            raise _diverges(prompt, whole, where)
        answer, ended = self._close(whole[len(prompt) :])
        return Turn(prompt, answer, ended)

    def _close(self, text: str) -> tuple[str, bool]:
        """The text up to and with its end marker; without one, its trailing blanks removed."""
        match = self._tail.search(text) if self._has_special else None
        if match is None:
            return text.rstrip(), False
        return text[: match.end(1)], True

    def _render(
        self, messages: Sequence[Message], dialogue: Dialogue, where: str, *, generate: bool
    ) -> str:
        variables: dict[str, Any] = dict(self._options.template_options)
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages),
                tools=dialogue.tools,
                chat_template=self._options.chat_template,
                add_generation_prompt=generate,
                tokenize=False,
                **variables,
            )
        except (jinja2.TemplateError, ValueError, TypeError, KeyError, IndexError) as error:
            raise _refused(error, messages, where) from error
        return str(text)


def _chains(turns: Sequence[Turn]) -> list[list[Turn]]:
    """Runs of turns in which each prompt continues the answer before it.

    Templates that rewrite earlier turns (Qwen3 removes the thinking from history) break the chain:
    such a turn becomes a sequence of its own, because that is what generation will see.
    """
    chains: list[list[Turn]] = []
    for turn in turns:
        if chains:
            before = chains[-1][-1]
            if turn.prompt.startswith(before.prompt + before.answer):
                chains[-1].append(turn)
                continue
        chains.append([turn])
    return chains


def _script(chain: Sequence[Turn]) -> Script:
    segments: list[Segment] = []
    length = 0
    for turn in chain:
        segments.append(Segment(turn.prompt[length:], False))
        segments.append(Segment(turn.answer, True))
        length = len(turn.prompt) + len(turn.answer)
    return Script(tuple(segments), chain[-1].ended)


def _no_template(where: str, what: str) -> DataError:
    return DataError(
        f"{what} needs a chat template",
        where=where,
        expected="a tokenizer with a chat template",
        found="none, or template: none",
        remedy="take an instruction-tuned model, give a template (chat_template: FILE), or give "
        "prompt and completion as plain text",
    )


def _diverges(prompt: str, whole: str, where: str) -> DataError:
    same = next(
        (i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b),
        min(len(prompt), len(whole)),
    )
    return DataError(
        "the chat template does not continue its own generation prompt",
        where=where,
        expected=f"an answer that follows {prompt[max(0, same - 20) :][:60]!r}",
        found=repr(whole[max(0, same - 20) :][:60]),
        remedy="set the template's variables (template_options: {enable_thinking: false}), "
        "or use another chat template (chat_template: FILE)",
    )


def _refused(error: Exception, messages: Sequence[Message], where: str) -> DataError:
    roles = [message["role"] for message in messages]
    remedy = "put the turns into the order that the template asks for"
    if "system" in roles and "system" in str(error).lower():
        remedy = "this template has no system turn: put that text into the first user turn"
    return DataError(
        "the chat template refuses this row",
        where=where,
        expected="turns that the template can render",
        found=f"{error} (turns: {', '.join(roles) or 'none before the answer'})",
        remedy=remedy,
    )
