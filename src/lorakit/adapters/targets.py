"""From what the user wrote to the modules and parts it means."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lorakit.adapters.architectures import uncalled
from lorakit.adapters.fused import fused_parts
from lorakit.errors import TargetError, nearest
from lorakit.layers.adapted import Wrapper
from lorakit.layers.kinds import LayerKind, kind_of
from lorakit.layers.prefix import PrefixTokens
from lorakit.layers.rows import Rows

PRESETS = ("qv", "attention", "mlp", "all-linear")

_QUERY = frozenset(
    {"q", "q_proj", "query", "query_proj", "q_lin", "wq", "to_q", "q_attn", "Wq", "project_q"}
    | {"q_b_proj"}  # of latent attention, behind q_a_proj
)
_VALUE = frozenset({"v", "v_proj", "value", "value_proj", "v_lin", "wv", "to_v", "Wv", "project_v"})
# Leaves that say what they are where the modules around them do not (Nemotron-H's mixers).
_PLAIN = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "attention"),
    **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "mlp"),
}
_ATTENTION = re.compile(r"att(?:n|ention)", re.IGNORECASE)
_NOT_MLP = re.compile(r"mixer|mamba|conv|router|^gate$|shared_expert_gate", re.IGNORECASE)
_REGEX = re.compile(r"[\\^$*+?{}\[\]|()]")


@dataclass(frozen=True, slots=True)
class Candidate:
    """Something that can be adapted: a module, or one part of a fused one."""

    name: str
    module_name: str
    module: nn.Module
    kind: LayerKind
    rows: Rows | None = None


def bare_model(model: nn.Module) -> nn.Module:
    """The model inside what torch.compile, DataParallel and DDP put around it; else itself."""
    while True:
        if isinstance(model, (nn.DataParallel, DistributedDataParallel)):
            model = model.module
        elif (compiled := model._modules.get("_orig_mod")) is not None:
            model = compiled
        else:
            return model


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module of the model under its original name, as if nothing were attached."""
    found: dict[str, nn.Module] = {}
    _collect(model, "", found, set())
    return found


def _collect(module: nn.Module, name: str, found: dict[str, nn.Module], seen: set[int]) -> None:
    while isinstance(module, Wrapper):
        module = module.base
    if id(module) in seen:
        return
    seen.add(id(module))
    found[name] = module
    for child_name, child in module.named_children():
        if isinstance(child, PrefixTokens):
            continue  # beside the base, not in the place of a part of it
        _collect(child, f"{name}.{child_name}" if name else child_name, found, seen)


def candidates(model: nn.Module) -> dict[str, Candidate]:
    """Everything in the model that can be adapted, by name, parts behind their module."""
    config = text_config(model)
    result: dict[str, Candidate] = {}
    for name, module in base_modules(model).items():
        kind = kind_of(module)
        if kind is None or not name or _refusal(config, name, module, kind):
            continue
        result[name] = Candidate(name, name, module, kind)
        if kind.name in ("linear", "conv1d"):
            leaf = name.rpartition(".")[2]
            for part, rows in fused_parts(config, leaf, kind.shape(module)[0]).items():
                result[f"{name}.{part}"] = Candidate(f"{name}.{part}", name, module, kind, rows)
    return result


def _refusal(config: Any, name: str, module: nn.Module, kind: LayerKind) -> str | None:
    return kind.refusal(module) or uncalled(config, name.rpartition(".")[2])


def resolve_targets(
    model: nn.Module, targets: str | tuple[str, ...], *, whole: Sequence[str] = ()
) -> list[Candidate]:
    """The candidates that the targets name, in the model's order, each once.

    A target is a preset (`qv`, `attention`, `mlp`, `all-linear`), a full name, a suffix of whole
    components (`q_proj`, `c_attn.q`), or a regular expression that matches the full name.

    Args:
        model: any nn.Module; not changed.
        targets: one or several.
        whole: modules that are trained as a whole; presets leave out what is in them.

    Raises:
        TargetError: a target matches nothing, or nothing that can be adapted; or two targets name
            a fused projection and a part of it.
    """
    patterns = (targets,) if isinstance(targets, str) else targets
    known = candidates(model)
    inside = tuple(f"{name}." for name in whole)
    rest = {n: c for n, c in known.items() if not f"{c.module_name}.".startswith(inside)}
    chosen: set[str] = set()
    for pattern in patterns:
        if pattern in PRESETS:
            chosen |= _preset(model, pattern, rest)
        else:
            chosen |= _named(model, pattern, known)
    found = [candidate for name, candidate in known.items() if name in chosen]
    _refuse_overlap(found)
    return found


def matches(pattern: str, name: str) -> bool:
    """Whether a name, suffix or regular expression means this module or part.

    An expression must match the whole name, or whole components at its end.
    """
    if name == pattern or name.endswith("." + pattern):
        return True
    return bool(_REGEX.search(pattern)) and _fullmatch(pattern, name)


def _fullmatch(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name) is not None
    except re.error as error:
        raise TargetError(
            "the target is not a valid regular expression",
            where=f"targets: {pattern!r}",
            found=str(error),
            remedy="name modules by suffix (q_proj), or mend the expression",
        ) from error


