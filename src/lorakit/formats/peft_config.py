"""PEFT's adapter_config.json: read it strictly, write it so that PEFT means the same."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.architectures import taken_for_experts
from lorakit.adapters.spec import LoraSpec
from lorakit.errors import AdapterFileError, LorakitWarning, SpecError
from lorakit.files import read_json
from lorakit.formats.passport import PASSPORT_NAME
from lorakit.formats.peft_parameters import parameter_config
from lorakit.math.scaling import alpha_for

CONFIG_NAME = "adapter_config.json"

# Keys that change what the adapter computes and that we do not compute: refused unless at rest.
_REFUSED: dict[str, tuple[object, ...]] = {
    "lora_bias": (False, None),
    "layer_replication": (None,),
    "megatron_config": (None,),
    "alora_invocation_tokens": (None,),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
}
# These start from another base than W0: without the changed base their A and B mean nothing.
_REFUSED_INITS = re.compile(r"pissa|olora|corda|lora_ga|loftq|mica", re.IGNORECASE)
# Keys that we read, or that do not change what a trained adapter computes.
_KNOWN = frozenset(
    {
        *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config"),
        *("ensure_weight_tying",),
        *("eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode"),
        *("init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config"),
        *("lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core", "modules_to_save"),
        *("peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision"),
        *("target_modules", "target_parameters", "task_type", "trainable_token_indices"),
        *("use_dora", "use_rslora"),
    }
)


def read_config(directory: Path) -> dict[str, Any]:
    """The configuration as it stands in the file, checked.

    Raises:
        AdapterFileError: no such file, not a JSON object, not LoRA, or a key that changes the
            result and is not supported.
    """
    path = directory / CONFIG_NAME
    if not path.is_file():
        raise no_adapter_here(directory)
    try:
        config = read_json(path)
    except (OSError, ValueError) as error:
        raise AdapterFileError(
            "the adapter's configuration is not JSON",
            where=str(path),
            expected='{"peft_type": "LORA", ...}',
            found=str(error),
            remedy="copy the directory again",
        ) from error
    if not isinstance(config, dict):
        raise AdapterFileError(
            "the adapter's configuration is not an object",
            where=str(path),
            expected='{"peft_type": "LORA", ...}',
            found="null" if config is None else type(config).__name__,
            remedy="copy the directory again",
        )
    _refuse(config, path)
    return config


def no_adapter_here(path: Path) -> AdapterFileError:
    """The error for a path that holds no adapter, with the adapters that lie near it."""
    names = (CONFIG_NAME, PASSPORT_NAME)
    if path.is_dir():
        near = {
            found.parent
            for depth in ("*", "*/*")
            for n in names
            for found in path.glob(f"{depth}/{n}")
        }
    else:
        near = {path.parent for name in names if (path.parent / name).is_file()}
    inside = ", ".join(str(directory) for directory in sorted(near)[:5])
    found = "no such file in the directory" if path.is_dir() else "a file"
    return AdapterFileError(
        "there is no adapter here",
        where=str(path),
        expected=f"a directory with {PASSPORT_NAME}, or one in PEFT's layout ({CONFIG_NAME})",
        found=found if path.exists() else "nothing",
        remedy=f"there are adapters in {inside}" if inside else "give the directory that holds it",
    )


def _refuse(config: Mapping[str, Any], path: Path) -> None:
    if config.get("peft_type", "LORA") != "LORA":
        raise AdapterFileError(
            "this is an adapter of another method",
            where=f"{path}: peft_type",
            expected="LORA",
            found=str(config["peft_type"]),
            remedy="use it with PEFT itself; a method that changes weights can be merged there "
            "(merge_and_unload), and the merged model used here",
        )
    empty = ([], {}, "")
    refused = [
        k for k, rest in _REFUSED.items() if k in config and config[k] not in (*rest, *empty)
    ]
    init = config.get("init_lora_weights")
    if isinstance(init, str) and _REFUSED_INITS.match(init):
        refused.append("init_lora_weights")
    if refused:
        raise AdapterFileError(
            "the adapter asks for what lorakit does not compute, and would give other results",
            where=str(path),
            found=", ".join(f"{key}={config[key]!r}" for key in refused),
            remedy="for PiSSA-like inits, save with PEFT's path_initial_model_for_weight_conversion"
            if "init_lora_weights" in refused
            else "merge it with PEFT itself (merge_and_unload), and use the merged model here",
        )
    unknown = [k for k, v in config.items() if k not in _KNOWN and k not in _REFUSED and v]
    if unknown:
        warnings.warn(
            f"unknown keys in {path.name} are kept as they are: {', '.join(sorted(unknown))}",
            LorakitWarning,
            stacklevel=2,
        )


def named_base(config: Mapping[str, Any], where: Path, option: str) -> str:
    """The base that the configuration names.

    Args:
        config: of an adapter.
        where: for the error.
        option: how the base is named on the command line.

    Raises:
        AdapterFileError: it names none.

    Warns:
        LorakitWarning: it names a revision, which is not what is loaded by the name alone.
    """
    name = config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise AdapterFileError(
            "the adapter does not name its base",
            where=f"{where}, key base_model_name_or_path",
            remedy=f"name it: {option} REF",
        )
    revision = config.get("revision")
    if revision not in (None, "", "main") and not Path(name).is_dir():
        warnings.warn(
            f"the adapter was made on revision {revision} of {name}; the base's default revision "
            f"is loaded: for that one, {option} with a directory that holds it",
            LorakitWarning,
            stacklevel=2,
        )
    return name


def spec_from_config(config: Mapping[str, Any], path: Path) -> LoraSpec:
    """The request that a configuration states.

    Raises:
        AdapterFileError: a value that cannot be.
    """
    targets = config.get("target_modules") or ()
    init = config.get("init_lora_weights", True)
    try:
        if not isinstance(config.get("target_parameters") or [], list):
            raise TypeError(f"target_parameters is no list: {config['target_parameters']!r}")
        return LoraSpec(
            r=config.get("r", 8),
            alpha=config.get("lora_alpha", 8),
            dropout=float(config.get("lora_dropout") or 0.0),
            targets=targets if isinstance(targets, str) else tuple(targets) or "qv",
            update="dora" if config.get("use_dora") else "lora",
            scaling="alpha/sqrt(r)" if config.get("use_rslora") else "alpha/r",
            rank_pattern=config.get("rank_pattern") or {},
            alpha_pattern=config.get("alpha_pattern") or {},
            init="gaussian" if init == "gaussian" else "kaiming",
            bias=config.get("bias") or "none",
            also_train=_names(config.get("modules_to_save")),
        )
    except (SpecError, TypeError, ValueError, AttributeError) as error:
        raise AdapterFileError(
            "the adapter's configuration has a value that cannot be",
            where=str(path),
            found=str(error).replace("\n", ";"),
        ) from error


def _names(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value or ())


def peft_pattern(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    """PEFT's rule: the first key that matches as a regular expression at the end of the name."""
    for key, value in pattern.items():
        try:
            if re.match(rf"(.*\.)?({key})$", name):
                return value
        except re.error:
            if name == key or name.endswith("." + key):
                return value
    return default


