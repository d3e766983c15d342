"""Scripts as token ids and labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorakit.data.render import Script
from lorakit.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100


@dataclass(frozen=True, slots=True)
class Example:
    """One training sequence.

    Args:
        input_ids: token ids.
        labels: the same ids where learned, -100 elsewhere; the first is always -100, since no
            token predicts it. Not shifted: the model's loss shifts them.
        row: the index of its row in the data set.
    """

    input_ids: list[int]
    labels: list[int]
    row: int = -1

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_learned(self) -> int:
        """How many tokens enter the loss."""
        return sum(label != IGNORED for label in self.labels)


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of a script, which of them are learned, and whether its end is marked."""

    input_ids: list[int]
    learned: list[bool]
    ended: bool


class Encoder:
    """Tokenises scripts so that the prompt's tokens are the very ones that generation starts from.

    A segment is tokenised together with the text before it where this leaves the tokens before it
    as they are, and on its own where a token would span the boundary.

    Args:
        tokenizer: not changed.
        add_eos: close a script that has no end marker with EOS.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, add_eos: bool) -> None:
        self._tokenizer = tokenizer
        self._eos = eos_id(tokenizer) if add_eos else None
        self._add_eos = add_eos
        self._leading = leading_ids(tokenizer)

    def prompt(self, text: str, *, chat: bool) -> list[int]:
        """The ids of a prompt; a chat template writes its own BOS, plain text gets it here."""
        ids = self._ids([text])[0]
        return ids if chat else self._leading + ids

    def encode(self, scripts: Sequence[Script], *, chat: bool) -> list[Encoded]:
        """The ids of each script.

        Raises:
            DataError: a script needs EOS and the tokenizer has none.
        """
        texts: list[str] = []
        for script in scripts:
            text = ""
            for segment in script.segments:
                text += segment.text
                texts.append(text)
        cumulative = iter(self._ids(texts))
        leading = [] if chat else self._leading
        return [
            self._one(script, [next(cumulative) for _ in script.segments], leading)
            for script in scripts
        ]

    def _one(self, script: Script, cumulative: list[list[int]], leading: list[int]) -> Encoded:
        ids: list[int] = []
        learned: list[bool] = []
        for segment, joint in zip(script.segments, cumulative, strict=True):
            continues = joint[: len(ids)] == ids
            new = joint[len(ids) :] if continues else self._ids([segment.text])[0]
            ids = ids + new
            learned += [segment.learned] * len(new)
        ids, learned = leading + ids, [script.segments[0].learned] * len(leading) + learned
        ended = script.ended
        if not ended and self._add_eos:
            if self._eos is None:
                raise DataError(
                    "the tokenizer has no EOS token to end an answer with",
                    expected="an eos_token, or a chat template that writes an end marker",
                    remedy="set the tokenizer's eos_token, or add_eos: false",
                )
            if not ids or ids[-1] != self._eos:
                ids, learned = [*ids, self._eos], [*learned, True]
            ended = True
        return Encoded(ids, learned, ended)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        encoding = self._tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return [list(ids) for ids in encoding["input_ids"]]


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer puts before a text (BOS, [CLS]); often none."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a", add_special_tokens=True)["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return list(full[:start])
    return []


def eos_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of EOS, or None."""
    value = tokenizer.eos_token_id
    return value if isinstance(value, int) else None


def token_text(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    """How the vocabulary writes one token."""
    return str(tokenizer.convert_ids_to_tokens(token_id))
