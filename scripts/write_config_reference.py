"""Write docs/training-config.md: every key of a training config, from TrainConfig itself.

Run: python scripts/write_config_reference.py (tests/contract/test_docs.py asks for it when the
page is not current).
"""

from __future__ import annotations

import json
from pathlib import Path

from lorakit.methods.registry import METHODS
from lorakit.train.config import TrainConfig
from lorakit.train.resume import MAY_CHANGE
from lorakit.train.schema import FieldHelp

PAGE = Path(__file__).parents[1] / "docs" / "training-config.md"

_TOP = "the whole run"
_ABOUT = {
    _TOP: "",
    "model": "`model: NAME` is short for `model: {ref: NAME}`. 4-bit weights are on "
    "[quantization](quantization.md).",
    "data": "What the columns and templates mean is on [train](train.md#data).",
    "preference": "Read by the tasks `dpo`, `orpo` and `kto`: [preferences](preference.md).",
    "grpo": "Read by the task `grpo`: [rewards](grpo.md).",
    "adalora": "Ranks that move while the adapter learns: "
    "[auto-rank](auto-rank.md#while-it-trains-adalora).",
    "lora": "The fields of `lorakit.LoraSpec`; targets are on [targets](targets.md).",
    **{name: "See [methods](methods.md)." for name in METHODS if name != "lora"},
    "train": "",
}

_HEAD = """\
# Training config

<!-- Written by scripts/write_config_reference.py; do not edit by hand. -->

Every key of the YAML file that `lorakit train` and `lorakit doctor` read. `lorakit train --fields`
prints the same list. Unknown keys, wrong types and values out of range are errors that name the
key.

On the command line a key is overridden as `train.lr=1e-4`, or by its last part (`lr=1e-4`) where
only one key ends so. A value is YAML: `'lora.targets=[q_proj, v_proj]'`,
`train.max_grad_norm=null`. Paths are relative to the current directory. From Python:
`TrainConfig.from_yaml(path, overrides)` and `TrainConfig.from_dict(values)` in
`lorakit.train.config`.
"""


def page() -> str:
    """The whole page."""
    sections: dict[str, list[FieldHelp]] = {name: [] for name in _ABOUT}
    for field in TrainConfig.fields():
        section, dot, _ = field.name.partition(".")
        sections[section if dot else _TOP].append(field)
    parts = [_HEAD, *(_section(name, fields) for name, fields in sections.items())]
    listed = ", ".join(f"`{name}`" for name in sorted(MAY_CHANGE))
    parts.append(
        "## What may change on --resume\n\n"
        f"Only {listed}. Everything else would make it another run and is refused.\n"
    )
    return "\n".join(parts)


def _section(name: str, fields: list[FieldHelp]) -> str:
    about = f"{_ABOUT[name]}\n\n" if _ABOUT[name] else ""
    rows = [
        f"| `{field.name}` | {_cell(field.type)} | {_default(field)} | {_cell(field.help)} |"
        for field in fields
    ]
    table = ["| key | type | default | meaning |", "| --- | --- | --- | --- |", *rows]
    return f"## {name}\n\n{about}" + "\n".join(table) + "\n"


def _default(field: FieldHelp) -> str:
    return "required" if field.required else f"`{json.dumps(field.default)}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