def config_for(
    adapter: Adapter,
    stacked: Mapping[str, tuple[int, float]],
    parameters: Mapping[str, tuple[int, float]],
    *,
    model_type: str | None = None,
) -> dict[str, Any]:
    """The configuration PEFT needs to compute what we compute.

    Args:
        adapter: what is written.
        stacked: module -> (rank, scaling) as they stand in the tensor file.
        parameters: the same of adapted parameters.
        model_type: the base's, as transformers names it; None: what the passport says, if it does.
    """
    spec = adapter.spec
    as_parameters = _as_parameters(adapter, model_type)
    parameters = {**{f"{m}.weight": stacked[m] for m in as_parameters}, **parameters}
    stacked = {m: size for m, size in stacked.items() if m not in as_parameters}
    sizes = {**stacked, **parameters}
    alphas = {m: alpha_for(s, r, spec.scaling) for m, (r, s) in sizes.items()}
    ranks = {m: r for m, (r, _) in sizes.items()}
    r, alpha = _commonest(ranks, spec.fixed_r()), _commonest(alphas, spec.alpha)
    kinds = {f.kind for f in adapter.factors.values() if f.stack is None}
    own = {
        "peft_type": "LORA",
        "task_type": adapter.config.get("task_type"),
        "base_model_name_or_path": adapter.config.get("base_model_name_or_path"),
        "revision": adapter.config.get("revision"),
        "auto_mapping": adapter.config.get("auto_mapping"),
        "r": r,
        "lora_alpha": _plain(alpha),
        # PEFT drops nothing out of a parameter's input, and refuses to.
        "lora_dropout": 0.0 if as_parameters else spec.dropout,
        "target_modules": _target_modules(adapter, as_parameters) or list(stacked),
        "modules_to_save": _modules_to_save(adapter) or None,
        "bias": spec.bias,
        "use_rslora": spec.scaling == "alpha/sqrt(r)",
        "use_dora": spec.update == "dora",
        "rank_pattern": {m: v for m, v in ranks.items() if v != r},
        "alpha_pattern": {m: _plain(v) for m, v in alphas.items() if v != alpha},
        "init_lora_weights": "gaussian" if spec.init == "gaussian" else True,
        "fan_in_fan_out": "conv1d" in kinds,
        "inference_mode": True,
        "layers_to_transform": None,
        "layers_pattern": None,
        "exclude_modules": None,
    }
    return {**adapter.config, **own, **parameter_config(adapter, parameters)}


