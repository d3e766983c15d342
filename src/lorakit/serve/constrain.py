"""Answers that are JSON of a given schema, through llguidance."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lorakit.errors import RequestError, ServeError


class JsonConstraint:
    """One answer's place in its grammar.

    Args:
        matcher: llguidance's, at the start of the answer.
        ends: the tokens that end an answer: the grammar lets them in where the document is whole.
    """

    def __init__(self, matcher: Any, ends: Sequence[int]) -> None:
        self._matcher = matcher
        self._ends = frozenset(ends)

    def allowed(self) -> Tensor:
        """(vocabulary,) bool on the CPU."""
        bits = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        places = torch.arange(8, dtype=torch.uint8)
        return ((bits[:, None] >> places) & 1).bool().flatten()

    def accept(self, token: int) -> None:
        """Go on behind this token.

        Raises:
            ServeError: the grammar failed, for its own limits as a rule.
        """
        if token not in self._ends:
            self._matcher.consume_token(token)
        if self._matcher.is_error():
            raise ServeError(
                "the answer left its JSON schema", found=str(self._matcher.get_error())
            )


class Constrainer:
    """Compiles schemas for one tokenizer; the tokenizer's own table is built at the first schema.

    Args:
        tokenizer: the model's.
        num_tokens: the width of the model's logits.
        ends: token ids that end an answer.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, num_tokens: int, ends: Sequence[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._num_tokens = num_tokens
        self._ends = tuple(ends)
        self._table: Any = None
        self._lock = Lock()

    def constraint(self, schema: Mapping[str, Any]) -> JsonConstraint:
        """A constraint at the start of an answer; from any thread.

        The first call takes about a second, each schema milliseconds to a second.

        Raises:
            RequestError: llguidance is not installed, the tokenizer or the schema cannot be used.
        """
        try:
            import llguidance
            import llguidance.hf
        except ImportError as error:
            raise RequestError(
                "answers by a JSON schema need the package llguidance",
                remedy="pip install 'lorakit[serve]'",
            ) from error
        if not isinstance(self._tokenizer, PreTrainedTokenizerFast) or not self._ends:
            raise RequestError(
                "this model cannot answer by a JSON schema",
                where="json_schema",
                expected="a fast tokenizer, and a token that ends an answer",
                found=type(self._tokenizer).__name__,
            )
        with self._lock:
            if self._table is None:
                try:
                    self._table = llguidance.hf.from_tokenizer(
                        self._tokenizer, n_vocab=self._num_tokens, eos_token=list(self._ends)
                    )
                except ValueError as error:
                    raise RequestError(
                        "this model cannot answer by a JSON schema",
                        where="json_schema",
                        expected="a tokenizer whose tokens are bytes or pieces of text",
                        found=str(error).splitlines()[0],
                    ) from error
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema))
        except (TypeError, ValueError) as error:
            raise _bad_schema(str(error)) from error
        failed, notes = llguidance.LLMatcher.validate_grammar_with_warnings(grammar, self._table)
        if failed:
            raise _bad_schema(notes[0])
        return JsonConstraint(llguidance.LLMatcher(self._table, grammar), self._ends)


def _bad_schema(reason: str) -> RequestError:
    return RequestError(
        "the JSON schema cannot be used",
        where="json_schema",
        found=reason.strip().splitlines()[0],
        remedy="correct the schema",
    )
