"""Whether adapters were made on one base, and what all of them agree on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lorakit.adapters.composition.recipe import Part
from lorakit.adapters.fingerprint import Fingerprint
from lorakit.adapters.identity import require_same_base
from lorakit.errors import BaseMismatchError

_ALIKE = ("model", "task", "tokenizer_sha256", "template_sha256", "quantization")


def require_common_base(parts: Sequence[Part], base: nn.Module | None) -> None:
    """Refuse adapters that were made on different bases; a passport without one says nothing.

    Raises:
        BaseMismatchError: two of them, or one of them and `base`, are not the same.
    """
    if base is not None:
        for part in parts:
            require_same_base(base, part.adapter.passport)
        return
    known = [(part, facts) for part in parts if (facts := _base(part)) is not None]
    for part, facts in known[1:]:
        first, mine = Fingerprint.from_json(known[0][1]), Fingerprint.from_json(facts)
        if first.left_out != mine.left_out:
            continue  # they sampled different modules: only the base itself could tell
        difference = first.difference(mine)
        if difference:
            raise BaseMismatchError(
                "the adapters were made for different base models",
                where=part.name,
                expected=f"{known[0][1].get('name') or 'unnamed'} ({first.sha256[:12]}), the base "
                f"of {known[0][0].name}",
                found=f"{facts.get('name') or 'unnamed'} ({mine.sha256[:12]}): {difference}",
                remedy="take adapters of one base, or say that any base will do: --any-base",
            )


def _base(part: Part) -> Mapping[str, Any] | None:
    facts = part.adapter.passport.get("base")
    return facts if isinstance(facts, Mapping) and "samples" in facts else None


def require_common_classes(parts: Sequence[Part]) -> None:
    """Refuse heads of different classes: their outputs do not mean the same.

    Raises:
        BaseMismatchError: two passports name different classes.
    """
    known = [(part.name, found) for part in parts if (found := _classes(part)) is not None]
    for name, found in known[1:]:
        if found != known[0][1]:
            raise BaseMismatchError(
                "the parts give rows different classes, or the same in another order",
                where=name,
                expected=f"{_listed(known[0][1])}, those of {known[0][0]}",
                found=_listed(found),
                remedy="compose classifiers of the same classes",
            )


def _classes(part: Part) -> list[str] | None:
    task = part.adapter.passport.get("task")
    targets = task.get("targets") if isinstance(task, Mapping) else None
    names = targets.get("names") if isinstance(targets, Mapping) else None
    return [str(name) for name in names] if isinstance(names, list) else None


def _listed(classes: Sequence[str]) -> str:
    return ", ".join(classes) or "a number"


def common_facts(parts: Sequence[Part]) -> dict[str, Any]:
    """The passport of a composed adapter, without what tells of its parts.

    Facts that all parts share (the tokenizer, the template, how rows are read) hold for the result;
    what they differ in is left out.
    """
    passports = [part.adapter.passport for part in parts]
    facts: dict[str, Any] = {"method": "lora"}
    base = next((b for part in parts if (b := _base(part)) is not None), None)
    if base is not None:
        facts["base"] = dict(base)
    for key in _ALIKE:
        values = [passport.get(key) for passport in passports]
        if values[0] is not None and all(value == values[0] for value in values):
            facts[key] = values[0]
    rows = _alike([_data_section(passport) for passport in passports])
    if rows:
        facts["config"] = {"data": rows}
    return facts


def _data_section(passport: Mapping[str, Any]) -> Mapping[str, Any]:
    config = passport.get("config")
    data = config.get("data") if isinstance(config, Mapping) else None
    return data if isinstance(data, Mapping) else {}


def _alike(sections: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first, *others = sections
    return {
        key: value
        for key, value in first.items()
        if all(key in other and other[key] == value for other in others)
    }
