"""`lorakit serve`: many adapters over one base, behind OpenAI's interface."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from lorakit.cli import console
from lorakit.errors import RequestError

if TYPE_CHECKING:
    from lorakit.serve.service import Service
    from lorakit.serve.start import ServeSettings

SUMMARY = "serve many adapters over one base, behind OpenAI's interface"

# Flag -> default, meaning.
_LIMITS: dict[str, tuple[int, str]] = {
    "--max-batch": (16, "requests answered together"),
    "--max-queue": (256, "requests that wait; one more gets 429"),
    "--max-total-tokens": (65536, "tokens of running requests that the cache holds"),
    "--max-tokens": (4096, "the longest answer a request may ask for"),
    "--max-body-bytes": (1 << 20, "the longest request"),
    "--max-adapters-ram": (64, "adapters kept in memory"),
    "--max-adapters-device": (32, "adapters kept on the device"),
    "--max-rank": (512, "adapters of a higher rank are refused"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `lorakit serve`."""
    _add_model_arguments(parser)
    _add_network_arguments(parser)
    for flag, (default, meaning) in _LIMITS.items():
        parser.add_argument(flag, type=int, default=default, metavar="N", help=meaning)


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--model",
        "--base",
        metavar="REF",
        required=True,
        help="the base: a hub id, a directory, a .gguf file or a named model",
    )
    add(
        "--adapters",
        metavar="DIR",
        type=Path,
        help="a directory of adapters, each under its own name; loaded when first asked for",
    )
    add(
        "--name",
        metavar="NAME",
        help="the base's name in requests; by default REF, of a path its last part",
    )
    add(
        "--pin",
        action="append",
        default=[],
        metavar="ADAPTER",
        help="load this adapter at the start and keep it; may be repeated",
    )
    add("--quantize", choices=["nf4"], help="keep the base in 4 bits")
    add(
        "--dtype",
        choices=["float32", "bfloat16", "float16", "auto"],
        help="load the weights as this; by default float32 on a CPU, bfloat16 on CUDA",
    )
    add("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, ...")
    add(
        "--no-prepack",
        action="store_true",
        help="on a CPU: no second copy of the large weights for faster steps; half the memory",
    )
    add("--any-base", action="store_true", help="accept adapters trained on another base")


def _add_network_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="the address to listen on (default: %(default)s, this machine only)",
    )
    add("--port", type=int, default=8000, metavar="N", help="0 takes a free one")
    add(
        "--api-key",
        metavar="KEY",
        help="what every request must carry; by default $LORAKIT_API_KEY, which ps does not show",
    )
    add(
        "--admin-key",
        metavar="KEY",
        help="what loading and unloading must carry; by default $LORAKIT_ADMIN_KEY; without one "
        "both are off",
    )
    add("--no-key", action="store_true", help="listen beyond this machine without an API key")
    add(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="another name that this machine is asked by, as behind a proxy; may be repeated",
    )
    add(
        "--log",
        choices=["json", "text"],
        help="the log's form on stderr; by default text on a terminal, json elsewhere",
    )
    add(
        "--drain-timeout",
        type=float,
        default=30,
        metavar="S",
        help="seconds that requests under way have after SIGTERM",
    )


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C; returns the exit code."""
    _check(args)
    server = _server()
    console.note(f"loading {args.model}")
    server.serve(
        _settings(args, server),
        on_ready=lambda service, url: say_ready(service, url, as_json=args.json),
    )
    return 0


def _check(args: argparse.Namespace) -> None:
    wrong = [flag for flag in _LIMITS if vars(args)[flag[2:].replace("-", "_")] < 1]
    if wrong:
        raise RequestError(f"{wrong[0]} must be at least 1", where="the command line")
    if args.drain_timeout < 0:
        raise RequestError("--drain-timeout must not be negative", where="the command line")
    if not 0 <= args.port <= 65535:
        raise RequestError("--port must be from 0 to 65535", where="the command line")


def _settings(args: argparse.Namespace, server: ModuleType) -> ServeSettings:
    api_key = args.api_key or os.environ.get("LORAKIT_API_KEY") or None
    admin_key = args.admin_key or os.environ.get("LORAKIT_ADMIN_KEY") or None
    return server.ServeSettings(
        model=args.model,
        name=args.name,
        quantize=args.quantize,
        dtype=args.dtype,
        device=args.device,
        engine=server.EngineOptions(
            max_batch=args.max_batch,
            max_queue=args.max_queue,
            max_total_tokens=args.max_total_tokens,
            adapters_dir=args.adapters,
            max_adapters_ram=args.max_adapters_ram,
            max_adapters_device=args.max_adapters_device,
            max_rank=args.max_rank,
            any_base=args.any_base,
            prepack=not args.no_prepack,
        ),
        pinned=tuple(args.pin),
        listen=server.ListenOptions(
            host=args.host,
            port=args.port,
            drain_s=args.drain_timeout,
            log=args.log or ("text" if sys.stderr.isatty() else "json"),
        ),
        keys=server.Keys(api=api_key, admin=admin_key),
        without_key=args.no_key,
        host_names=tuple(args.allow_host),
        max_body_bytes=args.max_body_bytes,
        max_tokens=args.max_tokens,
    )


def say_ready(service: Service, url: str, *, as_json: bool) -> None:
    """Print what is served and where, and warn of what is not; reads configurations only."""
    infos = service.engine.pool.list()
    refused = {info.name: info.problem for info in infos if info.problem is not None}
    for name, problem in refused.items():
        console.warn(f"the adapter {name} is not served: {problem}")
    directory = service.options.adapters_dir
    if directory is not None and not infos:
        console.warn(_no_adapters(directory))
    names = [info.name for info in infos if info.problem is None]
    if as_json:
        record = {"url": url, "model": service.options.name, "adapters": names, "refused": refused}
        console.print_json(record)
        return
    adapters = "1 adapter" if len(names) == 1 else f"{len(names):,} adapters"
    console.print_text(f"serving {service.options.name} and {adapters} on {url}")


def _no_adapters(directory: Path) -> str:
    if (directory / "adapter_config.json").is_file():
        return f"{directory} is an adapter itself, so none is served: give the directory above it"
    wanted = "a directory with adapter_config.json, or with `adapter` in it as training leaves it"
    return f"there are no adapters in {directory}: each is {wanted}"


def _server() -> ModuleType:
    """The server's module, which needs the libraries of the extra `serve`."""
    try:
        return importlib.import_module("lorakit.serve.start")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("lorakit"):
            raise
        raise RequestError(
            "a library that the server needs is not installed",
            found=f"no module {error.name}",
            remedy="pip install 'lorakit[serve]'",
        ) from error
