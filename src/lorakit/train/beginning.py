"""The saved adapters that a run begins with or is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.identity import adapter_sha256
from lorakit.adapters.spec import LoraSpec
from lorakit.adapters.stack import check_beneath, spec_to_continue
from lorakit.errors import AdapterFileError, ConfigError
from lorakit.formats.peft import read_adapter
from lorakit.methods.lora import Beginning, LoraMethod

BASE = "base"
# Tasks whose learned tensors mean the same in another run; a classifier's head has its own labels.
_TASKS = ("sft", "dpo", "orpo", "kto", "grpo")


@dataclass(frozen=True, kw_only=True)
class Beginnings:
    """The keys of a config that name saved adapters.

    Attributes:
        continue_from: directory of the adapter that is trained further, or None.
        on_top_of: directory of the adapter that stays frozen beneath, or None.
        reference: what preferences are compared with: a directory, "base", or None for the start.
    """

    continue_from: str | None
    on_top_of: str | None
    reference: str | None

    @property
    def start(self) -> str | None:
        """The directory of the adapter that the model computes before the first step."""
        return self.continue_from or self.on_top_of

    @property
    def start_key(self) -> str:
        """The key that names it."""
        return "on_top_of" if self.continue_from is None else "continue_from"

    def check(self, *, task: str, method: str, lora: LoraSpec) -> None:
        """Refuse what does not combine.

        Raises:
            ConfigError: with the key that means nothing here.
        """
        if self.continue_from is not None and self.on_top_of is not None:
            raise ConfigError(
                "the run begins with two adapters",
                where="continue_from and on_top_of",
                expected="one of them",
                remedy="compose them into one first: lorakit compose",
            )
        for key, named in (
            ("continue_from", self.continue_from),
            ("on_top_of", self.on_top_of),
            ("preference.reference", self.reference if self.reference != BASE else None),
        ):
            if named is not None and method != LoraMethod.name:
                raise ConfigError(
                    "only LoRA adapters can be trained further, stacked, or compared with",
                    where=key,
                    expected="method: lora",
                    found=f"method: {method}",
                )
            if named is not None and task not in _TASKS:
                raise ConfigError(
                    f"task {task} trains a head whose labels are its own",
                    where=key,
                    expected=f"task: {', '.join(_TASKS)}",
                    found=f"task: {task}",
                )


# What a start or a choice of ranks says about an adapter that has both already.
_NEW_ONLY = ("init", "budget", "ranks")


def require_as_saved(path: str, given: Mapping[str, Any]) -> None:
    """Refuse keys of lora that say another thing than the adapter that is trained further.

    Args:
        path: the saved adapter.
        given: the keys that are set, with their values; its dropout is the run's own.

    Raises:
        ConfigError: names the keys, and both values.
        AdapterFileError: the adapter cannot be read.
    """
    named = {key: value for key, value in given.items() if key != "dropout"}
    if not named:
        return
    adapter = read_named(path, "continue_from")
    default, saved = LoraSpec(), adapter.spec
    expected = {
        key: getattr(default if key in _NEW_ONLY else saved, key, None)
        for key in named
        if key in LoraSpec.__dataclass_fields__
    }
    other = [key for key, value in expected.items() if not _is_same(named[key], value)]
    if "targets" in other and _is_same(named["targets"], adapter.target_modules):
        other.remove("targets")
    if other:
        raise ConfigError(
            "an adapter that is trained further keeps its ranks and sites",
            where=", ".join(f"lora.{key}" for key in other),
            expected=f"{_listed({k: expected[k] for k in other})}, as in {path}",
            found=_listed({k: named[k] for k in other}),
            remedy="remove these keys; a new adapter on top of the saved one: on_top_of",
        )


def _is_same(given: Any, saved: Any) -> bool:
    if isinstance(given, (list, tuple)) or isinstance(saved, (list, tuple)):
        one, other = ([v] if isinstance(v, str) else list(v or ()) for v in (given, saved))
        return sorted(map(str, one)) == sorted(map(str, other))
    return given == saved


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}: {value}" for key, value in values.items())


def set_keys(lora: LoraSpec) -> dict[str, Any]:
    """The keys of a request that are not at their defaults."""
    plain = LoraSpec()
    names = (f.name for f in fields(lora))
    return {n: getattr(lora, n) for n in names if getattr(lora, n) != getattr(plain, n)}


def begin_lora(
    beginnings: Beginnings,
    spec: LoraSpec,
    *,
    name: str,
    lora_plus_ratio: float | None,
    moving_start: float,
) -> LoraMethod:
    """The method lora with its beginning, not attached yet.

    Raises:
        AdapterFileError: the saved adapter cannot be read.
        SpecError: it cannot lie beneath another one.
    """
    begin: Beginning | None = None
    if beginnings.continue_from is not None:
        require_as_saved(beginnings.continue_from, set_keys(spec))
        adapter = read_named(beginnings.continue_from, "continue_from")
        spec = spec_to_continue(adapter, dropout=spec.dropout)
        begin = Beginning(adapter, beginnings.continue_from, beneath=False)
    elif beginnings.on_top_of is not None:
        adapter = read_named(beginnings.on_top_of, "on_top_of")
        check_beneath(adapter, spec)
        begin = Beginning(adapter, beginnings.on_top_of, beneath=True)
    return LoraMethod(
        spec, name, lora_plus_ratio=lora_plus_ratio, begin=begin, moving_start=moving_start
    )


def read_named(path: str, key: str) -> Adapter:
    """The adapter that a key of the config names.

    Raises:
        AdapterFileError: it cannot be read; the key is said.
    """
    try:
        return read_adapter(Path(path))
    except AdapterFileError as error:
        raise AdapterFileError(
            error.what,
            where=f"{key}: {error.where}",
            expected=error.expected,
            found=error.found,
            remedy=error.remedy,
        ) from error


@dataclass(frozen=True)
class Reference:
    """What a policy is compared with.

    Attributes:
        adapter: an adapter on the base, or None for the base itself.
        is_start: whether the run begins there.
        name: in words.
        sha256: of the adapter; None for the base.
    """

    adapter: Adapter | None
    is_start: bool
    name: str
    sha256: str | None


def read_reference(beginnings: Beginnings) -> Reference:
    """The reference of a run with preferences.

    Raises:
        AdapterFileError: an adapter cannot be read.
    """
    start, named = beginnings.start, beginnings.reference
    if named == BASE or (named is None and start is None):
        return Reference(None, start is None, "the base", None)
    if named is None and start is not None:
        adapter = read_named(start, beginnings.start_key)
        return Reference(adapter, True, f"the adapter {start}", adapter_sha256(adapter))
    adapter = read_named(str(named), "preference.reference")
    sha256 = adapter_sha256(adapter)
    is_start = start is not None and sha256 == adapter_sha256(
        read_named(start, beginnings.start_key)
    )
    return Reference(adapter, is_start, f"the adapter {named}", sha256)


def hashes(beginnings: Beginnings) -> dict[str, str]:
    """SHA-256 of every saved adapter that the config names, by key.

    Raises:
        AdapterFileError: one cannot be read.
    """
    named = {
        "continue_from": beginnings.continue_from,
        "on_top_of": beginnings.on_top_of,
        "preference.reference": None if beginnings.reference == BASE else beginnings.reference,
    }
    return {
        key: adapter_sha256(read_named(path, key))
        for key, path in named.items()
        if path is not None
    }
