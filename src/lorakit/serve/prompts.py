"""Turns and texts as token ids, rendered as the adapter was trained."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lorakit.data.encode import Encoder
from lorakit.data.options import SftOptions
from lorakit.data.sft import render_prompt
from lorakit.data.trained import trained_data
from lorakit.errors import RequestError

# What of an adapter's data section decides the prompt.
_KEYS = ("template", "chat_template", "template_options", "system")


class Prompts:
    """Renders prompts in a thread of its own, with a tokenizer of its own.

    A tokenizer is not made for several threads, and the engine's thread decodes with the other.

    Args:
        tokenizer: copied, not changed.
        num_embeddings: token ids from here on are none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, num_embeddings: int) -> None:
        self._tokenizer = copy.deepcopy(tokenizer)
        self._num_embeddings = num_embeddings
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="lorakit-prompts")

    async def chat(
        self, turns: Sequence[Mapping[str, Any]], trained: Mapping[str, Any]
    ) -> tuple[int, ...]:
        """The ids an answer to these turns starts from.

        Args:
            turns: role and content of each.
            trained: the adapter's passport; its system turn goes before turns that have none.

        Raises:
            DataError: the template refuses the turns.
            RequestError: there is no chat template, and more than one user turn.
        """
        return await self._in_thread(self._chat, turns, trained)

    async def text(self, prompt: str | Sequence[int]) -> tuple[int, ...]:
        """The ids of a plain prompt, with the tokenizer's own BOS; ids are checked and kept.

        Raises:
            RequestError: an id that the model does not have.
        """
        return await self._in_thread(self._text, prompt)

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _in_thread(self, work: Any, *args: Any) -> tuple[int, ...]:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *args)

    def _chat(
        self, turns: Sequence[Mapping[str, Any]], trained: Mapping[str, Any]
    ) -> tuple[int, ...]:
        options = trained_options(trained)
        template = options.chat_template or self._tokenizer.chat_template
        if options.template == "none" or not template:
            return self._plain_turn(turns)
        row = {"messages": [dict(turn) for turn in turns]}
        if turns[-1]["role"] == "assistant":
            raise RequestError(
                "the last message is the assistant's own",
                expected="messages that end with a turn to be answered",
            )
        return tuple(render_prompt(row, self._tokenizer, options, where="messages"))

    def _plain_turn(self, turns: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        """One user turn as plain text, which is what such an adapter has seen in training."""
        if [turn["role"] for turn in turns] != ["user"]:
            raise RequestError(
                "there is no chat template for this model, or the adapter was trained without one",
                expected="one user message, or /v1/completions",
                found=f"messages of: {', '.join(str(turn['role']) for turn in turns)}",
            )
        return self._text(str(turns[0]["content"]))

    def _text(self, prompt: str | Sequence[int]) -> tuple[int, ...]:
        if isinstance(prompt, str):
            encoder = Encoder(self._tokenizer, add_eos=False)
            return tuple(encoder.prompt(prompt, chat=False))
        if max(prompt, default=0) >= self._num_embeddings:
            raise RequestError(
                "a token id that this model does not have",
                expected=f"ids below {self._num_embeddings}",
                found=str(max(prompt)),
            )
        return tuple(prompt)


def trained_options(passport: Mapping[str, Any]) -> SftOptions:
    """How the prompts looked that an adapter was trained on; the defaults without a passport."""
    data = trained_data(passport)
    known = {field.name for field in fields(SftOptions)}
    return SftOptions(**{key: data[key] for key in _KEYS if key in data and key in known})
