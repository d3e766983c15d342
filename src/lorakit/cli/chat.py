"""`lorakit chat`: talk with a model; /base and /adapter switch while you talk."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
from dataclasses import dataclass, field

import torch
from transformers import GenerationConfig, TextStreamer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lorakit.cli import console
from lorakit.cli.session import Session, add_model_arguments, open_session
from lorakit.cli.settings import trained_settings
from lorakit.data.endings import end_of_sequence_ids
from lorakit.data.formats import Dialogue, Message
from lorakit.data.options import SftOptions
from lorakit.data.render import Renderer
from lorakit.errors import RequestError
from lorakit.models.generation import context_length
from lorakit.models.vocabulary import require_embeddings

with contextlib.suppress(ImportError):
    # Loading it is enough: input() then has history and line editing.
    importlib.import_module("readline")

SUMMARY = "talk with a model, with or without its adapter"

_COMMANDS = {
    "/base": "answer with the base alone",
    "/adapter": "answer with the adapter",
    "/both": "let both answer; the adapter's answer goes into the history",
    "/reset": "forget the conversation",
    "/help": "this list",
    "/quit": "leave (so does Ctrl-D)",
}


@dataclass
class _Talk:
    session: Session
    max_new_tokens: int
    temperature: float
    renderer: Renderer
    system: str | None
    labels: list[str]
    turns: list[dict[str, str]] = field(default_factory=list)
    log: list[dict[str, str]] = field(default_factory=list)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `lorakit chat`."""
    add_model_arguments(parser)
    parser.add_argument(
        "--system",
        metavar="TEXT",
        help="a system turn at the beginning; by default as the adapter was trained; '' for none",
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="N", help="the longest answer, in tokens"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0 (the default): always the likeliest token; higher: more random",
    )


def run(args: argparse.Namespace) -> int:
    """Read lines until the end of input and answer each; returns the exit code."""
    if args.temperature < 0 or args.max_new_tokens < 1:
        raise RequestError(
            "--temperature must not be negative, --max-new-tokens at least 1",
            where="the command line",
        )
    session = open_session(args)
    options = _options(args)
    if not (options.chat_template or session.tokenizer.chat_template):
        raise RequestError(
            "this model has no chat template",
            where=session.ref,
            expected="an instruction-tuned model",
            remedy="continue plain text with: lorakit generate --plain",
        )
    talk = _Talk(
        session,
        args.max_new_tokens,
        args.temperature,
        Renderer(session.tokenizer, options),
        options.system,
        labels=list(session.systems)[-1:],
    )
    if sys.stdin.isatty():
        console.note("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves")
    _loop(talk)
    if args.json:
        console.print_json({"model": session.ref, "turns": talk.log})
    return 0


_KEPT = ("system", "chat_template", "template_options")


def _options(args: argparse.Namespace) -> SftOptions:
    """How turns are rendered: as the adapter was trained, but always with the chat template."""
    trained = {} if args.adapter is None else trained_settings(args.adapter)
    if trained.get("template") == "none":
        console.warn(
            "the adapter was trained without the chat template, which a chat needs; lorakit "
            "generate renders a prompt as it was trained"
        )
    kept = {k: v for k, v in trained.items() if k in _KEPT}
    if args.system is not None:
        kept["system"] = args.system or None
    elif "system" in kept:
        console.note(f"as the adapter was trained: system {kept['system']!r}")
    return SftOptions(**kept, template="chat")


def _loop(talk: _Talk) -> None:
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line in ("/quit", "/exit"):
            return
        if line.startswith("/"):
            _command(talk, line)
        elif line:
            _answer(talk, line)


def _command(talk: _Talk, line: str) -> None:
    systems = list(talk.session.systems)
    if line == "/reset":
        talk.turns.clear()
        console.note("the conversation starts again")
    elif line == "/both":
        talk.labels = systems
        console.note(f"answering: {', '.join(talk.labels)}")
    elif line.removeprefix("/") in systems:
        talk.labels = [line.removeprefix("/")]
        console.note(f"answering: {talk.labels[0]}")
    elif line == "/adapter":
        console.note("there is no adapter: start with --adapter DIR")
    else:
        for name, meaning in _COMMANDS.items():
            console.note(f"{name:<9} {meaning}")


def _answer(talk: _Talk, line: str) -> None:
    talk.turns.append({"role": "user", "content": line})
    talk.log.append({"role": "user", "content": line})
    text = ""
    for label in talk.labels:
        if len(talk.labels) > 1:
            console.print_text(f"[{label}]")
        try:
            text = _stream(talk, label)
        except KeyboardInterrupt:
            console.print_text("")
            console.note("stopped")
            talk.turns.pop()
            return
        talk.log.append({"role": "assistant", "system": label, "content": text})
    talk.turns.append({"role": "assistant", "content": text})


def _stream(talk: _Talk, label: str) -> str:
    """Print one answer while it is made; returns its text."""
    model, tokenizer = talk.session.model, talk.session.tokenizer
    prompt = _prompt(talk, tokenizer)
    require_embeddings(model, tokenizer, prompt)
    eos_ids = end_of_sequence_ids(model, tokenizer)
    pad_ids = () if tokenizer.pad_token_id is None else (tokenizer.pad_token_id,)
    settings = GenerationConfig(
        do_sample=talk.temperature > 0,
        temperature=talk.temperature or None,
        max_new_tokens=talk.max_new_tokens,
        pad_token_id=next(iter((*pad_ids, *eos_ids)), None),
        eos_token_id=list(eos_ids) or None,
    )
    ids = torch.tensor([prompt], device=model.device)
    with talk.session.systems[label](), torch.inference_mode():
        output = model.generate(  # pyright: ignore[reportCallIssue]
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=settings,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        )
    return str(tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True)).strip()


def _prompt(talk: _Talk, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The conversation as tokens; the oldest exchanges are left out when the context is full."""
    context = context_length(talk.session.model)
    start = 0
    while True:
        turns: list[Message] = [dict(turn) for turn in talk.turns[start:]]
        if talk.system:
            turns.insert(0, {"role": "system", "content": talk.system})
        text = talk.renderer.prompt(Dialogue(turns), "the conversation")
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        if context is None or len(ids) + talk.max_new_tokens <= context:
            break
        if start + 2 >= len(talk.turns):
            raise RequestError(
                "this turn does not fit into the model's context",
                expected=f"at most {context - talk.max_new_tokens:,} tokens",
                found=f"{len(ids):,} tokens",
            )
        start += 2
    if start:
        console.note(f"the context is full: the first {start // 2} exchanges are left out")
    return ids
