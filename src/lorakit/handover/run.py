"""Export: read, check, fold, write, and say what to type."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from lorakit.adapters.adapter import Adapter
from lorakit.data.trained import TEMPLATE_NAME, trained_data
from lorakit.errors import AdapterFileError, RequestError
from lorakit.files import require_free, write_text
from lorakit.formats.peft import TENSORS_NAME, read_adapter, write_adapter
from lorakit.formats.peft_config import CONFIG_NAME
from lorakit.handover.commands import (
    Place,
    check_name,
    llama_command,
    mlx_command,
    ray_file,
    vllm_command,
)
from lorakit.handover.converted import gguf_of, write_converted
from lorakit.handover.rules import LLAMA_CPP, MLX, PEFT, VLLM, EngineRules, check
from lorakit.handover.uniform import uniform
from lorakit.models.named import NAMED_MODELS

Engine = Literal["vllm", "llama.cpp", "mlx", "ray-serve", "peft"]
ENGINES: tuple[str, ...] = get_args(Engine)
_RULES: dict[str, EngineRules] = {
    "vllm": VLLM,
    "ray-serve": VLLM,
    "llama.cpp": LLAMA_CPP,
    "mlx": MLX,
    "peft": PEFT,
}
RAY_FILE, RAY_APP = "ray_serve.py", "ray_serve:app"


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """What an export left.

    Attributes:
        engine: for whom.
        path: the adapter's directory.
        base: the base as the engine is told to find it.
        checked: which of the engine's rules were checked.
        changed: what was written in another form; the change of every weight is the same.
        command: what to type.
        files: what was written.
    """

    engine: str
    path: str
    base: str
    checked: list[str]
    changed: list[str]
    command: str
    files: list[str]


def export_adapter(
    source: Path,
    output: Path,
    *,
    engine: Engine,
    base: str | None = None,
    name: str | None = None,
) -> Exported:
    """Write an adapter as an engine loads it; whole or not at all.

    Args:
        source: an adapter's directory.
        output: a directory that does not exist yet, or is empty.
        engine: who is to load it.
        base: the base as that engine finds it; None takes the one the adapter names.
        name: the adapter's name in requests; None takes the output's.

    Raises:
        AdapterFileError: it cannot be read, or the engine cannot serve it; says all that is wrong.
        RequestError: the base is one that only this package knows; the name cannot be one.
        OutputError: the output is taken, or the disk refuses.
    """
    require_free(output)
    name = name or output.resolve().name
    check_name(name)
    adapter = read_adapter(source)
    checked = check(adapter, _RULES[engine])
    ref = _base_of(adapter, base, source, engine)
    if engine in ("llama.cpp", "mlx"):
        written, changed = write_converted(adapter, output, engine, ref)
        template = _template_of(adapter, output)
        place = Place(base=ref, name=name, directory=output.resolve(), template=template)
        file = place.directory / written.name
        command = llama_command(place, file) if engine == "llama.cpp" else mlx_command(place)
    else:
        changed, command = _write_peft(adapter, output, engine, base=ref, name=name)
    return Exported(
        engine=engine,
        path=str(output),
        base=ref,
        checked=checked,
        changed=changed,
        command=command,
        files=sorted(file.name for file in output.iterdir()),
    )


def _write_peft(
    adapter: Adapter, output: Path, engine: Engine, *, base: str, name: str
) -> tuple[list[str], str]:
    """PEFT's layout as the engine computes it; what was changed, and the command."""
    changed: list[str] = []
    if engine != "peft":
        adapter, changed = uniform(adapter)
    adapter = replace(adapter, config={**adapter.config, "base_model_name_or_path": base})
    write_adapter(adapter, output)
    _check_written(output, adapter)
    place = Place(
        base=base,
        name=name,
        directory=output.resolve(),
        r=_written_rank(output),
        template=_template_of(adapter, output),
    )
    if engine == "vllm":
        return changed, vllm_command(place)
    if engine == "ray-serve":
        write_text(output / RAY_FILE, ray_file(place))
        return changed, f"cd {shlex.quote(str(place.directory))} && serve run {RAY_APP}"
    return changed, f"PeftModel.from_pretrained(model, {str(place.directory)!r})"


def _template_of(adapter: Adapter, output: Path) -> Path | None:
    """The chat template of the adapter's own, written beside it."""
    template = trained_data(adapter.passport).get("chat_template")
    if template is None:
        return None
    file = output.resolve() / TEMPLATE_NAME
    write_text(file, str(template))
    return file


def _base_of(adapter: Adapter, base: str | None, source: Path, engine: Engine) -> str:
    ref = base or adapter.config.get("base_model_name_or_path")
    if not isinstance(ref, str) or not ref:
        raise AdapterFileError(
            "the adapter does not name its base", where=str(source), remedy="name it: --base REF"
        )
    if engine == "llama.cpp":
        # The named models are GGUF files that llama.cpp reads as they are.
        ref = gguf_of(ref)
    if ref in NAMED_MODELS and not Path(ref).exists():
        raise RequestError(
            f"only lorakit knows the base {ref!r} by this name",
            where="--base",
            expected="a hub id or a directory that the other engine finds too",
            remedy="--base DIR; lorakit merge, or model.save_pretrained(DIR), writes one",
        )
    return ref


def _check_written(path: Path, meant: Adapter) -> None:
    """Read the files again: every module's change must be the one that was meant."""
    written = read_adapter(path)
    for module in meant.modules() if meant.spec.update == "lora" else ():
        if not written.delta(module).equal(meant.delta(module)):
            raise AdapterFileError(
                "the written adapter does not say what was meant",
                where=f"{path / TENSORS_NAME}, {module}",
            )


def _written_rank(path: Path) -> int:
    return int(json.loads((path / CONFIG_NAME).read_text(encoding="utf-8"))["r"])
