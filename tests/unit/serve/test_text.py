from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from lorakit.serve.text import TextStream, token_bytes, token_text
from serving import byte_tokenizer

TEXT = "Grüße, 世界! 🙂 naïve\tend"


def test_bytes_come_out_as_whole_characters() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer(TEXT).input_ids
    assert len(ids) > len(TEXT)
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.finish() == TEXT
    assert not any("�" in piece for piece in pieces)
    assert "世" in pieces


def test_half_a_character_is_held_back_and_shown_at_the_end() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("a世").input_ids[:-1]
    stream = TextStream(tokenizer)
    assert [stream.push(token) for token in ids] == ["a", "", ""]
    assert "�" in stream.finish()


def test_bytes_that_are_no_character_do_not_hold_back_for_ever() -> None:
    tokenizer = byte_tokenizer()
    half = tokenizer("世").input_ids[1]
    stream = TextStream(tokenizer)
    shown = "".join(stream.push(token) for token in [half] * 40)
    assert shown.count("�") >= 20


def test_special_tokens_are_not_text() -> None:
    tokenizer = byte_tokenizer()
    stream = TextStream(tokenizer)
    ids = [1, *tokenizer("ab").input_ids, 2]
    assert "".join(stream.push(token) for token in ids) + stream.finish() == "ab"


@pytest.mark.parametrize("stop", [("STOP",), ("zzz", "STOP"), ("TOP!", "STOP")])
def test_text_ends_in_front_of_the_first_stop_string(stop: tuple[str, ...]) -> None:
    tokenizer = byte_tokenizer()
    stream = TextStream(tokenizer, stop)
    shown = ""
    for token in tokenizer("one STO two STOP! three").input_ids:
        shown += stream.push(token)
        assert "STOP" not in shown
        if stream.stopped_by:
            break
    assert shown + stream.finish() == "one STO two "
    assert stream.stopped_by == "STOP"


def test_what_may_begin_a_stop_string_is_held_back_until_it_cannot() -> None:
    tokenizer = byte_tokenizer()
    stream = TextStream(tokenizer, ("abc",))
    assert [stream.push(t) for t in tokenizer("xabd").input_ids] == ["x", "", "", "abd"]
    assert [stream.push(t) for t in tokenizer("ab").input_ids] == ["", ""]
    assert stream.finish() == "ab"
    assert stream.stopped_by is None


def test_the_bytes_of_tokens_are_those_of_the_text() -> None:
    tokenizer = byte_tokenizer()
    text = "é漢🙂a~"
    ids = tokenizer(text).input_ids
    alone = [tokenizer.decode([token]) for token in ids]
    assert any("\ufffd" in one for one in alone)
    found = [token_bytes(tokenizer, token, one) for token, one in zip(ids, alone, strict=True)]
    assert b"".join(one or b"?" for one in found).decode() == text
    # Llama's way of writing a byte, and a token of which nothing is known.
    vocab = {"<0xF0>": 0, "<0x0A>": 1, "\ufffd": 2, "a": 3}
    pieces = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab, [])))
    assert token_bytes(pieces, 0, "\ufffd") == b"\xf0"
    assert token_bytes(pieces, 1, "\n") == b"\n"
    assert token_bytes(pieces, 2, "\ufffd") is None
    assert token_bytes(pieces, 3, "a") == b"a"


def sentence_pieces() -> PreTrainedTokenizerFast:
    """Decoded as Llama 2's and Mistral's tokenizers do it."""
    pieces = [
        "<s>",
        "\u2581The",
        "\u2581sky",
        "\u2581is",
        "\u2581",
        "\u2581\u2581",
        "<0xC3>",
        "<0xA9>",
        ".",
    ]
    raw = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    raw.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>")


def test_a_text_that_goes_on_keeps_the_space_it_begins_with() -> None:
    tokenizer = sentence_pieces()
    alone, behind = TextStream(tokenizer), TextStream(tokenizer, behind=[0, 1])
    assert [alone.push(token) for token in (2, 3)] == ["sky", " is"]
    assert [behind.push(token) for token in (2, 3)] == [" sky", " is"]
    # Half a character at the end of the prompt was never shown, and takes nothing away.
    halved = TextStream(tokenizer, behind=[1, 6])
    assert halved.push(8) == "."


def test_a_token_s_own_text_has_its_spaces() -> None:
    tokenizer = sentence_pieces()
    texts = [token_text(tokenizer, token) for token in (1, 2, 3, 8, 5, 4)]
    assert "".join(texts) == " The sky is.   "
    assert token_text(tokenizer, 6) == "\ufffd"
    assert token_text(tokenizer, 0) == "<s>"
    assert token_text(byte_tokenizer(), byte_tokenizer()(" ").input_ids[0]) == " "