def _named(model: nn.Module, pattern: str, known: dict[str, Candidate]) -> set[str]:
    found = {name for name in known if matches(pattern, name)}
    if found:
        # Who names a whole projection (".*attn.*") does not also mean its parts.
        return {n for n in found if known[n].rows is None or known[n].module_name not in found}
    others = {name: m for name, m in base_modules(model).items() if name and matches(pattern, name)}
    if others:
        name, module = next(iter(others.items()))
        kind = kind_of(module)
        reason = _refusal(text_config(model), name, module, kind) if kind else None
        raise TargetError(
            "the target names modules that cannot be adapted",
            where=f"targets: {pattern!r}",
            expected="nn.Linear, Conv1D, nn.Embedding or nn.Conv2d",
            found=f"{name} is {type(module).__name__}" + (f": {reason}" if reason else ""),
            remedy=_suggest(pattern, known),
        )
    raise TargetError(
        "the target matches nothing",
        where=f"targets: {pattern!r}",
        expected=f"a preset ({', '.join(PRESETS)}), or the name of a layer",
        remedy=_suggest(pattern, known),
    )


def _suggest(pattern: str, known: Iterable[str]) -> str:
    leaves: dict[str, None] = {}
    for name in known:
        components = name.split(".")
        leaves[components[-1]] = None
        if len(components) > 1 and components[-1] in ("q", "k", "v", "gate", "up"):
            leaves[".".join(components[-2:])] = None
    close = nearest(pattern.rpartition(".")[2], leaves) or nearest(pattern, leaves)
    if close:
        return f"the nearest names are {', '.join(close)}"
    return f"the names here are {', '.join(list(leaves)[:12])}"


def _preset(model: nn.Module, preset: str, known: dict[str, Candidate]) -> set[str]:
    linear = {n: c for n, c in known.items() if c.kind.name in ("linear", "conv1d")}
    body = {n: c for n, c in linear.items() if c.rows is None and _in_body(model, c)}
    tests: dict[str, Callable[[str], bool]] = {
        "all-linear": lambda name: True,
        "attention": lambda name: _role(name) == "attention",
        "mlp": lambda name: _role(name) == "mlp",
    }
    if preset == "qv":
        found = {n for n, c in linear.items() if _is_query_or_value(c) and c.module_name in body}
    else:
        found = {n for n in body if tests[preset](n)}
    if not found or (preset == "qv" and not _has_both(found)):
        raise TargetError(
            f"the preset {preset!r} finds nothing to adapt in this architecture",
            where=type(model).__name__,
            expected={"qv": "query and value projections"}.get(preset, f"{preset} layers"),
            found=", ".join(sorted({n.rpartition(".")[2] for n in body})) or "no linear layer",
            remedy="name the layers themselves",
        )
    return found


def _has_both(found: set[str]) -> bool:
    leaves = {name.rpartition(".")[2] for name in found}
    return bool(leaves & _QUERY) and bool(leaves & _VALUE)


def _is_query_or_value(candidate: Candidate) -> bool:
    if _role(candidate.module_name) != "attention":
        return False
    return candidate.name.rpartition(".")[2] in _QUERY | _VALUE


def _role(name: str) -> str | None:
    """Attention or mlp for a layer inside a numbered block; None outside of blocks."""
    components = name.split(".")
    numbered = [i for i, component in enumerate(components) if component.isdigit()]
    if not numbered:
        return None
    inside = components[numbered[0] + 1 :]
    if len(inside) == 1:
        # XLM numbers its attentions, not its blocks: attentions.0.q_lin.
        inside = components[max(0, numbered[0] - 1) :]
    if any(_ATTENTION.search(component) for component in inside):
        return "attention"
    if inside[-1] in _PLAIN:
        return _PLAIN[inside[-1]]
    return None if any(_NOT_MLP.search(component) for component in inside) else "mlp"


def _in_body(model: nn.Module, candidate: Candidate) -> bool:
    """Whether the layer belongs to the pretrained body: not the output head, not a task head."""
    if _around(_call(model, "get_output_embeddings"), candidate.module):
        return False
    prefix = getattr(model, "base_model_prefix", "")
    if not prefix or getattr(model, prefix, None) is None:
        return True
    return candidate.module_name.startswith(prefix + ".")


def _refuse_overlap(found: list[Candidate]) -> None:
    by_module: dict[str, list[Candidate]] = {}
    for candidate in found:
        by_module.setdefault(candidate.module_name, []).append(candidate)
    for module_name, group in by_module.items():
        if len(group) > 1 and any(c.rows is None for c in group):
            raise TargetError(
                "a fused projection is targeted both whole and by part",
                where=module_name,
                found=", ".join(c.name for c in group),
                remedy="name either the whole or its parts",
            )


def input_embedding(model: nn.Module) -> tuple[str, nn.Embedding] | None:
    """The look-up of the tokens and its name, where the model has one and says so."""
    found = _call(model, "get_input_embeddings")
    for name, module in base_modules(model).items():
        if isinstance(module, nn.Embedding) and _around(found, module):
            return name, module
    return None


def _around(wrapper: object, module: nn.Module) -> bool:
    while isinstance(wrapper, Wrapper):
        wrapper = wrapper.base
    return wrapper is module


def _call(model: nn.Module, method: str) -> Any:
    function = getattr(model, method, None)
    return function() if callable(function) else None


def model_type_of(model: nn.Module) -> str:
    """The architecture as transformers names it; empty for a model that is not transformers'."""
    return str(getattr(getattr(model, "config", None), "model_type", ""))


def text_config(model: nn.Module) -> Any:
    """The transformers configuration of the model's text part, or None."""
    config = getattr(model, "config", None)
    get_text_config = getattr(config, "get_text_config", None)
    return get_text_config() if callable(get_text_config) else config
