"""Turn a GGUF file into a Hugging Face directory, once, and keep it in a cache.

The quantized blocks are multiplied out to float32, which holds their values exactly; bfloat16
would round them a second time. The directory is keyed by the hash of the file's content.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from filelock import FileLock
from gguf import GGUFReader
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import modeling_gguf_pytorch_utils as gguf_loader
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lorakit.errors import ModelError
from lorakit.files import atomic_directory
from lorakit.formats.gguf_header import check_gguf_header
from lorakit.models.quiet import quiet_transformers
from lorakit.progress import progress

# Part of the cache key: raise it when a converted directory would come out different.
_LAYOUT = "v1"
# Tokenizers that split every digit before the byte-level rule. transformers builds the plain
# byte-level splitter for all of them, which tokenizes "a  1" and the like differently.
_DIGIT_SPLITTING = frozenset(
    {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
)


class _HasBackend(Protocol):
    @property
    def backend_tokenizer(self) -> Tokenizer: ...


def cache_directory() -> Path:
    """Where converted models are kept: $LORAKIT_CACHE, else the user's cache directory."""
    own = os.environ.get("LORAKIT_CACHE")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "lorakit"


def converted(file: str | Path, *, name: str) -> Path:
    """The directory with the file's model as safetensors, converting it if it is not cached yet.

    Safe when several processes ask at once: one converts, the others wait for it.

    Args:
        file: a GGUF file.
        name: the name shown while it is converted.

    Raises:
        ModelError: the file is missing, is not GGUF, or holds an architecture that transformers
            does not convert.
        OutputError: the cache cannot be written.
    """
    file = Path(file)
    _require_gguf(file)
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", file.stem)
    directory = cache_directory() / "gguf" / f"{stem}-{digest[:16]}-{_LAYOUT}"
    if _is_complete(directory):
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(directory.with_name(f"{directory.name}.lock")):
        if not _is_complete(directory):
            started = time.monotonic()
            print(f"converting {name} from GGUF, once (about 30 s) ...", file=sys.stderr)
            _convert(file, directory, digest)
            elapsed_s = time.monotonic() - started
            print(f"converted in {elapsed_s:.0f} s, kept in {directory}", file=sys.stderr)
    return directory


def _is_complete(directory: Path) -> bool:
    # The directory takes its name only when it is whole, so one file is proof enough.
    return (directory / "config.json").is_file()


def _require_gguf(file: Path) -> None:
    if not file.is_file():
        raise ModelError(
            "the GGUF file cannot be found", where=str(file), remedy="check the path of the model"
        )
    with file.open("rb") as stream:
        magic = stream.read(4)
    if magic != b"GGUF":
        raise ModelError(
            "this file is not GGUF",
            where=str(file),
            expected="a file that begins with the bytes 'GGUF'",
            found=f"{magic!r}" if magic else "an empty file",
            remedy="download the file again; a git-lfs pointer or a web page looks like this",
        )


def _convert(file: Path, directory: Path, digest: str) -> None:
    with _reading(file):
        check_gguf_header(file)
    with progress(f"converting {file.stem}", total=3) as bar:
        model, missing = _read_model(file)
        bar.advance(note="weights read")
        tokenizer = _read_tokenizer(file)
        bar.advance(note="tokenizer read")
        if missing:
            raise ModelError(
                "the GGUF file lacks tensors of its architecture",
                where=str(file),
                found=f"{len(missing)} missing: {', '.join(missing[:5])}",
                remedy="use a complete GGUF file",
            )
        _forget_quantization(model)
        with quiet_transformers(), atomic_directory(directory, replace=True) as staging:
            model.save_pretrained(staging)
            tokenizer.save_pretrained(staging)
            (staging / "source.txt").write_text(f"{file.name}\nsha256 {digest}\n", encoding="utf-8")
            for entry in staging.iterdir():
                entry.chmod(0o644)
        bar.advance(note="saved")


def _read_model(file: Path) -> tuple[PreTrainedModel, list[str]]:
    with quiet_transformers(), _no_gguf_bar(), _reading(file):
        model, info = cast(
            tuple[PreTrainedModel, dict[str, Any]],
            AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, dtype=torch.float32, output_loading_info=True
            ),
        )
    return model, sorted(info["missing_keys"])


def _read_tokenizer(file: Path) -> PreTrainedTokenizerBase:
    with quiet_transformers(), _reading(file):
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        fields = GGUFReader(file).fields
    pre = fields.get("tokenizer.ggml.pre")
    if pre is not None and pre.contents() in _DIGIT_SPLITTING:
        backend = cast(_HasBackend, tokenizer).backend_tokenizer
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    architecture = fields.get("general.architecture")
    if architecture is not None:
        length = fields.get(f"{architecture.contents()}.context_length")
        if length is not None:
            tokenizer.model_max_length = int(length.contents())
    return tokenizer


def _forget_quantization(model: PreTrainedModel) -> None:
    """Make the model what it now is: dense. Otherwise the saved config still calls it GGUF."""
    for config in (model.config, model.generation_config):
        vars(config).pop("quantization_config", None)
    # save_pretrained reads these before it decides how to write the tensors.
    for attribute in ("hf_quantizer", "quantization_method", "is_quantized"):
        vars(model).pop(attribute, None)
    # The file's own title is not a place that anything could be loaded from.
    vars(model.config).pop("_model_name_or_path", None)
    model.config.name_or_path = ""


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Every way a broken or foreign GGUF file fails in the readers becomes one ModelError."""
    try:
        yield
    except ModelError:
        raise
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise ModelError(
            "the GGUF file cannot be converted",
            where=str(file),
            expected="a whole GGUF file of an architecture that transformers knows",
            found=f"{type(error).__name__}: {reason[0] if reason else 'no message'}",
            remedy="download the file again, or use the model's safetensors",
        ) from error


@contextmanager
def _no_gguf_bar() -> Iterator[None]:
    # This one bar is drawn by tqdm itself, past transformers' own switch.
    module = cast(_HasBar, gguf_loader)
    original = module.tqdm
    module.tqdm = _plain_iteration
    try:
        yield
    finally:
        module.tqdm = original


class _HasBar(Protocol):
    tqdm: Callable[..., Any]


def _plain_iteration(items: Any, desc: str = "") -> Any:
    return items
