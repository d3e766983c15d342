"""From tokens to text as it comes: whole characters, and never a part of a stop string."""

from __future__ import annotations

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_HALF = "�"
# A token of one byte is the least there is: a character has four, and some tokenizers write a
# space in front of the first.
_CONTEXT = 6

_WRITTEN = [*range(33, 127), *range(161, 173), *range(174, 256)]
_NOT_WRITTEN = [byte for byte in range(256) if byte not in _WRITTEN]
# The letters in which byte-level tokenizers write bytes (GPT-2's table, which all of them share).
_BYTES = {
    **{chr(byte): byte for byte in _WRITTEN},
    **{chr(256 + i): byte for i, byte in enumerate(_NOT_WRITTEN)},
}
_SPACE = "\u2581"  # SentencePiece's letter for a space
_ONE_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """One token as it reads inside a text: half a character as U+FFFD, with the space in front.

    SentencePiece's tokenizers drop that space from whatever is decoded first, and alone a token is.
    """
    text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    raw = tokenizer.convert_ids_to_tokens(token)
    assert isinstance(text, str)
    assert isinstance(raw, str)
    spaces = len(raw) - len(raw.lstrip(_SPACE))
    return text if not spaces else " " * spaces + text.lstrip(" ")


def token_bytes(tokenizer: PreTrainedTokenizerBase, token: int, text: str) -> bytes | None:
    """The bytes of one token, of half a character too; None where its tokenizer does not say them.

    Args:
        tokenizer: the model's.
        token: its id.
        text: see `token_text`.
    """
    if _HALF not in text:
        return text.encode()
    raw = tokenizer.convert_ids_to_tokens(token)
    assert isinstance(raw, str)
    one = _ONE_BYTE.fullmatch(raw)
    if one is not None:
        return bytes.fromhex(one[1])
    return bytes(_BYTES[letter] for letter in raw) if all(c in _BYTES for c in raw) else None


class TextStream:
    """Decodes one answer token by token.

    Args:
        tokenizer: the model's.
        stop: the answer ends in front of the first of these.
        behind: tokens whose text this one goes on, and which is not shown.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[str] = (),
        *,
        behind: Sequence[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids = list(behind[-_CONTEXT:])
        if self._decode(self._ids).endswith(_HALF):
            self._ids = []  # nobody has seen its half character
        self._shown = len(self._ids)  # tokens whose text was handed out
        self._pending = ""  # text that may be the beginning of a stop string
        self.stopped_by: str | None = None

    def push(self, token: int) -> str:
        """The text that can be shown after this token; may be empty.

        Once a stop string was found, `stopped_by` names it and the text ends in front of it.
        """
        self._ids.append(token)
        text = self._new_text()
        # Part of a character; a token that is no character at all does not hold back for ever.
        if text.endswith(_HALF) and len(self._ids) - self._shown < _CONTEXT:
            return ""
        self._shown = len(self._ids)
        return self._without_stops(text)

    def finish(self) -> str:
        """What was held back, half characters as U+FFFD; only after the last token."""
        if self.stopped_by is not None:
            return ""
        text = self._new_text()
        self._shown = len(self._ids)
        found = self._without_stops(text)
        if self.stopped_by is None:
            found, self._pending = found + self._pending, ""
        return found

    def _new_text(self) -> str:
        """The text of the tokens that were not shown, as it reads behind those before them."""
        if self._shown == len(self._ids):
            return ""
        start = max(0, self._shown - _CONTEXT)
        before = self._decode(self._ids[start : self._shown])
        whole = self._decode(self._ids[start:])
        return whole[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text

    def _without_stops(self, text: str) -> str:
        if not self._stop:
            return text
        text = self._pending + text
        found = [(text.find(stop), stop) for stop in self._stop if stop in text]
        if found:
            place, self.stopped_by = min(found)
            self._pending = ""
            return text[:place]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._pending = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """How much of the end of `text` is the beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)
