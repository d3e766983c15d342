"""From settings to a server that answers: check, listen, load, start, answer, stop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast

from torch import nn
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lorakit.errors import RequestError
from lorakit.models.load import load_model
from lorakit.serve.auth import Keys, is_loopback
from lorakit.serve.engine import Engine
from lorakit.serve.prompts import Prompts
from lorakit.serve.request import EngineOptions
from lorakit.serve.run import ListenOptions, listen, run_server, url_of
from lorakit.serve.service import ALIAS, ServeOptions, Service


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeSettings:
    """What `lorakit serve` was asked for.

    Attributes:
        model: the base, as `load_model` takes it.
        name: the base's name in requests; None takes `model`, of a path its last part.
        quantize: "nf4" keeps the base in 4 bits.
        dtype: see `load_model`.
        device: see `load_model`.
        engine: the engine's limits, with the directory of adapters.
        pinned: adapters that are loaded at the start and kept.
        listen: where, and how to stop.
        keys: who may ask.
        without_key: listening beyond this machine without an API key is meant.
        host_names: further names that this machine is asked by.
        max_body_bytes: of one request.
        max_tokens: the longest answer that a request may ask for.
    """

    model: str
    name: str | None = None
    quantize: Literal["nf4"] | None = None
    dtype: str | None = None
    device: str | None = None
    engine: EngineOptions = field(default_factory=EngineOptions)
    pinned: tuple[str, ...] = ()
    listen: ListenOptions = field(default_factory=ListenOptions)
    keys: Keys = field(default_factory=Keys)
    without_key: bool = False
    host_names: tuple[str, ...] = ()
    max_body_bytes: int = 1 << 20
    max_tokens: int = 4096


def serve(settings: ServeSettings, *, on_ready: Callable[[Service, str], None]) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Everything that can be refused is refused before the model is loaded.

    Args:
        settings: what to serve, where and to whom.
        on_ready: called with the service and its address when requests are answered.

    Raises:
        RequestError: the address cannot be had, or may not be without a key; no such directory.
        ModelError, MemoryPlanError: see `load_model`.
        AdapterFileError: a pinned adapter cannot be served.
    """
    check(settings)
    with listen(settings.listen) as listening:
        model, tokenizer = load_model(
            settings.model, settings.quantize, dtype=settings.dtype, device=settings.device
        )
        with started(model, tokenizer, settings) as service:
            for name in settings.pinned:
                service.engine.pool.load(name, pin=True)
            url = url_of(listening)
            run_server(service, listening, settings.listen, on_ready=lambda: on_ready(service, url))


def check(settings: ServeSettings) -> None:
    """Refuse settings that cannot be, before any work is done.

    Raises:
        RequestError: says which.
    """
    keys, directory = settings.keys, settings.engine.adapters_dir
    if not (is_loopback(settings.listen.host) or keys.api or settings.without_key):
        raise RequestError(
            "the server would answer everybody who can reach this machine",
            where=f"--host {settings.listen.host}",
            expected="an API key",
            remedy="set LORAKIT_API_KEY or --api-key; --no-key if something in front asks for one",
        )
    if keys.admin is not None and keys.admin == keys.api:
        raise RequestError(
            "the admin key and the API key are the same",
            expected="two keys: not everybody who may ask may load adapters",
        )
    if directory is not None and not directory.is_dir():
        raise RequestError(
            "the directory of adapters is not there",
            where=f"--adapters {directory}",
            expected="a directory with one directory per adapter",
            remedy="make it, or leave --adapters out to serve the base alone",
        )
    if settings.pinned and directory is None:
        raise RequestError(
            "--pin names an adapter, and there are none", remedy="give --adapters DIR"
        )


@contextmanager
def started(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: ServeSettings
) -> Iterator[Service]:
    """A running engine behind a service; stopped at the end of the block.

    Args:
        model: a base with nothing attached; the engine's until the end of the block.
        tokenizer: its tokenizer.
        settings: limits, names and keys.

    Raises:
        RequestError: an adapter has the base's name; see also `Engine`.
    """
    name = settings.name or base_name(settings.model)
    engine = Engine(model, tokenizer, options=settings.engine)
    embeddings = cast(nn.Embedding, model.get_input_embeddings())
    prompts = Prompts(tokenizer, num_embeddings=embeddings.num_embeddings)
    loopback = is_loopback(settings.listen.host)
    names = frozenset({"localhost", settings.listen.host, *settings.host_names})
    options = ServeOptions(
        name=name,
        adapters_dir=settings.engine.adapters_dir,
        keys=settings.keys,
        max_body_bytes=settings.max_body_bytes,
        max_tokens=settings.max_tokens,
        max_context=engine.context,
        host_names=names if loopback else None,
    )
    try:
        _refuse_hidden(engine, name)
        engine.start()
        yield Service(engine, prompts, options=options)
    finally:
        engine.stop()
        prompts.close()


def base_name(ref: str) -> str:
    """What requests call a base: its hub id or name, or the last part of its path."""
    path = Path(ref).expanduser()
    if not path.exists():
        return ref
    return path.stem if path.is_file() else path.resolve().name


def _refuse_hidden(engine: Engine, base: str) -> None:
    taken = {info.name for info in engine.pool.list()} & {base, ALIAS}
    if taken:
        raise RequestError(
            "an adapter has the base's name: no request could mean it",
            where=f"--adapters {engine.options.adapters_dir}",
            found=", ".join(sorted(taken)),
            remedy="rename its directory"
            + ("" if ALIAS in taken else ", or give the base another name: --name"),
        )
