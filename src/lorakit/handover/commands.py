"""The commands and files with which other engines serve an adapter, and a check of their words."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorakit.errors import RequestError
from lorakit.handover.rules import vllm_max_rank

# Of `vllm serve`, those that are printed here.
_VLLM_FLAGS = {
    "--enable-lora": 0,
    "--max-loras": 1,
    "--max-cpu-loras": 1,
    "--max-lora-rank": 1,
    "--lora-modules": 1,
    "--chat-template": 1,
    "--host": 1,
    "--port": 1,
    "--served-model-name": 1,
}
_LLAMA_FLAGS = {
    "--model": 1,
    "--lora": 1,
    "--alias": 1,
    "--host": 1,
    "--jinja": 0,
    "--chat-template-file": 1,
    "--outfile": 1,
    "--remote": 0,
}
_MLX_FLAGS = {"--model": 1, "--adapter-path": 1, "--prompt": 1}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """What a command speaks of.

    Attributes:
        base: the base as the other engine finds it: a hub id or a directory.
        name: the adapter's name in requests.
        directory: where the exported adapter lies.
        r: its rank; 0 where the command does not say it.
        template: the chat template that it was trained with, if that is not the base's.
    """

    base: str
    name: str
    directory: Path
    r: int = 0
    template: Path | None = None


def vllm_command(place: Place) -> str:
    """`vllm serve` with this adapter; more of them are added as NAME=DIR after --lora-modules."""
    words = ["vllm", "serve", place.base, "--enable-lora"]
    words += ["--max-loras", "8", "--max-cpu-loras", "64"]
    words += ["--max-lora-rank", str(vllm_max_rank(place.r))]
    words += ["--lora-modules", f"{place.name}={place.directory}", "--host", "127.0.0.1"]
    words += ["--chat-template", str(place.template)] if place.template else []
    command = shlex.join(words)
    lint_command(command, ("vllm", "serve"), _VLLM_FLAGS)
    return command


def llama_command(place: Place, file: Path) -> str:
    """`llama-server` with this adapter over a GGUF file of the base.

    Where the base is a checkpoint, llama.cpp's own converter makes that file first.

    Args:
        place: the base: a .gguf file, a checkpoint's directory or a hub id.
        file: the adapter.
    """
    model = place.base
    words: list[str] = []
    if not model.endswith(".gguf"):
        model = str(place.directory / "base.gguf")
        words = ["python", "convert_hf_to_gguf.py", place.base, "--outfile", model]
        words += [] if Path(place.base).is_dir() else ["--remote"]
        lint_command(shlex.join(words), ("python", "convert_hf_to_gguf.py"), _LLAMA_FLAGS)
    serve = ["llama-server", "--model", model, "--lora", str(file)]
    serve += ["--alias", place.name, "--host", "127.0.0.1"]
    serve += ["--jinja", "--chat-template-file", str(place.template)] if place.template else []
    command = shlex.join(serve)
    lint_command(command, ("llama-server",), _LLAMA_FLAGS)
    return f"{shlex.join(words)} && {command}" if words else command


def mlx_command(place: Place) -> str:
    """`mlx_lm.generate` with this adapter; `mlx_lm.server` takes the same two paths."""
    words = ["mlx_lm.generate", "--model", place.base, "--adapter-path", str(place.directory)]
    command = shlex.join([*words, "--prompt", "Hello"])
    lint_command(command, ("mlx_lm.generate",), _MLX_FLAGS)
    return command


def ray_file(place: Place) -> str:
    """A Ray Serve application: vLLM's engine, adapters from the directory above this one.

    Clients send `model="BASE:NAME"`; Ray routes to a replica that holds the adapter already.
    """
    rank = vllm_max_rank(place.r)
    adapters = str(place.directory.resolve().parent)
    text = f'''"""Ray Serve over {place.base}; run it with: serve run ray_serve:app"""

from ray.serve.llm import LLMConfig, build_openai_app

config = LLMConfig(
    model_loading_config={{"model_id": "base", "model_source": {place.base!r}}},
    # A cloud address (s3://, gs://) where replicas run on several machines.
    lora_config={{
        "dynamic_lora_loading_path": {adapters!r},
        "max_num_adapters_per_replica": 16,
    }},
    engine_kwargs={{"enable_lora": True, "max_loras": 16, "max_lora_rank": {rank}}},
    deployment_config={{"autoscaling_config": {{"min_replicas": 1, "max_replicas": 2}}}},
)
app = build_openai_app({{"llm_configs": [config]}})
'''
    ast.parse(text)
    return text


def check_name(name: str) -> None:
    """Refuse a name that would break a command line or a path.

    Raises:
        RequestError: it holds other characters than letters, digits, `.`, `_` and `-`.
    """
    if not _NAME.fullmatch(name):
        raise RequestError(
            "this cannot be an adapter's name in a command",
            where="--name",
            expected="letters, digits, '.', '_', '-'",
            found=name,
        )


def lint_command(command: str, start: Sequence[str], flags: Mapping[str, int]) -> None:
    """Check that a command reads back as it was meant: its program, known flags, their values.

    Raises:
        RequestError: a flag that the program does not have, or one without its value.
    """
    words = shlex.split(command)
    rest = words[len(start) :]
    wrong = None if tuple(words[: len(start)]) == tuple(start) else f"starts with {words[:2]}"
    while rest and wrong is None:
        word, *rest = rest
        if not word.startswith("--"):
            continue
        count = flags.get(word)
        values = rest[:count] if count is not None else []
        if count is None:
            wrong = f"no flag {word}"
        elif len(values) < count or any(value.startswith("--") for value in values):
            wrong = f"{word} without its value"
        rest = rest[len(values) :]
    if wrong is not None:
        raise RequestError("the command is not one", where=command, found=wrong)