def _as_parameters(adapter: Adapter, model_type: str | None) -> list[str]:
    """The layers whose weight PEFT must be given as a parameter, where it can adapt it as one."""
    if adapter.spec.update != "lora":
        return []
    base = adapter.passport.get("base")
    if model_type is None and isinstance(base, Mapping):
        model_type = str(base.get("model_type"))
    layers = dict.fromkeys(f.module for f in adapter.factors.values() if f.stack is None)
    return taken_for_experts(model_type or "", layers)


def _target_modules(adapter: Adapter, left_out: Collection[str] = ()) -> list[str]:
    """The names that the adapter was given for its targets; none if one is an expression.

    Those of layers that are left out are not among them.

    PEFT takes a string for an expression, and every entry of a list for the end of a name.
    """
    leaves = {module.rpartition(".")[2] for module in left_out}
    names = [n for n in adapter.target_modules if n.rpartition(".")[2] not in leaves]
    return names if all(re.fullmatch(r"[\w.-]+", name) for name in names) else []


def _commonest(values: Mapping[str, Any], default: Any) -> Any:
    return Counter(values.values()).most_common(1)[0][0] if values else default


def _plain(alpha: float) -> float | int:
    """Whole alphas as integers: some readers of the format expect them so."""
    return int(alpha) if float(alpha).is_integer() else alpha


def _modules_to_save(adapter: Adapter) -> list[str]:
    owners = [name.rpartition(".")[0] for name in adapter.overrides]
    if adapter.spec.bias == "all":
        leaves: dict[str, set[str]] = {}
        for name in adapter.overrides:
            owner, _, leaf = name.rpartition(".")
            leaves.setdefault(owner, set()).add(leaf)
        owners = [o for o in owners if leaves[o] != {"bias"} or _named(adapter, o)]
    owners = list(dict.fromkeys(owners))
    named = [n for n in adapter.spec.also_train if any(_is_or_holds(n, o) for o in owners)]
    covered = all(any(_is_or_holds(n, o) for n in named) for o in owners)
    return named if covered else owners


def _named(adapter: Adapter, owner: str) -> bool:
    return any(_is_or_holds(name, owner) for name in adapter.spec.also_train)


def _is_or_holds(name: str, owner: str) -> bool:
    """Whether `name`, as a suffix, is the owner or one of the modules around it."""
    return f".{name}." in f".{owner}."
