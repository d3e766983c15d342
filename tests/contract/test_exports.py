"""The public names, their signatures, and what importing costs."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import lorakit

SOURCE = Path(lorakit.__file__).parent
PUBLIC = [
    "Adapter",
    "AdapterPlan",
    "LoraSpec",
    "LorakitError",
    "Site",
    "__version__",
    "active_adapter",
    "attach",
    "compose",
    "detach",
    "extract",
    "fingerprint",
    "initialise_from_data",
    "load_adapter",
    "load_model",
    "merge",
    "plan_adapter",
    "save_adapter",
    "unmerge",
    "use",
]


def test_the_public_names_are_these() -> None:
    assert list(lorakit.__all__) == sorted(PUBLIC)
    assert dir(lorakit) == sorted(PUBLIC)
    for name in PUBLIC:
        assert getattr(lorakit, name) is not None
    with pytest.raises(AttributeError, match="compos"):
        lorakit.compos  # noqa: B018


# Positional parameters, then keyword-only ones.
SIGNATURES = {
    "plan_adapter": (["model", "spec"], []),
    "attach": (["model", "plan", "name"], []),
    "detach": (["model", "name"], []),
    "use": (["model", "selection"], []),
    "merge": (["model", "name"], ["keep"]),
    "unmerge": (["model"], []),
    "save_adapter": (["model", "path", "name"], ["passport", "replace"]),
    "load_adapter": (["model", "path", "name"], ["any_base"]),
    "active_adapter": (["model"], []),
    "compose": (["parts", "how"], ["r", "density", "seed", "base"]),
    "extract": (["base", "tuned", "r"], ["targets", "also_train"]),
    "fingerprint": (["model"], ["left_out"]),
    "initialise_from_data": (["model", "name", "batches"], ["loss"]),
    "load_model": (["ref", "quantize"], ["dtype"]),
}


@pytest.mark.parametrize("name", list(SIGNATURES))
def test_signatures_are_a_contract(name: str) -> None:
    positional, keyword = SIGNATURES[name]
    parameters = inspect.signature(getattr(lorakit, name)).parameters.values()
    assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == positional
    found = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    assert found[: len(keyword)] == keyword
    assert not [p for p in parameters if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]


def test_adapter_loads_and_saves_without_a_model() -> None:
    assert list(inspect.signature(lorakit.Adapter.load).parameters) == ["path"]
    assert list(inspect.signature(lorakit.Adapter.save).parameters)[:2] == ["self", "path"]


def test_importing_lorakit_waits_for_nothing() -> None:
    script = (
        "import sys, lorakit, lorakit.errors; dir(lorakit); lorakit.__version__;"
        "print([m for m in ('torch', 'transformers', 'numpy', 'matplotlib', 'rich', 'datasets')"
        " if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_every_public_thing_says_what_it_does() -> None:
    for name in PUBLIC:
        if name != "__version__":
            assert inspect.getdoc(getattr(lorakit, name)), name


@pytest.mark.parametrize(
    "file", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE))
)
def test_files_stay_short_and_well_named(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert text.count("\n") <= 400
    assert file.name not in ("utils.py", "helpers.py")


def test_no_machine_path_or_tool_of_the_workplace_is_in_the_source() -> None:
    found = [
        str(p)
        for p in SOURCE.rglob("*")
        if p.suffix in (".py", ".html", ".j2")
        and any(w in p.read_text(encoding="utf-8") for w in ("/work/", "/tmp/", "/home/"))
    ]
    assert found == []


def test_types_are_shipped() -> None:
    assert (SOURCE / "py.typed").is_file()
