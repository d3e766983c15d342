"""Schemas and tokenizers that cannot be used are the request's fault, and say so."""

from __future__ import annotations

from pathlib import Path

import pytest

import tiny_runs
from lorakit.errors import RequestError
from lorakit.models.load import load_tokenizer
from lorakit.serve.constrain import Constrainer


def test_a_tokenizer_of_whole_words_cannot_write_json(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_runs.write_model(tmp_path / "words")))
    constrainer = Constrainer(tokenizer, 70, [2])
    for _ in range(2):
        with pytest.raises(RequestError, match="cannot answer by a JSON schema"):
            constrainer.constraint({"type": "object"})


def test_a_schema_that_is_none(served_base: Path) -> None:
    constrainer = Constrainer(load_tokenizer(str(served_base)), 262, [2])
    with pytest.raises(RequestError, match="schema cannot be used"):
        constrainer.constraint({"type": "no such type"})
    assert constrainer.constraint({"type": "integer"}).allowed().shape[0] >= 262
