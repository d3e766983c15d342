"""What tests of serving share: a byte tokenizer, saved adapters, an engine, and asking it."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from learned import shake
from lorakit.adapters.attach import attach, detach
from lorakit.adapters.spec import LoraSpec
from lorakit.formats.peft import save_adapter
from lorakit.serve.engine import Engine
from lorakit.serve.request import (
    AdapterChoice,
    EngineOptions,
    FinishedEvent,
    GenerateRequest,
    SamplingOptions,
    TokenEvent,
    TokenLogprob,
)

SPECIAL = ("<pad>", "<bos>", "<eos>")
WAIT_S = 60


def byte_tokenizer(num_tokens: int = 259) -> PreTrainedTokenizerFast:
    """Three special tokens, then one token per byte: every id of a tiny model is decodable."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Printable ASCII first, so that a vocabulary of 128 still has letters, digits and brackets.
    alphabet.sort(key=lambda c: not (33 <= ord(c) < 127))
    vocab = {token: i for i, token in enumerate([*SPECIAL, *alphabet][:num_tokens])}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


def byte_llama(*, seed: int = 0, context: int = 512) -> PreTrainedModel:
    """A tiny Llama over `byte_tokenizer`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=259,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=context,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        return LlamaForCausalLM(config).eval()


def save_learned(
    model: PreTrainedModel, spec: LoraSpec, path: Path, *, seed: int = 7, size: float = 0.2
) -> Path:
    """An adapter that has learned something, on disk; the model is left as it was."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attach(model, spec, name="one")
    shake(model, seed=seed, size=size)
    save_adapter(model, path, name="one", replace=True)
    detach(model)
    return path


@dataclass
class Reply:
    """The events of one request."""

    tokens: list[int] = field(default_factory=list[int])
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list[TokenLogprob])
    pieces: list[str] = field(default_factory=list[str])
    end: FinishedEvent | None = None
    done: Event = field(default_factory=Event)

    def on_event(self, event: TokenEvent | FinishedEvent) -> None:
        if isinstance(event, FinishedEvent):
            self.end = event
            self.done.set()
            return
        self.tokens += event.token_ids
        self.logprobs += event.logprobs
        self.text += event.text
        self.pieces.append(event.text)

    def wait(self) -> Reply:
        assert self.done.wait(WAIT_S), "the engine did not answer"
        return self

    @property
    def ended(self) -> FinishedEvent:
        assert self.end is not None
        return self.end

    @property
    def reason(self) -> str:
        return self.ended.reason


_ids = itertools.count()


def ask(
    engine: Engine,
    prompt: list[int],
    adapter: AdapterChoice = None,
    *,
    name: str | None = None,
    **sampling: object,
) -> Reply:
    """Submit, and return at once; `wait()` on what comes back."""
    reply = Reply()
    options = SamplingOptions(**sampling)  # type: ignore[arg-type]
    request = GenerateRequest(
        id=name or f"r{next(_ids)}", prompt_ids=tuple(prompt), adapter=adapter, sampling=options
    )
    engine.submit(request, reply.on_event)
    return reply


@contextmanager
def running(
    model: PreTrainedModel, tokenizer: object = None, **options: object
) -> Iterator[Engine]:
    """A started engine; stopped at the end."""
    tokenizer = tokenizer or byte_tokenizer(model.config.get_text_config().vocab_size)
    engine = Engine(model, tokenizer, options=EngineOptions(**options))  # type: ignore[arg-type]
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


def assert_same(alone: Reply, together: Reply, *, atol: float = 2e-5) -> None:
    """The same tokens, and logprobs that differ by rounding."""
    assert alone.ended.error is None, alone.ended.error
    assert together.ended.error is None, together.ended.error
    assert together.tokens == alone.tokens
    assert (together.reason, together.text) == (alone.reason, alone.text)
    for mine, theirs in zip(together.logprobs, alone.logprobs, strict=True):
        assert abs(mine.logprob - theirs.logprob) < atol


def prompts(lengths: list[int], *, vocab: int = 128, seed: int = 3) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab, (n,), generator=generator).tolist() for n in lengths]


Choices = Mapping[str, AdapterChoice]
